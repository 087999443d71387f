"""The mean kernels against memcpy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fedcore import _core
from fedcore.layout import ITEMSIZE

DTYPES = ("F32", "BF16", "F16", "F64")
_HEAD = 1_000_000
_NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16}


def _median(action: Callable[[], object], repeats: int) -> float:
    """Return the median of this thread's processor seconds, which other work disturbs less than the clock."""
    times = []
    for _ in range(repeats + 1):
        begin = time.thread_time()
        action()
        times.append(time.thread_time() - begin)
    return statistics.median(times[1:])


def inputs_of(dtype: str, size: int, count: int) -> list[np.ndarray[Any, Any]]:
    """Return random updates of `size` bytes each; BF16 as its 16-bit words."""
    values = [np.random.default_rng(i).standard_normal(size // 8 + 1) for i in range(count)]
    if dtype == "BF16":  # the upper halves of fp32
        return [np.resize(_bf16_bits(v), size // 2) for v in values]
    return [np.resize(v.astype(_NUMPY[dtype]), size // ITEMSIZE[dtype]) for v in values]


def _bf16_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the bits of the nearest bfloat16 values, ties to even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(
        np.uint16
    )


def _expected(
    dtype: str, inputs: list[np.ndarray[Any, Any]], weights: list[int]
) -> np.ndarray[Any, Any] | None:
    """Return the mean of the first values by NumPy in fp64, rounded once; None for fp64 itself."""
    if dtype == "F64":
        return None
    heads = [widened(dtype, x[:_HEAD]) for x in inputs]
    total = sum(w * x for w, x in zip(weights, heads, strict=True))
    return rounded(dtype, np.asarray(total) / sum(weights))


def widened(dtype: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return values as fp64 numbers."""
    if dtype == "BF16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


def rounded(dtype: str, exact: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return fp64 numbers rounded once to a dtype."""
    if dtype != "BF16":
        return exact.astype(_NUMPY[dtype])
    # Through fp32 would round twice: round the fp64 value to odd at fp32 first, then to bfloat16.
    near = exact.astype(np.float32)
    bits = near.view(np.uint32).copy()
    above = np.abs(near.astype(np.float64)) > np.abs(exact)
    inexact = near.astype(np.float64) != exact
    bits[above] -= 1
    bits[inexact] |= 1
    return _bf16_bits(bits.view(np.float32))


def numpy_mean(
    dtype: str,
    inputs: list[np.ndarray[Any, Any]],
    weights: list[int],
    out: np.ndarray[Any, Any],
) -> None:
    _core.mean(dtype, [values.data for values in inputs], weights, out.data)


def validate(dtype: str, inputs: list[np.ndarray[Any, Any]], weights: list[int]) -> None:
    """Compare the kernel in use with NumPy, and the mean of equal inputs with the input.

    Raises:
        ArithmeticError: they differ.
    """
    out = np.empty_like(inputs[0])
    numpy_mean(dtype, inputs, weights, out)
    expected = _expected(dtype, inputs, weights)
    if expected is not None and not np.array_equal(
        out[:_HEAD].view(np.uint8), expected.view(np.uint8)
    ):
        raise ArithmeticError(f"the mean of {dtype} values is wrong")
    if expected is None and not np.allclose(
        out[:_HEAD], np.average([x[:_HEAD] for x in inputs], axis=0, weights=weights), 1e-12, 1e-14
    ):
        raise ArithmeticError(f"the mean of {dtype} values is wrong")
    numpy_mean(dtype, [inputs[0]] * len(inputs), weights, out)
    if not np.array_equal(out.view(np.uint8), inputs[0].view(np.uint8)):
        raise ArithmeticError(f"equal {dtype} inputs do not average to themselves")


def measure(size: int, count: int, dtype: str, repeats: int) -> dict[str, Any]:
    """Return GB per processor second of input bytes on one core, and of a copy of the same bytes by memcpy."""
    size -= size % 8
    weights = [3 + i for i in range(count)]
    inputs = inputs_of(dtype, size, count)
    validate(dtype, inputs, weights)
    out = np.empty_like(inputs[0])
    copies = [_median(lambda: np.copyto(out, inputs[0]), repeats)]
    mean = _median(lambda: numpy_mean(dtype, inputs, weights, out), repeats)
    copies.append(_median(lambda: np.copyto(out, inputs[0]), repeats))
    copy = statistics.median(copies)
    return {
        "simd": _core.simd_level(),
        "dtype": dtype,
        "inputs": count,
        "bytes_each": size,
        "mean_read_gb_s": count * size / mean / 1e9,
        "memcpy_read_gb_s": size / copy / 1e9,
        "mean_moved_over_memcpy_moved": (count + 1) * size / mean / (2 * size / copy),
    }


def sweep(size: int, count: int, repeats: int) -> list[dict[str, Any]]:
    """Measure every dtype on every instruction set that this processor has."""
    before = _core.simd_level()
    rows = []
    try:
        for level in _core.simd_levels():
            _core.set_simd_level(level)
            rows += [measure(size, count, dtype, repeats) for dtype in DTYPES]
    finally:
        _core.set_simd_level(before)
    return rows
