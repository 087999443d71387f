"""Which tensors of adapters an update holds: pure functions, which the server and each site ask.

A LoRA adapter adds s B A to a module's weight. The mean of the factors B times that of the factors A is not the
mean of the products (``factors`` combines them all the same, and says how far it is off). Where one factor is the
same at all sites, the mean of the other is exact. So a round trains one of the two, and the other stays as the
global model has it:

- ``freeze-a``: B is trained in each round (FFA-LoRA: Sun et al. 2024, section 3).
- ``alternate``: B in odd rounds, A in even ones (RoLoRA: Chen et al. 2025, section 4).

An update holds what is trained. What it does not hold stays as it was.

Or both are trained, and A alone is shared (``share-a``, FedSA-LoRA: Guo et al. 2024): each site keeps a B of its
own.

Or the products themselves are combined (``exact``). Then the sites' adapters may differ in rank and scale, and
the global model has a form of its own: of each adapted module the whole effect, as factors of rank p in binary32,
whose scale is 1. An update holds a site's factors in its own rank, in binary32, with the scale in B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from fedcore._core import Layout
from fedcore.errors import LayoutError
from fedcore.layout import TensorSpec, table
from fedcore.protocol import LoraMethod
from fedcore.roles import Pairs

__all__ = ["Forms", "fixed_tensors", "ranks_of", "update_form", "version_form", "with_ranks"]

_FACTOR: Final = "F32"
_MATRIX: Final = 2


def fixed_tensors(method: LoraMethod, round_: int, pairs: Pairs) -> frozenset[str]:
    """Return the names of the factors that a round leaves as they are in the global model.

    Args:
        method: how factors are combined.
        round_: from 1; 0 stands for the initial model, which holds all.
        pairs: the names of A and B of each adapted module.
    """
    if round_ == 0 or method in ("factors", "exact"):
        return frozenset()
    fixes_a = method == "freeze-a" or (method == "alternate" and round_ % 2 == 1)
    return frozenset(a if fixes_a else b for a, b in pairs)


def update_form(
    method: LoraMethod, round_: int, tensors: Iterable[TensorSpec], pairs: Pairs
) -> Sequence[TensorSpec]:
    """Return what an update of a round holds of the model's ``tensors``; arguments as `fixed_tensors` has them."""
    fixed = fixed_tensors(method, round_, pairs)
    return [spec for spec in tensors if spec[0] not in fixed]


def version_form(tensors: Iterable[TensorSpec], pairs: Pairs, max_rank: int) -> list[TensorSpec]:
    """Return what the global model of ``exact`` holds, from what a site's update holds.

    It does not depend on the site's rank: the model's is the least of ``max_rank``, the rows and the columns.

    Args:
        tensors: of an update.
        pairs: the names of A and B of each adapted module.
        max_rank: the highest rank of the model.

    Raises:
        LayoutError: a factor is no matrix of F32, or its rank is above ``max_rank``.
    """
    shapes = {name: (dtype, list(shape)) for name, dtype, shape in tensors}
    for a, b in pairs:
        for name in (a, b):
            dtype, shape = shapes[name]
            if dtype != _FACTOR or len(shape) != _MATRIX:
                raise LayoutError(
                    f"tensor {name!r} is {dtype} of shape {shape}: aggregation.lora = 'exact' takes factors that "
                    f"are matrices of {_FACTOR}"
                )
        (rank, columns), rows = shapes[a][1], shapes[b][1][0]
        if rank > max_rank:
            raise LayoutError(
                f"tensor {a!r} has rank {rank}, and aggregation.max_rank is {max_rank}: take a lower rank at the "
                "site, or a higher max_rank"
            )
        most = min(max_rank, rows, columns)
        shapes[a], shapes[b] = (_FACTOR, [most, columns]), (_FACTOR, [rows, most])
    return [(name, dtype, shape) for name, (dtype, shape) in shapes.items()]


def ranks_of(tensors: Iterable[TensorSpec], pairs: Pairs) -> list[int]:
    """Return the rank of each pair of factors."""
    shapes = {name: shape for name, _, shape in tensors}
    return [shapes[a][0] for a, _ in pairs]


def with_ranks(
    tensors: Iterable[TensorSpec], pairs: Pairs, ranks: Sequence[int]
) -> list[TensorSpec]:
    """Return the tensors with other ranks, one for each pair of factors."""
    axes: Mapping[str, tuple[int, int]] = {
        name: (axis, rank)
        for pair, rank in zip(pairs, ranks, strict=True)
        for axis, name in enumerate(pair)
    }
    found: list[TensorSpec] = []
    for name, dtype, shape in tensors:
        whole = list(shape)
        if name in axes:
            axis, rank = axes[name]
            whole[axis] = rank
        found.append((name, dtype, whole))
    return found


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
        """Return the names of the tensors that a site does not train in a round."""
        return frozenset() if self._method == "share-a" else self.absent(round_)

    def absent(self, round_: int) -> frozenset[str]:
        """Return the names of the tensors that an update does not hold."""
        if self._method is None:
            return frozenset()
        return fixed_tensors(self._method, round_, self._pairs)

    def layout(self, model: Layout, round_: int) -> Layout:
        """Return the layout of a round's update; the model's own, the same object, where it holds all of it."""
        fixed = self.absent(round_)
        if self._method is None or not fixed:
            return model
        if self._model is not model:
            self._model, self._made = model, {}
        if fixed not in self._made:
            form = update_form(self._method, round_, table(model), self._pairs)
            self._made[fixed] = Layout([(n, d, list(s)) for n, d, s in form], model.chunk_bytes)
        return self._made[fixed]
