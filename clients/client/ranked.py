"""What travels of an adapter whose rank is the site's own, in a run that combines products of factors.

The update holds both factors of each adapted module in binary32, in the site's rank, with the scale in B. The
global model holds the whole effect in a higher rank. What is beyond the site's rank lies in the layers meanwhile;
see `own_rank`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fedcore.adapters.forms import version_form
from fedcore.errors import LayoutError
from fedcore.layout import TensorSpec, compare_layouts
from fedcore.protocol import LoraMethod
from fedcore.roles import Pairs
from fedcore.site.received import Received
from fedcore.site.session import GlobalModel

from .own_rank import OwnRank, drop_remainders
from .parameters import Joined, ModelParameters, from_view, raw_bytes
from .sharding import put

__all__ = ["RankedParameters", "forget_ranks"]

_FACTOR = "F32"
_of_models: weakref.WeakKeyDictionary[nn.Module, tuple[OwnRank, Pairs]] = (
    weakref.WeakKeyDictionary()
)


class RankedParameters(ModelParameters):
    """The travelling tensors of a PEFT model whose adapter is combined with others of other ranks.

    A model without an adapter has none to combine; the server says so to its site.
    """

    def __init__(self, model: nn.Module, joined: Joined | None, max_rank: int) -> None:
        super().__init__(model, joined)
        self._max_rank = max_rank
        self._seed = 0
        self._own: OwnRank | None = None
        self._pairs: Pairs = ()
        known = _of_models.get(self._root)
        if known is None and (pairs := super().pairs("exact")):
            known = OwnRank(self._root, self._tensors, pairs), pairs
            _of_models[self._root] = known
        if known is not None:
            self._own, self._pairs = known
            factors = {name for pair in self._pairs for name in pair}
            self.specs = [(n, _FACTOR if n in factors else d, s) for n, d, s in self.specs]

    def pairs(self, method: LoraMethod | None) -> Pairs:
        """Return the names of the factors of each module that the adapter changes."""
        return self._pairs if method is not None else ()

    @property
    def model_specs(self) -> Sequence[TensorSpec]:
        """What the global model holds."""
        return version_form(self.specs, self._pairs, self._max_rank)

    def begin(self, task: GlobalModel, folder: Path | None) -> None:  # noqa: ARG002
        """Note the seed of the rows of A that a global model does not fill."""
        self._seed = task.seed

    def read(self, name: str) -> memoryview:
        """Return the raw bytes of a tensor as it is sent."""
        if self._own is not None and name in self._own.names:
            return raw_bytes(self._own.read(name))
        return super().read(name)

    def load(self, specs: Sequence[TensorSpec], tensors: Mapping[str, memoryview]) -> None:
        """Put a global model into the model: its best part into the adapter, the rest beside it.

        Raises:
            LayoutError: it does not fit; each tensor that does not is named.
        """
        difference = compare_layouts(self.model_specs, specs, "this site", "the global model")
        if difference is not None:
            raise LayoutError(f"the global model does not fit this model: {difference}")
        own: dict[str, Any] = {}
        for spec in specs:
            value = from_view(tensors[spec[0]], spec)
            if self._own is not None and spec[0] in self._own.names:
                own[spec[0]] = value.clone()
            else:
                put(self._tensors[spec[0]], value)
        if self._own is not None:
            self._own.load(own, self._seed)
        if isinstance(tensors, Received):
            tensors.release()


def forget_ranks(model: nn.Module) -> None:
    """Take out of a model what an earlier run, which combined products, has put beside its adapter."""
    for module in model.modules():
        _of_models.pop(module, None)
    drop_remainders(model)
