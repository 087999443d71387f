"""Encoded chunks against a NumPy reference of docs/protocol.md, and hostile bodies."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedcore._core import Codec, Layout
from fedcore.errors import ConfigError, LayoutError, NonFiniteError, ProtocolError
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


@pytest.mark.parametrize("encoding", LOSSY)
@settings(max_examples=60, deadline=None)
@given(
    count=st.one_of(st.integers(1, 9), st.integers(10, 40_000)),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-45, 1e-38, 1e-9, 1e-3, 1.0, 3e4, 1e30, 8e37]),
    spread=st.booleans(),
    coarse=st.booleans(),
)
def test_an_encoded_run_is_the_references_bytes_and_values(
    encoding: str, *, count: int, seed: int, scale: float, spread: bool, coarse: bool
) -> None:
    values = floats(count, seed, scale)
    if coarse:  # half of them lie in the middle between two numbers of bf16
        values = (values.view(np.uint32) & 0xFFFF8000).view(np.float32)
    if spread:  # blocks of very different sizes, and whole blocks of zeros
        rng = np.random.default_rng(seed)
        values *= np.repeat(np.exp2(-rng.integers(0, 30, count // 64 + 1)), 64)[:count].astype("f4")
        values[: count // 3] = 0
    expected, decoded = REFERENCE[encoding](values)
    number, body, out = trip(Codec(one_run(count), encoding), values)
    if len(expected) >= values.nbytes:
        assert (number, body) == (0, values.tobytes())
    else:
        assert (number, body) == (NUMBER[encoding], expected)
        np.testing.assert_array_equal(out, decoded)


def test_ties_of_nf4_go_to_the_even_scale_and_the_lower_code() -> None:
    middles = ((BOOK[:-1].astype(np.float64) + BOOK[1:]) / 2).astype(np.float32)
    values = np.zeros(64 * 40, np.float32)
    values[0] = 1.9375  # so the outer scale is 1
    for block in range(1, 16):
        values[64 * block] = (1 + (2 * block + 1) / 32) * 2.0**-block
    expected, _ = reference_nf4(values)
    _, body = Codec(one_run(len(values)), "nf4").encode(0, values)
    assert body == expected
    assert set(body[5:20]) <= set(range(0, 256, 2))
    alone = np.append(np.float32(1), middles)
    _, body = Codec(one_run(16), "nf4").encode(0, alone)
    assert body == reference_nf4(alone)[0]
    assert body[5:].hex() == "0f21436587a9cbed"


@pytest.mark.parametrize("encoding", LOSSY)
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_a_decoded_difference_lands_on_the_base_in_the_dtype_of_the_run(
    encoding: str, dtype: str
) -> None:
    torch = pytest.importorskip("torch")
    kind = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    base = torch.from_numpy(floats(5000, 1, 1.0)).to(getattr(torch, kind))
    values = (base.double() + torch.from_numpy(floats(5000, 2, 0.05))).to(base.dtype)
    codec = Codec(Layout([("w", dtype, [5000])], 1 << 20), encoding, top_k=0.05)
    raw, under = (t.view(torch.uint8).numpy() for t in (values, base))
    number, body = codec.encode(0, raw, under)
    out = torch.empty_like(base)
    codec.decode(0, number, body, out.view(torch.uint8).numpy(), under)
    if encoding in ("bf16", "fp16") and dtype in ("F16", "BF16"):
        assert number == 0
        assert torch.equal(out, values)
        return
    difference = (values.double() - base.double()).float().numpy()
    expected, decoded = (
        reference_top_k(difference, 0.05)
        if encoding == "top-k"
        else REFERENCE[encoding](difference)
    )
    assert body == expected
    assert torch.equal(out, (base.double() + torch.from_numpy(decoded)).to(base.dtype))


@pytest.mark.parametrize(
    ("encoding", "bound", "ratio"),
    [
        ("bf16", 2**-8, 1.999),
        ("fp16", 2**-10, 1.999),
        ("int8", 1 / 250, 3.87),
        ("nf4", 0.16, 7.5),
        ("top-k", 1.0, 60),
    ],
)
def test_the_error_and_the_ratio_are_those_that_the_protocol_promises(
    encoding: str, bound: float, ratio: float
) -> None:
    values = floats(1 << 18)
    _, body, out = trip(Codec(one_run(1 << 18), encoding), values)
    largest = np.abs(blocks(values, 64)).max(axis=1, keepdims=True)
    if encoding == "int8":
        largest = np.repeat(np.abs(blocks(values, 128)).max(axis=1, keepdims=True), 2, axis=0)
    assert (np.abs(blocks(out - values, 64)) <= bound * largest).all()
    assert values.nbytes / len(body) >= ratio


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


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("encoding", ["raw", *LOSSY])
def test_integers_and_booleans_travel_exactly_and_no_chunk_grows(
    encoding: str, lossless: bool
) -> None:
    layout = mixed_layout()
    flat, base = mixed_bytes(layout, 1), mixed_bytes(layout, 2)
    codec = Codec(layout, encoding, lossless)
    out = np.zeros_like(flat)
    for index in range(layout.chunk_count):
        offset, nbytes = layout.chunk_range(index)
        part = slice(offset, offset + nbytes)
        number, body = codec.encode(index, flat[part], base[part])
        assert len(body) <= nbytes
        codec.decode(index, number, body, out[part], base[part])
    for _, dtype, _, offset, nbytes in layout.tensors:
        if encoding == "raw" or dtype in ("I64", "U8", "BOOL"):
            part = slice(offset, offset + nbytes)
            np.testing.assert_array_equal(out[part], flat[part])


def test_lossless_packs_what_shrinks_and_leaves_the_rest_raw() -> None:
    count = 1 << 18
    codec = Codec(one_run(count), "raw", lossless=True)
    noise = np.random.default_rng(3).integers(0, 2**32, count, np.uint32).view(np.float32)
    number, body = codec.encode(0, noise)
    assert (number, len(body)) == (0, noise.nbytes)
    number, body, out = trip(codec, floats(count))
    assert number == 0x80
    assert len(body) <= 0.95 * out.nbytes
    np.testing.assert_array_equal(out, floats(count))


def test_a_chunk_whose_middle_alone_shrinks_stays_raw() -> None:
    count = 1 << 18
    noise = np.random.default_rng(3).integers(0, 2**32, count, np.uint32).view(np.float32)
    noise[count // 2 - 5000 : count // 2 + 5000] = 0
    number, _ = Codec(one_run(count), "raw", lossless=True).encode(0, noise)
    assert number == 0


@pytest.mark.parametrize(("zeros", "packed"), [(45, False), (80, True)])
def test_a_chunk_is_compressed_from_5_percent_on(zeros: int, packed: bool) -> None:
    lz4 = pytest.importorskip("lz4.block")
    count = 1 << 18  # bytes, of which this many in a thousand compress
    data = np.random.default_rng(4).integers(1, 256, count, np.uint8)
    data[np.arange(count) % 1000 < zeros] = 0
    saved = 1 - len(lz4.compress(data.tobytes(), store_size=False)) / count
    assert 0.06 < saved < 0.08 if packed else 0.03 < saved < 0.045
    codec = Codec(Layout([("w", "U8", [count])], 1 << 20), "raw", lossless=True)
    assert codec.encode(0, data)[0] == (0x80 if packed else 0)


def test_a_chunk_whose_middle_does_not_shrink_is_not_tried_any_further() -> None:
    count = 1 << 20
    data = np.zeros(count, np.uint8)
    middle = slice(count // 2 - (48 << 10), count // 2 + (48 << 10))
    data[middle] = np.random.default_rng(3).integers(0, 256, 96 << 10, np.uint8)
    number, _ = Codec(Layout([("w", "U8", [count])], 1 << 20), "raw", lossless=True).encode(0, data)
    assert number == 0


def test_a_packed_encoding_gives_the_values_of_the_plain_one() -> None:
    values = np.repeat(floats(2000), 40)
    plain = trip(Codec(one_run(80_000), "int8"), values)
    packed = trip(Codec(one_run(80_000), "int8", lossless=True), values)
    assert packed[0] == 0x83
    assert len(packed[1]) < len(plain[1])
    np.testing.assert_array_equal(packed[2], plain[2])


def test_every_simd_level_and_a_second_codec_give_the_same_bytes() -> None:
    from fedcore import _core

    before = _core.simd_level()
    layout = mixed_layout()
    flat = mixed_bytes(layout, 1)
    seen = set()
    for level in _core.simd_levels():
        _core.set_simd_level(level)
        bodies = [Codec(layout, "nf4").encode(i, flat[slice(*span(layout, i))]) for i in range(4)]
        seen.add(tuple(bodies))
    _core.set_simd_level(before)
    assert len(seen) == 1


@pytest.mark.parametrize("encoding", ["int8", "nf4"])
@pytest.mark.parametrize("exponent", [-140, -126, -101, -61, -20, 0, 90, 119, 127])
def test_codes_at_a_border_are_those_of_a_division_at_every_simd_level(
    encoding: str, exponent: int
) -> None:
    from fedcore import _core

    dice = np.random.default_rng(exponent + 200)
    reference, width = (reference_int8, 128) if encoding == "int8" else (reference_nf4, 64)
    values = np.zeros((64, width), np.float32)
    values[:, 0] = dice.uniform(1, 2, 64) * 2.0**exponent  # which fix the scales
    made = reference(values.reshape(-1))[0]
    if encoding == "int8":
        scales = np.frombuffer(made[: 4 * 64], np.float32)
        borders = np.arange(-126.5, 127)
    else:
        scales = np.frombuffer(made[:4], np.float32) * MINIS[np.frombuffer(made[4:68], np.uint8)]
        borders = (BOOK[:-1].astype(np.float64) + BOOK[1:]) / 2
    at = (dice.choice(borders, (64, width - 1)) * scales[:, None]).astype(np.float32)
    beside = at.view(np.int32) + dice.integers(-2, 3, at.shape, np.int32)
    values[:, 1:] = np.where(at == 0, at, beside.view(np.float32))
    flat = values.reshape(-1)[:-3]
    expected, _ = reference(flat)
    before = _core.simd_level()
    for level in _core.simd_levels():
        _core.set_simd_level(level)
        _, body = Codec(one_run(len(flat)), encoding).encode(0, flat.view(np.uint8).data)
        assert body == expected, level
    _core.set_simd_level(before)


@pytest.mark.parametrize("encoding", ["int8", "nf4", "top-k"])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_every_simd_level_adds_differences_to_the_base_with_the_same_bits(
    dtype: str, encoding: str
) -> None:
    from fedcore import _core

    size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[dtype]
    count = (1 << 16) + 13
    dice = np.random.default_rng(count)
    if size == 2:  # every number there is, and a rest that fills no register
        exponent = {"F16": 0x7C00, "BF16": 0x7F80}[dtype]
        bits = (np.arange(count) & 0xFFFF).astype(np.uint16)
        base = np.where(bits & exponent == exponent, bits & 0x83FF, bits).astype(np.uint16)
        near = (base ^ dice.integers(0, 64, count).astype(np.uint16)).astype(np.uint16)
        local = np.where(near & exponent == exponent, near & 0x83FF, near).astype(np.uint16)
    else:
        kind = {"F64": np.float64, "F32": np.float32}[dtype]
        base = (dice.standard_normal(count) * 10.0 ** dice.integers(-38, 38, count)).astype(kind)
        local = (base * (1 + dice.standard_normal(count) / 8)).astype(kind)
        base[:3] = np.finfo(np.float32).max
        local[:3] = -np.finfo(np.float32).max
    layout = Layout([("w", dtype, [count])], -(-count * size // 4096) * 4096)
    codec = Codec(layout, encoding, top_k=0.5)
    body, number = codec.encode(0, local.tobytes(), base.tobytes())
    assert number != 0
    before, seen = _core.simd_level(), set()
    for level in _core.simd_levels():
        _core.set_simd_level(level)
        out = bytearray(count * size)
        codec.decode(0, body, number, out, base.tobytes())
        seen.add(bytes(out))
    _core.set_simd_level(before)
    assert len(seen) == 1
    assert seen != {base.tobytes()}


def span(layout: Layout, index: int) -> tuple[int, int]:
    offset, nbytes = layout.chunk_range(index)
    return offset, offset + nbytes


GOLDEN = {
    "bf16": "80bf 003f 0000 4040",
    "fp16": "00bc 0038 0000 0042",
    "int8": "0683c13c d615007f",
    "nf4": "8c31c63f ff 94f7",
    "top-k": "01000000 01000000 00004040 03",
}


@pytest.mark.parametrize("encoding", LOSSY)
def test_the_golden_bytes_of_the_protocol_page(encoding: str) -> None:
    values = np.array([-1, 0.5, 0, 3], np.float32)
    _, body = Codec(one_run(4), encoding).encode(0, values)
    assert body.hex() == GOLDEN[encoding].replace(" ", "")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("encoding", LOSSY)
def test_a_non_finite_value_is_named_and_not_encoded(encoding: str, bad: float) -> None:
    values = floats(5000)
    values[321] = bad
    with pytest.raises(NonFiniteError, match="tensor 'w', element 321"):
        Codec(one_run(5000), encoding).encode(0, values)


@pytest.mark.parametrize("encoding", LOSSY)
def test_a_difference_beyond_the_format_is_limited_to_its_largest_number(encoding: str) -> None:
    most = np.float32(np.finfo(np.float32).max)
    values, base = np.full(640, most), np.full(640, -most)
    _, _, out = trip(Codec(one_run(640), encoding), values, base)
    assert np.isfinite(out).all()
    codec = Codec(one_run(640), encoding, top_k=0.4)
    number, body = codec.encode(0, values)
    codec.decode(0, number, body, out)
    assert np.isfinite(out).all()
    codec.decode(0, number, body, out, values)
    assert out[0] == most


@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4", "top-k"])
def test_the_residual_carries_what_an_encoding_loses_into_the_next_round(encoding: str) -> None:
    count = 10_000
    codec = Codec(one_run(count), encoding, top_k=0.1)
    base, values = floats(count, 1, 1.0), floats(count, 1, 1.0) + floats(count, 2, 1e-2)
    residual, sent = np.zeros(count, np.float32), np.zeros(count)
    rounds = 40
    for _ in range(rounds):
        number, body = codec.encode(0, values, base, residual)
        out, after = np.empty_like(values), np.empty_like(values)
        codec.decode(0, number, body, out, base)
        codec.carry(0, values, residual, out, after)
        sent += out.astype(np.float64) - base
        residual = after
    meant = values.astype(np.float64) - base
    np.testing.assert_allclose(sent + residual, rounds * meant, atol=1e-4)
    assert np.abs(sent / rounds - meant).mean() < 0.35 * np.abs(meant).mean()


def test_a_raw_run_of_which_nothing_was_lost_keeps_the_sign_of_zero() -> None:
    layout = Layout([("w", "F32", [100]), ("h", "BF16", [50])], 4096)
    values, base = np.zeros(250, np.uint16), np.zeros(250, np.uint16)
    values[:200].view(np.float32)[:] = floats(100)
    values[200:] = 0x8000
    residual, out = np.zeros(250, np.uint16), np.empty(250, np.uint16)
    codec = Codec(layout, "bf16")
    number, body = codec.encode(0, values, base, residual)
    codec.decode(0, number, body, out, base)
    assert number == NUMBER["bf16"]
    assert set(out[200:]) == {0x8000}
    residual[200:] = 0x3F80
    codec.decode(0, *codec.encode(0, values, base, residual), out, base)
    assert set(out[200:]) == {0x3F80}


# --- Hostile bodies ---


def refused(codec: Codec, number: int, body: bytes, nbytes: int) -> str:
    """Decode what must be refused; the output must be as it was."""
    out = bytearray(b"\xa5" * nbytes)
    with pytest.raises(ProtocolError) as caught:
        codec.decode(0, number, body, out)
    assert out == b"\xa5" * nbytes
    return str(caught.value)


def top_k(count: int, gaps: bytes, values: bytes) -> bytes:
    return struct.pack("<II", count, len(gaps)) + values + gaps


ONE = struct.pack("<f", 1)


@pytest.mark.parametrize(
    ("encoding", "body", "said"),
    [
        ("bf16", b"\x00\x00" * 99, "too short"),
        ("bf16", b"\x00\x00" * 101, "too long"),
        ("bf16", b"\x80\x7f" * 100, "NaN or infinite"),
        ("fp16", b"\x01\xfc" * 100, "NaN or infinite"),
        ("int8", struct.pack("<f", np.nan) + bytes(100), "scale"),
        ("int8", struct.pack("<f", np.inf) + bytes(100), "scale"),
        ("int8", struct.pack("<f", -1) + bytes(100), "scale"),
        ("int8", struct.pack("<f", 2.0**122) + bytes(100), "scale"),
        ("int8", ONE + b"\x80" * 100, "-128"),
        ("nf4", struct.pack("<f", np.nan) + bytes(52), "scale"),
        ("nf4", struct.pack("<f", 3e38) + bytes(52), "scale"),
        ("nf4", bytes(55), "too short"),
        ("nf4", bytes(57), "too long"),
        ("top-k", top_k(101, bytes(101), ONE * 60), "more values than there are"),
        ("top-k", top_k(2**32 - 1, b"", b""), "more values than there are"),
        ("top-k", top_k(1, b"", ONE), "length of its indices"),
        ("top-k", top_k(1, bytes(6), ONE), "length of its indices"),
        ("top-k", top_k(2, bytes(2), ONE), "too short"),
        ("top-k", top_k(1, b"\x64", ONE), "out of range"),
        ("top-k", top_k(2, b"\x63\x00", ONE * 2), "out of range"),
        ("top-k", top_k(1, b"\xff\xff\xff\xff\x0f", ONE), "out of range"),
        ("top-k", top_k(1, b"\xff\xff\xff\xff\x1f", ONE), "malformed"),
        ("top-k", top_k(1, b"\x80\x00", ONE), "malformed"),
        ("top-k", top_k(1, b"\x80", ONE), "malformed"),
        ("top-k", top_k(1, b"\x00\x00", ONE), "more indices than values"),
        ("top-k", top_k(1, b"\x00", struct.pack("<f", -np.inf)), "NaN or infinite"),
        ("top-k", top_k(1, b"\x00", ONE) + b"\x00", "too long"),
        ("top-k", b"\x00" * 7, "too short"),
    ],
)
def test_a_malformed_body_is_refused_and_changes_nothing(
    encoding: str, body: bytes, said: str
) -> None:
    assert said in refused(Codec(one_run(100), encoding), NUMBER[encoding], body, 400)


def test_a_half_byte_behind_the_last_value_must_be_zero() -> None:
    body = ONE + b"\xff\xff" + bytes(50) + b"\x10"
    assert "half byte" in refused(Codec(one_run(101), "nf4"), 4, body, 404)


def test_an_encoding_that_was_not_agreed_on_is_refused() -> None:
    for encoding, number in [("raw", 3), ("int8", 4), ("int8", 0x83), ("raw", 0x80), ("raw", 6)]:
        assert "not agreed on" in refused(Codec(one_run(100), encoding), number, bytes(104), 400)
    packed = Codec(one_run(100), "top-k", lossless=True)
    assert "not agreed on" in refused(packed, 0x85, bytes(104), 400)


def test_a_packed_body_can_not_grow_beyond_its_chunk() -> None:
    import lz4.block

    codec = Codec(one_run(5000), "raw", lossless=True)
    for size in (0, 19_999, 20_001, 50_000_000):
        bomb = lz4.block.compress(bytes(size), store_size=False)
        said = refused(codec, 0x80, bomb, 20_000)
        assert "unpacked" in said or "too long" in said


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("encoding", ["raw", *LOSSY])
def test_thousands_of_mutated_bodies_end_no_process(encoding: str, lossless: bool) -> None:
    layout = mixed_layout()
    flat = np.repeat(mixed_bytes(layout, 1)[::8], 8)[: layout.total_bytes]
    flat = mixed_bytes(layout, 1) if encoding != "raw" else flat
    codec = Codec(layout, encoding, lossless, top_k=0.2)
    dice = random.Random(f"{encoding} {lossless}")
    good = [codec.encode(i, flat[slice(*span(layout, i))]) for i in range(layout.chunk_count)]
    outcomes = {"taken": 0, "refused": 0}
    for _ in range(3000):
        index = dice.randrange(layout.chunk_count)
        number, body = good[dice.randrange(len(good)) if dice.random() < 0.1 else index]
        hostile = bytearray(body)
        for _ in range(dice.randrange(1, 4)):
            move = dice.random()
            at = dice.randrange(len(hostile) + 1)
            if move < 0.6 and hostile:
                hostile[at - 1] = dice.choice([0, 0x7F, 0x80, 0xFF, dice.randrange(256)])
            elif move < 0.8:
                del hostile[at : at + dice.randrange(1, 40)]
            else:
                hostile[at:at] = dice.randbytes(dice.randrange(1, 40))
        if dice.random() < 0.1:
            number = dice.randrange(256)
        out = bytearray(layout.chunk_range(index)[1])
        try:
            codec.decode(index, number, bytes(hostile), out)
            outcomes["taken"] += 1
        except ProtocolError:
            outcomes["refused"] += 1
            assert not any(out)
    assert outcomes["taken"] > 0
    assert outcomes["refused"] > 300


# --- Settings ---


def test_wrong_settings_and_buffers_are_refused() -> None:
    for share in (0, -1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="top_k"):
            Codec(one_run(10), "top-k", top_k=share)
    with pytest.raises(ConfigError, match="expected one of raw, bf16"):
        Codec(one_run(10), "int4")
    with pytest.raises(LayoutError, match="at most 4194304"):
        Codec(Layout([("w", "F32", [10])], 8 << 20), "int8")
    with pytest.raises(LayoutError, match="a buffer has 44 bytes, its chunk 40"):
        Codec(one_run(10), "int8").encode(0, floats(11))
    with pytest.raises(LayoutError, match="chunk 1 of 1"):
        Codec(one_run(10), "int8").encode(1, floats(10))


def test_lossless_without_lz4_is_refused_with_the_remedy() -> None:
    program = (
        "import sys; sys.modules['lz4'] = None\n"
        "from fedcore._core import Codec, Layout\n"
        "Codec(Layout([('w', 'F32', [4])], 4096), 'raw', lossless=True)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ConfigError: lossless packing needs the Python package lz4" in done.stderr


def test_the_core_knows_the_protocols_encodings_by_name_and_number() -> None:
    with pytest.raises(ConfigError) as unknown:
        Codec(Layout([("w", "F32", [4])]), "zip")
    assert str(unknown.value).endswith(f"expected one of {', '.join(UPDATE_ENCODINGS)}")
