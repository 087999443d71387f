"""The first model of a run that combines products of factors, in the form that all its models have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from fedcore._core import Layout, recompress
from fedcore.model_file import ModelFile, Reader
from fedcore.roles import Pairs

__all__ = ["first_form"]

_NUMPY: Final = {"F64": "f8", "F32": "f4", "F16": "u2", "BF16": "u2"}


def first_form(
    first: ModelFile, layout: Layout, pairs: Pairs, scales: Mapping[str, float] | None = None
) -> Reader:
    """Return what reads each tensor of a first model as the global model has it.

    The two factors of a pair become B = U S and A = V^T of the singular value decomposition of their product.
    Its best part of rank r is then the first r columns of B times the first r rows of A. A singular value of 0
    has zeros in both. One pair is in memory at a time.

    Args:
        first: what a site has sent, its scale in B, or the file of the run's first model.
        layout: of the global model.
        pairs: the names of A and B of each adapted module.
        scales: what each product, and the bias of its B, is multiplied with, by the name of A; 1 unless given.
    """
    shapes = {name: shape for name, _, shape, *_ in layout.tensors}
    dtypes = {name: dtype for name, dtype, *_ in first.layout.tensors}
    of = {name: pair for pair in pairs for name in pair}
    biases = {b.removesuffix("weight") + "bias": a for a, b in pairs}
    made: dict[str, memoryview] = {}

    def read(name: str) -> memoryview:
        pair = of.get(name)
        if pair is None:
            values = first.view(name)
            if scales is None or name not in biases:
                return values
            return _scaled(values, scales[biases[name]])
        if name not in made:
            made.clear()
            a, b = pair
            scale = 1.0 if scales is None else scales[a]
            rows, columns = shapes[b][0], shapes[a][1]
            of_b, dtype = _matrix(first.view(b), dtypes[b], (rows, -1))
            of_a, _ = _matrix(first.view(a), dtypes[a], (-1, columns))
            found_b, found_a, *_ = recompress([(scale, of_b, of_a, dtype)], shapes[a][0])
            made[b] = _filled(found_b, shapes[b])
            made[a] = _filled(found_a, shapes[a])
        return made[name]

    return read


def _matrix(data: memoryview, dtype: str, shape: tuple[int, int]) -> tuple[Any, str]:
    """Return a factor as the core takes it, with the name of its dtype."""
    import numpy as np  # a server of other runs does without

    return np.frombuffer(data, _NUMPY[dtype]).reshape(shape), dtype


def _scaled(data: memoryview, scale: float) -> memoryview:
    """Return a bias in binary32 times a number, rounded once."""
    import numpy as np

    values = np.frombuffer(data, np.float32).astype(np.float64) * scale
    return memoryview(values.astype(np.float32).tobytes())


def _filled(values: Any, shape: Sequence[int]) -> memoryview:
    """Return a factor in binary32, with zeros for ranks that it lacks; what is too large becomes the largest."""
    import numpy as np

    whole, most = np.zeros(tuple(shape), np.float32), np.finfo(np.float32).max
    whole[: values.shape[0], : values.shape[1]] = np.clip(values, -most, most)
    return memoryview(whole.tobytes())
