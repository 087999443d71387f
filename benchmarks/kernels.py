"""The mean kernel against memcpy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fedcore import _core
from fedcore.layout import ITEMSIZE


def _median(action: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def measure(size: int, count: int, dtype: str, repeats: int) -> dict[str, Any]:
    """Return GB/s of input bytes; the first million values are compared with NumPy first."""
    size -= size % ITEMSIZE[dtype]
    weights = [3 + i for i in range(count)]
    values = [np.random.default_rng(i).standard_normal(size // 8 + 1) for i in range(count)]
    kind = {"F64": np.float64, "F32": np.float32, "F16": np.float16}.get(dtype)
    if kind is None:  # bfloat16: the upper halves of fp32
        inputs = [
            np.resize(v.astype(np.float32).view(np.uint16)[1::2], size // 2).copy() for v in values
        ]
    else:
        inputs = [np.resize(v.astype(kind), size // ITEMSIZE[dtype]) for v in values]
    out = np.empty_like(inputs[0])
    _core.mean(dtype, inputs, weights, out)
    head = 1_000_000
    if kind is not None and dtype != "F64":
        exact = sum(w * x[:head].astype(np.float64) for w, x in zip(weights, inputs, strict=True))
        assert np.array_equal(out[:head], (exact / sum(weights)).astype(kind)), "the mean is wrong"
    same = np.empty_like(out)
    _core.mean(dtype, [inputs[0]] * count, weights, same)
    assert np.array_equal(same, inputs[0]), "equal inputs do not average to themselves"
    mean = _median(lambda: _core.mean(dtype, inputs, weights, out), repeats)
    copy = _median(lambda: np.copyto(out, inputs[0]), repeats)
    return {
        "simd": _core.simd_level(),
        "dtype": dtype,
        "inputs": count,
        "bytes_each": size,
        "mean_read_gb_s": count * size / mean / 1e9,
        "memcpy_read_gb_s": size / copy / 1e9,
        "mean_moved_over_memcpy_moved": (count + 1) * size / mean / (2 * size / copy),
    }
