"""Values of every float dtype that rules are tested with, their order, and files that hold them."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from fedcore._core import Layout
from fedcore.model_file import create_model

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def any_bits(dtype: str, seed: int, count: int) -> np.ndarray:
    """Finite numbers of any magnitude and sign, with zeros of both signs, subnormal ones and ties."""
    kind = np.dtype(DTYPES[dtype])
    values = np.frombuffer(np.random.default_rng(seed).bytes(count * kind.itemsize), kind).copy()
    with np.errstate(invalid="ignore"):
        values[~np.isfinite(values.astype(np.float64))] = kind.type(-0.0)
    values[::7] = kind.type(0.0) if seed % 2 else kind.type(-0.0)
    values[3::11] = kind.type(seed // 2)
    return values


def ranked(stack: np.ndarray) -> np.ndarray:
    """The values of each element, a source a row, from the lowest to the highest, -0 below +0."""
    bits = stack.view(f"i{stack.dtype.itemsize}")
    keys = np.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)
    return np.take_along_axis(stack, np.argsort(keys, axis=0, kind="stable"), axis=0)


def write_values(path: Path, dtype: str, values: np.ndarray) -> Path:
    """Write a model of one tensor, ``w``."""
    path.unlink(missing_ok=True)
    model = create_model(path, Layout([("w", dtype, [len(values)])]))
    model.view("w")[:] = values.view(np.uint8).data
    model.file.sync()
    return path
