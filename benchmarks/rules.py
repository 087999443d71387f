"""Rules against memcpy of the bytes that they move: median, trimmed mean, and the pass over all pairs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from fedcore import _core
from fedcore._core import MappedFile

from .kernels import inputs_of, rounded, widened

DTYPES = ("F32", "BF16")
RULES = ("median", "trimmed-mean", "pairs")
_HEAD = 200_000
_PART = 8 << 20

Arrays = list[np.ndarray[Any, Any]]


def _trim(count: int) -> int:
    return max(1, count // 4)


def _expected(rule: str, dtype: str, heads: Arrays) -> np.ndarray[Any, Any]:
    """Return what a rule makes of these values by NumPy in binary64, rounded once."""
    values = np.sort(np.stack([widened(dtype, head) for head in heads]), axis=0)
    k = len(heads)
    if rule == "median":
        exact = (values[(k - 1) // 2] + values[k // 2]) / 2
    else:
        trim = _trim(k)
        total = values[trim]
        for value in values[trim + 1 : k - trim]:
            total = total + value
        exact = total / (k - 2 * trim)
    return rounded(dtype, exact)


class Case:
    """Updates in memory, and a rule on them."""

    def __init__(self, rule: str, dtype: str, count: int, size: int) -> None:
        self.rule, self.dtype, self.count = rule, dtype, count
        self.size = size - size % 8
        self.files = [MappedFile.anonymous(self.size) for _ in range(count)]
        for file, values in zip(self.files, inputs_of(dtype, self.size, count), strict=True):
            file.write(0, values.view(np.uint8).data)
        self.out = MappedFile.anonymous(self.size)
        self.squares: list[float] = []

    @property
    def moved(self) -> int:
        """Bytes that are read and written."""
        return (self.count + (self.rule != "pairs")) * self.size

    def run(self, threads: int) -> None:
        places = [0] * self.count
        if self.rule == "pairs":
            of = [(self.dtype, self.size, places)]
            self.squares, _ = _core.pair_distances(self.files, of, threads, lambda _: None)
            return
        options = {"trim": _trim(self.count)} if self.rule == "trimmed-mean" else {}
        rule = (self.rule, options) if options else self.rule
        tensors = [(self.dtype, self.size, places, 0)]
        _core.reduce_files(self.files, [1] * self.count, tensors, self.out, threads, rule=rule)

    def check(self) -> None:
        """Compare what run() left with NumPy.

        Raises:
            ArithmeticError: they differ.
        """
        kind = np.uint16 if self.dtype == "BF16" else np.float32
        values = [np.frombuffer(file.view(), kind) for file in self.files]
        if self.rule == "pairs":
            first, last = (widened(self.dtype, values[i]) for i in (0, -1))
            right = np.isclose(self.squares[self.count - 2], ((first - last) ** 2).sum(), rtol=1e-9)
        else:
            found = np.frombuffer(self.out.view(), kind)[:_HEAD]
            expected = _expected(self.rule, self.dtype, [v[:_HEAD] for v in values])
            right = np.array_equal(found.view(np.uint8), expected.view(np.uint8))
        if not right:
            raise ArithmeticError(f"{self.rule} of {self.dtype} values is wrong")


def _seconds(action: Callable[[], object], threads: int) -> float:
    """Return the processor's seconds for one thread, which other work disturbs less; the clock's for more."""
    clock = time.process_time if threads == 1 else time.perf_counter
    begin = clock()
    action()
    return clock() - begin


def _copy(target: np.ndarray[Any, Any], source: np.ndarray[Any, Any], threads: int) -> None:
    if threads == 1:
        np.copyto(target, source)
        return
    parts = range(0, source.size, _PART)
    with ThreadPoolExecutor(threads) as pool:
        list(
            pool.map(lambda at: np.copyto(target[at : at + _PART], source[at : at + _PART]), parts)
        )


def measure(
    rule: str, dtype: str, count: int, *, size: int, threads: int, repeats: int
) -> dict[str, Any]:
    """Return GB a second that a rule moves, and that memcpy does in turns with it.

    What is moved: each update once, and the result. The share is the median of those of the turns.

    Raises:
        ArithmeticError: the result is not what NumPy computes.
    """
    case = Case(rule, dtype, count, size)
    case.run(threads)
    case.check()
    source, target = np.ones(case.moved // 2, np.uint8), np.zeros(case.moved // 2, np.uint8)
    _copy(target, source, threads)
    times = []
    for _ in range(repeats):
        copied = _seconds(lambda: _copy(target, source, threads), threads)
        times.append((copied, _seconds(lambda: case.run(threads), threads)))
    copied, made = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "rule": rule,
        "trim": _trim(count) if rule == "trimmed-mean" else None,
        "simd": _core.simd_level(),
        "dtype": dtype,
        "updates": count,
        "bytes_each": case.size,
        "threads": threads,
        "read_gb_s": count * case.size / made / 1e9,
        "moved_gb_s": case.moved / made / 1e9,
        "memcpy_moved_gb_s": case.moved / copied / 1e9,
        "moved_over_memcpy_moved": statistics.median(c / m for c, m in times),
    }


def sweep(
    size: int, counts: tuple[int, ...], threads: tuple[int, ...], repeats: int
) -> list[dict[str, Any]]:
    """Measure every rule on fp32 and bf16, on every instruction set that this processor has."""
    before, rows = _core.simd_level(), []
    try:
        for level in _core.simd_levels():
            _core.set_simd_level(level)
            rows += [
                measure(rule, dtype, count, size=size, threads=number, repeats=repeats)
                for rule in RULES
                for dtype in DTYPES
                for count in counts
                for number in threads
            ]
    finally:
        _core.set_simd_level(before)
    return rows
