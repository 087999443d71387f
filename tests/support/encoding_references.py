"""A NumPy reference of the encodings in docs/protocol.md, and tensors to try them on."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedcore._core import Codec, Layout
from fedcore.protocol import UPDATE_ENCODINGS

F32 = NDArray[np.float32]
NUMBER = {name: number for number, name in enumerate(UPDATE_ENCODINGS)}
LOSSY = list(UPDATE_ENCODINGS[1:])
NEGATIVE = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
]
POSITIVE = [
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
BOOK = np.array([*NEGATIVE, 0.0, *POSITIVE], np.float32)
MINIS = np.array(
    [
        (m / 16) * 2.0**-14 if e == 0 else (1 + m / 16) * 2.0 ** (e - 15)
        for e in range(16)
        for m in range(16)
    ],
    dtype=np.float32,
)


def floats(count: int, seed: int = 0, scale: float = 1e-3) -> F32:
    drawn = np.random.default_rng(seed).standard_normal(count) * scale
    most = np.finfo(np.float32).max
    return np.clip(drawn, -most, most).astype(np.float32)


def blocks(values: F32, size: int) -> F32:
    padded = np.zeros(-(-len(values) // size) * size, np.float32)
    padded[: len(values)] = values
    return padded.reshape(-1, size)


# --- The reference: what each encoding of a run of float32 must be, and stand for ---


def reference_bf16(values: F32) -> tuple[bytes, F32]:
    top = np.float32(2.0**127 * (2 - 2.0**-7))
    bits = np.clip(values, -top, top).view(np.uint32).astype(np.uint64)
    words = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return words.tobytes(), (words.astype(np.uint32) << 16).view(np.float32)


def reference_fp16(values: F32) -> tuple[bytes, F32]:
    words = np.clip(values, -65504, 65504).astype(np.float16)
    return words.tobytes(), words.astype(np.float32)


def reference_int8(values: F32) -> tuple[bytes, F32]:
    rows = blocks(values, 128)
    scales = np.minimum(np.abs(rows).max(axis=1) / np.float32(127), np.float32(2.0**121))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = np.where(scales[:, None] > 0, rows / scales[:, None], np.float32(0))
    codes = np.rint(np.clip(ratios, -127, 127)).astype(np.int8)
    decoded = (codes.astype(np.float32) * scales[:, None]).reshape(-1)[: len(values)]
    return scales.tobytes() + codes.tobytes()[: len(values)], decoded


def nearest_mini(value: np.float32) -> int:
    distance = np.abs(MINIS.astype(np.float64) - np.float64(value))
    nearest = np.flatnonzero(distance == distance.min())
    return int(next((i for i in nearest if i % 2 == 0), nearest[0]))


def reference_nf4(values: F32) -> tuple[bytes, F32]:
    rows = blocks(values, 64)
    largest = np.abs(rows).max(axis=1)
    outer = np.array(
        [
            min(group.max() / np.float32(1.9375), np.float32(2.0**127))
            for group in np.split(largest, range(256, len(largest), 256))
        ],
        np.float32,
    )
    per_block = np.repeat(outer, 256)[: len(rows)]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratios = np.where(per_block > 0, largest / per_block, np.float32(0))
        minis = np.array([nearest_mini(r) for r in ratios], np.uint8)
        scales = per_block * MINIS[minis]
        middles = ((BOOK[:-1].astype(np.float64) + BOOK[1:]) / 2).astype(np.float32)
        shares = np.where(scales[:, None] > 0, rows / scales[:, None], np.float32(0))
    codes = np.searchsorted(middles, shares.reshape(-1), side="left")[: len(values)]
    decoded = BOOK[codes] * np.repeat(scales, 64)[: len(values)]
    even = np.append(codes, 0) if len(codes) % 2 else codes
    packed = (even[0::2] | even[1::2] << 4).astype(np.uint8)
    return outer.tobytes() + minis.tobytes() + packed.tobytes(), decoded


def reference_top_k(values: F32, share: float = 0.01) -> tuple[bytes, F32]:
    keep = min(len(values), int(np.ceil(share * len(values))))
    order = np.argsort(-np.abs(values), kind="stable")[:keep]
    kept = np.sort(order[values[order] != 0])
    gaps = b""
    for gap in np.diff(kept, prepend=-1) - 1:
        while gap >= 128:
            gaps += bytes([gap % 128 + 128])
            gap //= 128  # noqa: PLW2901
        gaps += bytes([gap])
    decoded = np.zeros_like(values)
    decoded[kept] = values[kept]
    head = struct.pack("<II", len(kept), len(gaps))
    return head + values[kept].tobytes() + gaps, decoded


REFERENCE: dict[str, Callable[[F32], tuple[bytes, F32]]] = {
    "bf16": reference_bf16,
    "fp16": reference_fp16,
    "int8": reference_int8,
    "nf4": reference_nf4,
    "top-k": reference_top_k,
}


def one_run(count: int) -> Layout:
    return Layout([("w", "F32", [count])], 1 << 20)


def trip(codec: Codec, values: F32, base: F32 | None = None) -> tuple[int, bytes, F32]:
    number, body = codec.encode(0, values, base)
    out = np.empty_like(values)
    codec.decode(0, number, body, out, base)
    return number, body, out


def mixed_layout() -> Layout:
    return Layout(
        [
            ("d", "F64", [300]),
            ("f", "F32", [5000]),
            ("i", "I64", [77]),
            ("h", "F16", [900]),
            ("b", "BF16", [333]),
            ("u", "U8", [41]),
            ("t", "BOOL", [9]),
        ],
        4096,
    )


def mixed_bytes(layout: Layout, seed: int) -> NDArray[np.uint8]:
    flat = np.empty(layout.total_bytes, np.uint8)
    rng = np.random.default_rng(seed)
    for _, dtype, _, offset, nbytes in layout.tensors:
        if dtype in ("F64", "F32", "F16"):
            kind = np.dtype({"F64": "f8", "F32": "f4", "F16": "f2"}[dtype])
            part = rng.standard_normal(nbytes // kind.itemsize).astype(kind).view(np.uint8)
        elif dtype == "BF16":
            wide = rng.standard_normal(nbytes // 2).astype(np.float32)
            part = (wide.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            part = rng.integers(0, 256, nbytes).astype(np.uint8)
        flat[offset : offset + nbytes] = part
    return flat


def span(layout: Layout, index: int) -> tuple[int, int]:
    offset, nbytes = layout.chunk_range(index)
    return offset, offset + nbytes
