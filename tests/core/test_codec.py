"""Encoded chunks against a NumPy reference of docs/protocol.md."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore._core import Codec, Layout
from fedcore.errors import ConfigError, LayoutError, NonFiniteError
from fedcore.protocol import UPDATE_ENCODINGS

from ..support.encoding_references import (
    BOOK,
    LOSSY,
    MINIS,
    NUMBER,
    REFERENCE,
    blocks,
    floats,
    mixed_bytes,
    mixed_layout,
    one_run,
    reference_int8,
    reference_nf4,
    reference_top_k,
    span,
    trip,
)


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
