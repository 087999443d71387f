"""What a run's journal keeps of the decisions of a rule of several passes: what each update of a round weighs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedcore.errors import IntegrityError
from fedcore.server.rounds.verdicts import Verdict

from .journal import Journal

__all__ = ["Verdicts", "read_verdicts"]


class Verdicts:
    """A part of `Store`; it works on the journal alone."""

    journal: Journal

    def keep_verdict(self, version: int, verdict: Verdict) -> None:
        """Note what is decided of the updates of the round that makes a version, in place of what was before."""
        with self.journal.transaction():
            self._put_verdict(version, verdict)

    def forget_verdict(self, version: int) -> None:
        """Note that it is to be decided anew."""
        with self.journal.transaction():
            self.journal.db.execute("DELETE FROM verdicts WHERE version = ?", (version,))

    def verdict(self, version: int) -> Verdict | None:
        """Return what is decided of a round's updates; None if nothing is.

        Raises:
            IntegrityError: the journal does not hold it whole.
        """
        rows = self.journal.rows("SELECT text FROM verdicts WHERE version = ?", version)
        return _read(version, rows[0][0]) if rows else None

    def _put_verdict(self, version: int, verdict: Verdict) -> None:
        """Within a transaction: note what is decided."""
        values = version, verdict.text
        self.journal.db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", values)


def read_verdicts(rows: Callable[[str], list[tuple[Any, ...]]]) -> dict[int, Verdict]:
    """Return a journal's decisions by version; ``rows`` runs a query on it. An older fedcore's has none.

    Raises:
        IntegrityError: the journal does not hold one of them whole.
    """
    if not rows("SELECT 1 FROM sqlite_master WHERE name = 'verdicts'"):
        return {}
    return {
        version: _read(version, text)
        for version, text in rows("SELECT version, text FROM verdicts")
    }


def _read(version: int, text: str) -> Verdict:
    try:
        return Verdict.of_text(text)
    except ValueError as error:
        raise IntegrityError(
            f"run.sqlite: what was decided of the updates of round {version} is damaged: {error}. Put a whole "
            "run.sqlite back from a backup (the models are still there), or give this run another name (run.name)"
        ) from None
