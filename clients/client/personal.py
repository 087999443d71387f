"""An adapter of which A is shared and B stays at its site (FedSA-LoRA: Guo et al. 2024).

Each site trains both. Its update holds A. The global model has a B, too: that of the first model, with which each
site begins. From then on a site scores and trains each global model with the B that it had trained itself. That is
kept in the run's work folder, by round, so that a process which is started again goes on with the same one.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from torch import nn

from fedcore._core import Layout
from fedcore.adapters.groups import find_groups
from fedcore.errors import FedcoreError
from fedcore.layout import TensorSpec
from fedcore.model_file import create_model, open_model
from fedcore.site.session import GlobalModel
from fedcore.site.work import TRAINER

from .parameters import Joined, ModelParameters

__all__ = ["Kept", "PersonalParameters"]

_NAME: Final = f"{TRAINER}own-"
_KEPT: Final = 2
"""The rounds that are kept: a process that was killed may have to train the last one again."""

logger = logging.getLogger("fedcore.client")

Kept = dict[int, Mapping[str, memoryview]]
"""Raw bytes of the factors B of a site, by name, for each round in which they were trained."""


class PersonalParameters(ModelParameters):
    """The travelling tensors of a PEFT model whose factors B stay where they are trained.

    Args:
        model, joined: see `ModelParameters`.
        kept: the site's, in this process; a script may make its model anew in each round.
    """

    def __init__(self, model: nn.Module, joined: Joined | None, kept: Kept) -> None:
        super().__init__(model, joined)
        self._rounds = kept
        self._own: Mapping[str, memoryview] = {}

    def begin(self, task: GlobalModel, folder: Path | None) -> None:
        """Take up the B that this site had when a global model was made; the global one's in the first round."""
        if not self._rounds and folder is not None:
            self._rounds.update(self._read(folder))
        rounds = [round_ for round_ in self._rounds if round_ <= task.version]
        self._own = self._rounds[max(rounds)] if rounds else {}

    def load(self, specs: Sequence[TensorSpec], tensors: Mapping[str, memoryview]) -> None:
        """Copy a global model into the model, but for what is this site's own.

        Raises:
            LayoutError: it does not fit; each tensor that does not is named.
        """
        super().load(specs, tensors)
        if self._own:
            own = [spec for spec in self.specs if spec[0] in self._own]
            self._fill(own, self._own)

    def keep(self, task: GlobalModel, folder: Path | None) -> None:
        """Keep the B that was trained in a round, and forget that of the rounds before the last.

        One that is not finite is not kept: each later round would be trained from it.
        """
        names = [group.b for group in find_groups(self.specs)[0]]
        if not all(bool(torch.isfinite(self._tensors[name]).all()) for name in names):
            logger.warning(
                "round %d: training has made a factor B that is not finite; this site goes on with the one before",
                task.round,
            )
            return
        self._rounds[task.round] = {name: memoryview(bytes(self.read(name))) for name in names}
        if folder is not None:
            try:
                self._write(folder, task.round)
            except (FedcoreError, OSError) as error:
                logger.warning(
                    "round %d: factor B is not kept on disk should this process be started again: %s: set "
                    "FEDCORE_WORK to a folder with more room", task.round, error,
                )  # fmt: skip
        for round_ in sorted(self._rounds)[:-_KEPT]:
            del self._rounds[round_]
            if folder is not None:
                _path(folder, round_).unlink(missing_ok=True)

    def _write(self, folder: Path, round_: int) -> None:
        values = self._rounds[round_]
        layout = Layout([(n, d, list(s)) for n, d, s in self.specs if n in values])
        partial = folder / f".{_NAME}partial"
        try:
            partial.unlink(missing_ok=True)
            create_model(partial, layout).fill(lambda name: values[name])
            partial.rename(_path(folder, round_))
        finally:
            partial.unlink(missing_ok=True)

    def _read(self, folder: Path) -> Kept:
        """Return what an earlier process kept, by round; nothing of another model."""
        wanted = {name: (dtype, list(shape)) for name, dtype, shape in self.specs}
        found: Kept = {}
        for path in folder.glob(f"{_NAME}*.safetensors"):
            try:
                file = open_model(path)
            except FedcoreError:
                continue  # a power failure left it in parts: the site begins with the global one's
            if all(wanted.get(n) == (d, list(s)) for n, d, s, *_ in file.layout.tensors):
                views = file.views()
                found[int(path.stem.removeprefix(_NAME))] = {
                    n: memoryview(bytes(views[n])) for n in views
                }
        return found


def _path(folder: Path, round_: int) -> Path:
    return folder / f"{_NAME}{round_:04d}.safetensors"
