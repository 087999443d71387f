"""What a Lightning trainer keeps of a round on the site's disk, for a process that is started again.

``FOLDER/trainer-ROUND/trainer.state`` holds the loops' counters, the place in the data, the random states, and
optimisers and schedules. It is written under another name and renamed; it goes once the update of a later round is
on its way. Nothing of it leaves the site.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, Final

from fedcore.site.work import TRAINER

from .hf_kept import state_bytes
from .state_file import read_state, write_state

__all__ = ["KeptState"]

_SMALL_BYTES: Final = 1 << 30  # what optimiser state is kept unasked
_FILE: Final = "trainer.state"

logger = logging.getLogger("fedcore.client")


class KeptState:
    """The folders of one site's rounds.

    Args:
        keep: whether optimisers and schedules are kept; None: where their state takes at most 1 GiB.
    """

    def __init__(self, keep: bool | None) -> None:
        self._keep = keep
        self._last: Path | None = None

    def find(self, folder: Path | None, round_: int) -> dict[str, Any] | None:
        """Return what was kept last before ``round_``; None if there is nothing, or it can't be read."""
        for path in reversed(_folders(folder)):
            if int(path.name.removeprefix(TRAINER)) >= round_:
                continue  # of a round that is trained again
            try:
                found: dict[str, Any] = read_state(path / _FILE)
            except Exception as error:
                logger.warning("what the trainer kept in %s is not used: %s", path, error)
                continue
            self._last = path
            return found
        return None

    def save(self, folder: Path | None, round_: int, state: dict[str, Any]) -> None:
        """Keep what the trainer holds at the end of ``round_``."""
        if folder is None:
            return
        partial, path = folder / f"{TRAINER}partial", folder / f"{TRAINER}{round_:08d}"
        try:
            for old in (partial, path):
                shutil.rmtree(old, ignore_errors=True)
            partial.mkdir(mode=0o700)
            write_state(partial / _FILE, state)
            partial.rename(path)
            self._last = path
        except (OSError, RuntimeError, AttributeError, TypeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            logger.warning(
                "the trainer's state is not kept should this process be started again: %s", error
            )

    def settle(self, folder: Path | None) -> None:
        """Remove what earlier rounds have kept: the update of the last one is recorded."""
        for path in _folders(folder):
            if path != self._last:
                shutil.rmtree(path, ignore_errors=True)

    def keeps(self, optimizers: list[Any]) -> bool:
        """Whether the state of these is kept."""
        if self._keep is not None:
            return self._keep
        return sum(map(state_bytes, optimizers)) <= _SMALL_BYTES


def _folders(folder: Path | None) -> list[Path]:
    found = [] if folder is None else folder.glob(f"{TRAINER}*")
    return sorted(path for path in found if path.name.removeprefix(TRAINER).isdigit())
