"""A session that shows what would leave the site, and ends the script before anything does."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from fedcore.errors import ClosedError, ConfigError
from fedcore.files.frozen import FrozenGroup
from fedcore.files.inspection import Inspection, describe, lines
from fedcore.layout import TensorSpec
from fedcore.model_file import Reader
from fedcore.protocol import Role
from fedcore.roles import Pairs

from .session import GlobalModel, Session
from .settings import SiteSettings

__all__ = ["InspectingSession"]


class InspectingSession(Session):
    """Stands in for a site's session where ``FEDCORE_INSPECT`` is set; it never opens a connection.

    Args:
        report: ``"1"`` prints a table; anything else is the path of a file to write as JSON.
    """

    def __init__(self, report: str) -> None:
        super().__init__(SiteSettings(server="tcp://none.invalid:1", site="inspected"))
        self._report_to = report
        self._asked = False
        self.took_part = True

    def is_running(self) -> bool:
        """Return True once, as if a first round had begun."""
        if self._asked:
            raise ClosedError(
                "the loop asked for work again without having received a model, so there is nothing to inspect"
            )
        self._asked = True
        return True

    def begin(
        self,
        specs: Sequence[TensorSpec],
        files: Mapping[str, str],
        read: Reader,  # noqa: ARG002
        fingerprints: Mapping[str, str] | None = None,
        frozen: Sequence[FrozenGroup] = (),
        *,
        roles: Mapping[str, Role] | None = None,
        pairs: Pairs = (),  # noqa: ARG002
    ) -> GlobalModel:
        """Report the tensors and end the script."""
        self._report(describe(specs, files, fingerprints, frozen, roles=roles))

    def _report(self, found: Inspection) -> NoReturn:
        if self._report_to == "1":
            print("\n".join(lines(found)), flush=True)
        else:
            Path(self._report_to).write_text(found.model_dump_json(), encoding="utf-8")
        sys.stdout.flush()
        raise SystemExit(0)

    def offered_specs(self) -> list[TensorSpec] | None:
        """Raise ConfigError: the server's model decides here, and it isn't asked."""
        raise ConfigError(
            "fl.init() was given no model: what travels is whatever the server's model holds; inspect that file"
        )

    def system_info(self) -> dict[str, str | int]:
        """Return what a first round of one would have."""
        return {"run": "", "site": self.site, "server": "", "round": 1, "rounds": 1, "version": 0}
