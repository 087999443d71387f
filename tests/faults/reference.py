"""What an aggregate must be, computed without the core: random layouts, updates, and their mean."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from fedcore._core import Codec, Layout

CHUNK = 4096
TOP_K = 0.1
_STORED = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64,
    "I32": np.int32, "I16": np.int16, "U8": np.uint8, "BOOL": np.uint8,
}  # fmt: skip
DTYPES = list(_STORED)
FLOATS = ("F64", "F32", "F16", "BF16")
# Per float format: the bits of a NaN, of infinity, the largest finite, the smallest subnormal, and -0.0.
SPECIAL_BITS = {
    "F64": (0x7FF8 << 48, 0x7FF0 << 48, 0x7FEF_FFFF_FFFF_FFFF, 1, 1 << 63),
    "F32": (0x7FC00001, 0x7F800000, 0x7F7FFFFF, 1, 1 << 31),
    "F16": (0x7E01, 0xFC00, 0x7BFF, 1, 1 << 15),
    "BF16": (0x7FC1, 0xFF80, 0x7F7F, 1, 1 << 15),
}


def stored(dtype: str) -> type[np.generic]:
    """The NumPy type that holds a dtype's elements; BF16 as its 16 bits."""
    return _STORED[dtype]


def random_layout(dice: random.Random) -> Layout:
    """A few tensors of mixed dtypes in 3 to 12 chunks; an F32 tensor is always among them."""
    tensors: list[tuple[str, str, list[int]]] = [("w", "F32", [dice.randrange(2300, 6000)])]
    for name in "abcd"[: dice.randrange(5)]:
        dtype = dice.choice(list(_STORED))
        size = dice.randrange(0, 120 if dtype == "F64" else 5000)
        tensors.append((name, dtype, [size]))
    return Layout(tensors, CHUNK)


def random_update(layout: Layout, seed: int) -> bytearray:
    """The flat bytes of an update of normal values."""
    generator = np.random.default_rng(seed)
    flat = bytearray(layout.total_bytes)
    for _, dtype, shape, offset, nbytes in layout.tensors:
        count = int(np.prod(shape))
        if dtype == "BF16":
            values = _to_bf16(generator.standard_normal(count))
        elif dtype in FLOATS:
            values = generator.standard_normal(count).astype(stored(dtype))
        else:
            values = generator.integers(0, 2, count).astype(stored(dtype))
        flat[offset : offset + nbytes] = values.tobytes()
    return flat


def mean(
    layout: Layout, updates: Sequence[tuple[int, bytes]], base: bytes | None = None
) -> dict[str, bytes]:
    """The bytes of each tensor of the weighted mean of ``(weight, flat bytes)`` in the given order."""
    out = {}
    for name, dtype, _, offset, nbytes in layout.tensors:
        parts = [update[offset : offset + nbytes] for _, update in updates]
        weights = [weight for weight, _ in updates]
        if dtype not in FLOATS:
            out[name] = bytes(parts[0] if base is None else base[offset : offset + nbytes])
        elif dtype == "F64":
            out[name] = _mean_f64([np.frombuffer(p, np.float64) for p in parts], weights)
        else:
            out[name] = _mean_narrow(dtype, parts, weights)
    return out


def stands_for(layout: Layout, update: bytes, base: bytes, encoding: str) -> bytes:
    """What an encoded update is taken for; tests/core/test_codec.py compares the encodings with NumPy."""
    out = bytearray(update)
    if encoding == "raw":
        return bytes(out)
    codec = Codec(layout, encoding, top_k=TOP_K)
    for index in range(layout.chunk_count):
        at, nbytes = layout.chunk_range(index)
        part = slice(at, at + nbytes)
        sent = codec.encode(index, update[part], base[part])
        codec.decode(index, *sent, memoryview(out)[part], base[part])
    return bytes(out)


def flat(layout: Layout, tensors: Mapping[str, bytes]) -> bytes:
    """The flat bytes of a set of tensors."""
    return b"".join(tensors[name] for name, *_ in layout.tensors)


def _mean_narrow(dtype: str, parts: Sequence[bytes], weights: Sequence[int]) -> bytes:
    """Binary64 sum in order, one division, one rounding (docs/numerics.md)."""
    total = None
    for part, weight in zip(parts, weights, strict=True):
        bits = np.frombuffer(part, stored(dtype))
        wide = (
            (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else bits
        ).astype(np.float64)
        total = wide * weight if total is None else total + wide * weight
    quotient = total / float(sum(weights))
    return (_to_bf16(quotient) if dtype == "BF16" else quotient.astype(stored(dtype))).tobytes()


def _to_bf16(values: np.ndarray) -> np.ndarray:
    """Round binary64 to bfloat16 in one step: through binary32 rounded to odd, which loses no tie."""
    near = values.astype(np.float32)
    inexact = near.astype(np.float64) != values
    bits = near.view(np.uint32) - (np.abs(near.astype(np.float64)) > np.abs(values))
    bits = bits.astype(np.uint32) | inexact.astype(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _mean_f64(parts: Sequence[np.ndarray], weights: Sequence[int]) -> bytes:
    """The rational mean, rounded once; a mean of nothing but -0.0 keeps its sign.

    It is exact up to a sum of weights of 2^53, which is a binary64 number.
    """
    total = Fraction(sum(float(weight) for weight in weights))
    values = []
    for column in zip(*(part.tolist() for part in parts), strict=True):
        exact = sum(w * Fraction(x) for w, x in zip(weights, column, strict=True)) / total
        negative = all(np.signbit(x) for x in column)
        values.append(-0.0 if exact == 0 and negative else float(exact))
    return np.array(values, np.float64).tobytes()
