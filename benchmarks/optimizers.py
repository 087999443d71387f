"""Server optimizers against memcpy of the bytes that they move."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from fedcore import _core
from fedcore._core import Finisher, Layout, MappedFile
from fedcore.rules.finishers import FINISHERS

_CHUNK = 1 << 20


def _seconds(action: Callable[[], object]) -> float:
    begin = time.thread_time()
    action()
    return time.thread_time() - begin


def _check(name: str, options: dict[str, float], base: Any, update: Any, out: Any) -> None:
    """Compare a first round of momentum with NumPy; the tests compare all optimizers, bit for bit."""
    if name != "momentum" or base.dtype != np.float32:
        return
    v = (update.astype(np.float64) - base).astype(np.float32).astype(np.float64)
    if not np.array_equal(out, (base + options["learning_rate"] * v).astype(np.float32)):
        raise ArithmeticError("the first round of momentum is wrong")


def measure(name: str, dtype: str, size: int, repeats: int) -> dict[str, Any]:
    """Return GB per processor second that a round of one update moves on one core, and that memcpy does.

    What is moved: the update, the model before and after, and each state before and after. The two take turns.

    Raises:
        ArithmeticError: a first round is not what NumPy computes.
    """
    word: Any = {"F32": np.float32, "BF16": np.uint16}[dtype]
    layout = Layout([("w", dtype, [size // np.dtype(word).itemsize])], _CHUNK)
    options = {key: option.default for key, option in FINISHERS[name].options.items()}
    dice = np.random.default_rng(0)
    values = [dice.standard_normal(layout.tensors[0][2][0]).astype(np.float32) for _ in range(2)]
    base, update = (
        (v.view(np.uint32) >> 16).astype(word) if word == np.uint16 else v for v in values
    )
    out = np.empty_like(base)
    first = Finisher(layout, name, options)
    places = [
        {n: (MappedFile.anonymous(of.total_bytes), 0) for n, of in first.states} for _ in (0, 1)
    ]
    _core.finish_mean(first, [update.data], [1], base.data, out.data, places[0])
    _check(name, options, base, update, out)
    second = Finisher(layout, name, options, set(), places[0])
    states = sum(of.total_bytes for _, of in first.states)
    moved = 3 * layout.total_bytes + 2 * states
    source, target = np.ones(moved // 2, np.uint8), np.empty(moved // 2, np.uint8)
    made, copied = [], []
    for _ in range(repeats + 1):
        copied.append(_seconds(lambda: np.copyto(target, source)))
        made.append(
            _seconds(
                lambda: _core.finish_mean(
                    second, [update.data], [1], base.data, out.data, places[1]
                )
            )
        )
    finish, copy = statistics.median(made[1:]), statistics.median(copied[1:])
    return {
        "optimizer": name,
        "simd": _core.simd_level(),
        "dtype": dtype,
        "bytes": layout.total_bytes,
        "state_bytes": states,
        "moved_gb_s": moved / finish / 1e9,
        "memcpy_moved_gb_s": moved / copy / 1e9,
        "moved_over_memcpy_moved": copy / finish,
    }


def sweep(size: int, repeats: int) -> list[dict[str, Any]]:
    """Measure every optimizer on fp32 and bf16 on every instruction set that this processor has."""
    before, rows = _core.simd_level(), []
    try:
        for level in _core.simd_levels():
            _core.set_simd_level(level)
            rows += [
                measure(name, dtype, size, repeats)
                for name in FINISHERS
                for dtype in ("F32", "BF16")
            ]
    finally:
        _core.set_simd_level(before)
    return rows
