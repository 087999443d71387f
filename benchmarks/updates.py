"""A site's whole update as one call encodes it: how fast, of memcpy's rate, and in how much memory."""

from __future__ import annotations

import functools
import itertools
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedcore._core import Codec, Layout, MappedFile, encode_update

from .encodings import TENSORS
from .report import MIB

ENCODINGS: Final = ("int8", "nf4")
_PIECE: Final = 16 * MIB
_COPIED: Final = 64 * MIB


class Update:
    """Values, base, residual, and room for what an encoder writes, in memory or in files of a folder."""

    def __init__(self, size: int, folder: Path | None) -> None:
        count = size // 4
        self.layout = Layout([("w", "F32", [count])], MIB)
        self.size = 4 * count
        self.made = (0, b"")
        self.values, self.base, self.residual, self.lost, self.out = (
            MappedFile.anonymous(self.size)
            if folder is None
            else MappedFile.create(str(folder / name), self.size)
            for name in ("values", "base", "residual", "lost", "out")
        )
        base, change = TENSORS["all weights, fp32"][1](min(count, _PIECE // 4), 0)
        values, residual = (
            array.astype(np.float32, copy=False) for array in (base + change, change / 16)
        )
        for at in range(0, self.size, base.nbytes):
            n = min(len(base), (self.size - at) // 4)
            self.base.write(at, base[:n].data)
            self.values.write(at, values[:n].data)
            self.residual.write(at, residual[:n].data)

    def encode(self, codec: Codec, feedback: bool, threads: int) -> None:
        """Encode all of it; `made` has the number of bytes that travel, and the first chunk of them."""
        residual, lost = (self.residual, self.lost) if feedback else (None, None)
        offsets = encode_update(
            codec, self.values, 0, self.base, 0, self.out, residual, lost, threads
        )[0]
        self.made = offsets[-1], bytes(self.out.view(0, offsets[1]))

    def expected(self, codec: Codec, feedback: bool) -> bytes:
        """Return the first chunk as the codec encodes it alone."""
        _, n = self.layout.chunk_range(0)
        residual = self.residual.view(0, n) if feedback else None
        return codec.encode(0, self.values.view(0, n), self.base.view(0, n), residual)[1]


def peak() -> int:
    """Return the most bytes that this process had in memory since `forget_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> int:
    """Begin to look for the most memory anew; returns the bytes that there are in memory now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def _timed(action: Callable[[], object]) -> tuple[float, float]:
    """Return seconds by the clock and of CPU time, of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(
    size: int, repeats: int, threads: tuple[int, ...] = (1, 2), folder: Path | None = None
) -> list[dict[str, Any]]:
    """Measure each encoding with and without error feedback, in turns with a copy of memory; the fastest of each.

    ``memcpy_share`` is the rate at which the call goes through the bytes that it touches, per second of CPU time,
    of that of the copy: values, base, what travels, and with feedback the residual before and after.
    ``peak_bytes`` is how much more memory the process had during a call than before.

    Raises:
        ArithmeticError: what a call made of the first chunk is not that chunk.
    """
    update = Update(size, folder)
    source, target = (np.ones(_COPIED, np.uint8) for _ in range(2))
    cases = list(itertools.product(ENCODINGS, (False, True), threads))
    rows: dict[tuple[str, bool, int], dict[str, Any]] = {}
    copy = float("inf")
    for _ in range(repeats + 1):  # the first round touches new memory
        for case in cases:
            encoding, feedback, count = case
            codec = Codec(update.layout, encoding)
            copy = min(copy, _timed(lambda: np.copyto(target, source))[1])
            before = forget_peak()
            wall, cpu = _timed(functools.partial(update.encode, codec, feedback, count))
            most = max(0, peak() - before)
            nbytes, first = update.made
            if first != update.expected(codec, feedback):
                raise ArithmeticError(f"{encoding}: the update's first chunk is wrong")
            row = rows.setdefault(case, {"wall": wall, "cpu": cpu, "peak": most})
            touched = (4 if feedback else 2) * update.size + nbytes
            row |= {
                "wall": min(wall, row["wall"]),
                "cpu": min(cpu, row["cpu"]),
                "peak": min(most, row["peak"]),
                "touched": touched,
            }
    return [
        {
            "update": encoding,
            "feedback": feedback,
            "threads": count,
            "bytes": update.size,
            "gb_s": update.size / row["wall"] / 1e9,
            "cpu_gb_s": update.size / row["cpu"] / 1e9,
            "memcpy_gb_s": 2 * _COPIED / copy / 1e9,
            "memcpy_share": row["touched"] / row["cpu"] / (2 * _COPIED / copy),
            "peak_bytes": row["peak"],
        }
        for (encoding, feedback, count), row in rows.items()
    ]
