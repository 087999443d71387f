"""What a ``transformers.Trainer`` keeps on the site's disk, for a process that is started again.

``FOLDER/trainer-ROUND`` holds the trainer's state (``trainer_state.json``), the place in the data with the random
states (``place.state``), and optimiser, schedule and scaler under the names of the trainer's own checkpoints. It
is written under another name and renamed. It goes once the update of a later round is recorded. Nothing of it
leaves the site.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from fedcore.site.work import TRAINER

from .state_file import read_state, write_state

__all__ = ["KeptRounds", "Place"]

_SMALL_BYTES: Final = 1 << 30  # what optimiser state is kept unasked
_STATE: Final = "trainer_state.json"
_PLACE: Final = "place.state"

logger = logging.getLogger("fedcore.client")


@dataclass
class Place:
    """Where the next round goes on.

    Attributes:
        steps: optimiser steps so far.
        epoch, batches: passes over the data so far, and batches of the pass that is under way.
        batch_size: rows of a batch of one process.
        seed: of the order of the data.
        random: the generators at the end of the last round.
        epoch_random: the generators when the pass began, which decide its order; None: none is under way.
    """

    steps: int
    epoch: int
    batches: int
    batch_size: int
    seed: int
    random: dict[str, Any] | None = None
    epoch_random: dict[str, Any] | None = None


class KeptRounds:
    """The folders of one site's rounds.

    Args:
        trainer: whose state is kept.
        keep: whether optimiser and schedule are; None: where the optimiser's state takes at most 1 GiB.
        folder: where; None: nothing is kept.
    """

    def __init__(self, trainer: Any, keep: bool | None, folder: Path | None) -> None:
        self._trainer = trainer
        self._keep = keep
        self._folder = folder
        self._said = False
        self.last: Path | None = None

    def find(self, round_: int) -> tuple[Place, Any] | None:
        """Return the place and the ``TrainerState`` that were kept before ``round_``; None if there are none."""
        from transformers import TrainerState

        for path in reversed(self._folders()):
            if int(path.name.removeprefix(TRAINER)) >= round_:
                continue  # of a round that is trained again
            try:
                values = read_state(path / _PLACE)
                found = Place(**values), TrainerState.load_from_json(str(path / _STATE))
            except Exception as error:
                logger.warning("what the trainer kept in %s is not used: %s", path, error)
                continue
            self.last = path
            return found
        return None

    def save(self, round_: int, place: Place) -> None:
        """Keep what the trainer holds now that it has trained ``round_``."""
        if self._folder is None:
            return
        partial = self._folder / f"{TRAINER}partial"
        path = self._folder / f"{TRAINER}{round_:08d}"
        try:
            for old in (partial, path):
                shutil.rmtree(old, ignore_errors=True)
            partial.mkdir(mode=0o700)
            self._trainer.state.save_to_json(str(partial / _STATE))
            write_state(partial / _PLACE, asdict(place))
            if self._keeps_optimizer():
                self._trainer._save_optimizer_and_scheduler(str(partial))
                self._trainer._save_scaler(str(partial))
            partial.rename(path)
            self.last = path
        except (OSError, RuntimeError, TypeError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            logger.warning(
                "optimiser and schedule are not kept should this process be started again: %s",
                error,
            )

    def settle(self) -> None:
        """Remove what earlier rounds have kept: the update of the last one is recorded."""
        for path in self._folders():
            if path != self.last:
                shutil.rmtree(path, ignore_errors=True)

    def load_optimizer(self, load: Any) -> bool:
        """Load optimiser and schedule by the trainer's own method; False if they were not kept or do not fit."""
        if self.last is None or not (self.last / "optimizer.pt").is_file():
            return False
        try:
            load(str(self.last))
        except Exception as error:
            logger.warning("the optimiser that was kept does not fit, so it begins anew: %s", error)
            return False
        return True

    def _folders(self) -> list[Path]:
        if self._folder is None:
            return []
        return sorted(
            path
            for path in self._folder.glob(f"{TRAINER}*")
            if path.name.removeprefix(TRAINER).isdigit()
        )

    def _keeps_optimizer(self) -> bool:
        if self._keep is not None:
            return self._keep
        size = state_bytes(self._trainer.optimizer)
        if size > _SMALL_BYTES and not self._said:
            self._said = True
            logger.warning(
                "the optimiser's state takes %.1f GB and is not kept on disk: should this process be started "
                "again, its optimiser begins anew; fl.patch(trainer, keep_state=True) keeps it",
                size / 1e9,
            )
        return size <= _SMALL_BYTES


def state_bytes(optimizer: Any) -> int:
    """Return what an optimiser's state takes."""
    values = [value for state in optimizer.state.values() for value in dict(state).values()]
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))
