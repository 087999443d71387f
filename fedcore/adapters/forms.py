"""Which tensors of adapters an update holds: pure functions, which the server and each site ask.

A LoRA adapter adds s B A to a module's weight. The mean of the factors B times that of the factors A is not the
mean of the products. Where one factor is the same at all sites, the mean of the other is exact. So a round trains
one of the two, and the other stays as the global model has it:

- ``freeze-a``: B is trained in each round (FFA-LoRA: Sun et al. 2024, section 3).
- ``alternate``: B in odd rounds, A in even ones (RoLoRA: Chen et al. 2025, section 4).

An update holds what is trained. What it does not hold stays as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedcore._core import Layout
from fedcore.layout import TensorSpec, table
from fedcore.protocol import LoraMethod
from fedcore.roles import Pairs

__all__ = ["Forms", "fixed_tensors", "update_form"]


def fixed_tensors(method: LoraMethod, round_: int, pairs: Pairs) -> frozenset[str]:
    """Return the names of the factors that a round leaves as they are.

    Args:
        method: how factors are combined.
        round_: from 1; 0 stands for the initial model, which holds all.
        pairs: the names of A and B of each adapted module.
    """
    if round_ == 0:
        return frozenset()
    fixes_a = method == "freeze-a" or round_ % 2 == 1
    return frozenset(a if fixes_a else b for a, b in pairs)


def update_form(
    method: LoraMethod, round_: int, tensors: Iterable[TensorSpec], pairs: Pairs
) -> Sequence[TensorSpec]:
    """Return what an update of a round holds of the model's ``tensors``; arguments as `fixed_tensors` has them."""
    fixed = fixed_tensors(method, round_, pairs)
    return [spec for spec in tensors if spec[0] not in fixed]


class Forms:
    """The layouts of updates of one model; each is made once.

    Args:
        method: how factors are combined; None: an update holds the whole model.
        pairs: the names of A and B of each adapted module.
    """

    def __init__(self, method: LoraMethod | None, pairs: Pairs) -> None:
        self._method, self._pairs = method, pairs
        self._model: Layout | None = None
        self._made: dict[frozenset[str], Layout] = {}

    def fixed(self, round_: int) -> frozenset[str]:
        """Return the names of the tensors that a round leaves as they are."""
        if self._method is None:
            return frozenset()
        return fixed_tensors(self._method, round_, self._pairs)

    def layout(self, model: Layout, round_: int) -> Layout:
        """Return the layout of a round's update; the model's own, the same object, where it holds all of it."""
        fixed = self.fixed(round_)
        if self._method is None or not fixed:
            return model
        if self._model is not model:
            self._model, self._made = model, {}
        if fixed not in self._made:
            form = update_form(self._method, round_, table(model), self._pairs)
            self._made[fixed] = Layout([(n, d, list(s)) for n, d, s in form], model.chunk_bytes)
        return self._made[fixed]
