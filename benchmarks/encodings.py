"""The encodings of updates: how much less travels, what is lost, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedcore._core import Codec, Layout
from fedcore.errors import ProtocolError

from .report import MIB

SCHEMES: Final = ("raw", "bf16", "fp16", "int8", "nf4", "top-k")
TOP_K: Final = 0.01
_ROWS: Final = 1024
_BOUND: Final = {"bf16": 2.0**-8, "fp16": 2.0**-11, "int8": 0.5 / 127 * 1.001, "nf4": 0.17}

Flat = NDArray[np.uint8]
Floats = NDArray[np.float32]


def _bf16(values: Floats) -> Flat:
    """Return the nearest bfloat16 values, ties to even."""
    bits = values.view(np.uint32).astype(np.uint64)
    words = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return words.astype(np.uint16).view(np.uint8)


def _floats(flat: Flat, dtype: str) -> Floats:
    if dtype == "F32":
        return flat.view(np.float32)
    return (flat.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _weights(count: int, seed: int) -> tuple[Floats, Floats]:
    """Return weights as a layer has them, and a round's change of them.

    Each row has a scale of its own (log-normal); weights are normal, changes heavy-tailed (Student's t with four
    degrees of freedom) and fifty times smaller.
    """
    dice = np.random.default_rng(seed)
    scale = np.repeat(dice.lognormal(np.log(0.02), 0.4, -(-count // _ROWS)), _ROWS)[:count]
    weights = dice.standard_normal(count) * scale
    change = dice.standard_t(4, count) * scale / 50
    return weights.astype(np.float32), change.astype(np.float32)


def _adapters(count: int, seed: int) -> tuple[Floats, Floats]:
    """Return LoRA factors after some rounds, A beside B, and a round's change of them.

    A is uniform and moves little, B began at zero and is of the size of its changes.
    """
    dice = np.random.default_rng(seed)
    half = count // 2
    a = dice.uniform(-1, 1, half) / np.sqrt(_ROWS)
    b = dice.standard_t(4, count - half) * 2e-3
    change = np.concatenate(
        [dice.standard_t(4, half) * 3e-4, dice.standard_t(4, count - half) * 1e-3]
    )
    return np.concatenate([a, b]).astype(np.float32), change.astype(np.float32)


TENSORS: Final[dict[str, tuple[str, Callable[[int, int], tuple[Floats, Floats]]]]] = {
    "all weights, fp32": ("F32", _weights),
    "all weights, bf16": ("BF16", _weights),
    "LoRA, fp32": ("F32", _adapters),
}


class Work:
    """One kind of tensors as a site has them after training, and the base that both sides have."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.dtype, make = TENSORS[name]
        count = max(1, size // (4 if self.dtype == "F32" else 2))
        base, change = make(count, 0)
        into = _bf16 if self.dtype == "BF16" else lambda x: x.view(np.uint8)
        self.base: Flat = into(base)
        self.local: Flat = into(base + change)
        self.layout = Layout([("w", self.dtype, [count])], MIB)
        self.parts = [
            slice(at, at + nbytes)
            for at, nbytes in map(self.layout.chunk_range, range(self.layout.chunk_count))
        ]

    def encode(self, codec: Codec) -> list[tuple[int, bytes]]:
        """Return every chunk's encoding and body."""
        return [codec.encode(i, self.local[p], self.base[p]) for i, p in enumerate(self.parts)]

    def encode_only(self, codec: Codec) -> None:
        """Encode every chunk and let go of it, as one that is written to a file."""
        for index, part in enumerate(self.parts):
            codec.encode(index, self.local[part], self.base[part])

    def decode(self, codec: Codec, chunks: list[tuple[int, bytes]], out: Flat) -> None:
        """Write what the chunks stand for."""
        for index, (part, (encoding, body)) in enumerate(zip(self.parts, chunks, strict=True)):
            codec.decode(index, encoding, body, out[part], self.base[part])


def validate(work: Work, scheme: str, chunks: list[tuple[int, bytes]], out: Flat) -> None:
    """Compare what the chunks stand for with the tensors, and see that a damaged chunk is refused.

    Raises:
        ArithmeticError: an element is farther off than its encoding allows.
    """
    want, got, base = (_floats(flat, work.dtype) for flat in (work.local, out, work.base))
    change, lost = want - base, np.abs(want.astype(np.float64) - got)
    ulp = np.spacing(np.maximum(np.abs(want), np.abs(got))) * (1 if work.dtype == "F32" else 2**16)
    if scheme == "raw" or (scheme in ("bf16", "fp16") and work.dtype == "BF16"):
        right = out.tobytes() == work.local.tobytes()
    elif scheme == "top-k":
        kept = got != base
        share = kept.sum() / len(kept)
        right = bool((lost[kept] <= ulp[kept]).all()) and 0.5 * TOP_K < share <= 1.01 * TOP_K
    else:
        # The blocks of int8 and nf4 have a scale each; the casts' errors go with each value.
        block = {"int8": 128, "nf4": 64}.get(scheme, 1)
        padded = np.zeros(-(-len(change) // block) * block, np.float32)
        padded[: len(change)] = np.abs(change)
        largest = np.repeat(padded.reshape(-1, block).max(axis=1), block)[: len(change)]
        right = bool((lost <= _BOUND[scheme] * largest + 2 * ulp + 2.0**-25).all())
    if not right:
        raise ArithmeticError(f"{scheme}: {work.name} are not what was encoded")
    codec = Codec(work.layout, scheme, True, TOP_K)
    encoding, body = chunks[0]
    try:
        codec.decode(0, encoding, body[:-1], out[work.parts[0]].copy(), work.base[work.parts[0]])
    except ProtocolError:
        return
    raise ArithmeticError(f"{scheme}: a chunk without its last byte was decoded")


def _best(action: Callable[[], object], repeats: int) -> float:
    """Return the least CPU time of some runs: others' work on the machine only adds to it."""
    times = []
    for _ in range(repeats):
        begin = time.thread_time()
        action()
        times.append(time.thread_time() - begin)
    return min(times)


def measure(work: Work, scheme: str, lossless: bool, repeats: int) -> dict[str, Any]:
    """Return ratio, relative RMS error of the change, and GB of flat bytes per second of CPU time on one core."""
    codec = Codec(work.layout, scheme, lossless, TOP_K)
    out = np.empty_like(work.local)
    chunks = work.encode(codec)
    work.decode(codec, chunks, out)
    validate(work, scheme, chunks, out)
    want, got, base = (
        _floats(f, work.dtype).astype(np.float64) for f in (work.local, out, work.base)
    )
    size = len(work.local)
    return {
        "tensors": work.name,
        "bytes": size,
        "update": scheme,
        "lossless": lossless,
        "ratio": size / sum(len(body) for _, body in chunks),
        "relative_rms_error": float(
            np.sqrt(np.mean((got - want) ** 2) / np.mean((want - base) ** 2))
        ),
        "packed_chunks": sum(encoding >= 0x80 for encoding, _ in chunks) / len(chunks),
        "encode_gb_s": size / _best(lambda: work.encode_only(codec), repeats) / 1e9,
        "decode_gb_s": size / _best(lambda: work.decode(codec, chunks, out), repeats) / 1e9,
    }


def sweep(size: int, repeats: int) -> list[dict[str, Any]]:
    """Measure every encoding of every kind of tensors, compressed on top or not."""
    rows = []
    for name in TENSORS:
        work = Work(name, size)
        for scheme in SCHEMES:
            for lossless in (False, True):
                if not (lossless and scheme == "top-k"):  # which is never compressed
                    rows.append(measure(work, scheme, lossless, repeats))
    return rows
