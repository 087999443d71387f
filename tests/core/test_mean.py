"""The mean against exact rational arithmetic, at every SIMD level, length and alignment."""

from __future__ import annotations

import random
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from fedcore import _core
from fedcore.errors import LayoutError, NonFiniteError, WeightError
from fedcore.weighing import effective_weight

pytestmark = pytest.mark.usefixtures("any_level")

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PRECISION = {"F64": (53, -1074), "F32": (24, -149), "F16": (11, -24), "BF16": (8, -133)}


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def rounded(value: Fraction, dtype: str) -> Fraction:
    """Round to nearest, ties to even, in the target format: the independent reference."""
    if value == 0:
        return value
    bits, least = PRECISION[dtype]
    exponent = 0
    magnitude = abs(value)
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while magnitude < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - bits + 1, least)
    return round(value / unit) * unit  # Fraction.__round__ rounds half to even


def average(dtype: str, inputs: list[torch.Tensor], weights: list[int]) -> torch.Tensor:
    out = bytearray(len(raw(inputs[0])))
    _core.mean(dtype, [raw(x) for x in inputs], weights, out)
    return torch.frombuffer(out, dtype=TORCH[dtype])


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("level", _core.simd_levels())
@pytest.mark.parametrize("scale", [1.0, 1e-4, 2.0**-14])
def test_the_mean_is_the_correctly_rounded_one(dtype: str, level: str, scale: float) -> None:
    _core.set_simd_level(level)
    random = torch.Generator().manual_seed(3)
    inputs = [
        (torch.randn(401, generator=random, dtype=torch.float64) * scale).to(TORCH[dtype])
        for _ in range(3)
    ]
    weights = [1, 77, 16777215]
    found = average(dtype, inputs, weights).double().tolist()
    for j, value in enumerate(found):
        exact = sum(
            w * Fraction(x[j].double().item()) for w, x in zip(weights, inputs, strict=True)
        )
        assert Fraction(value) == rounded(exact / sum(weights), dtype), (dtype, j)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("level", _core.simd_levels())
@pytest.mark.parametrize("side", [-1, 0, 1])
@pytest.mark.parametrize("half", [1 << 23, 49])
def test_a_hair_beside_a_tie_decides_it(dtype: str, level: str, side: int, half: int) -> None:
    """Half the weight lies on a number and half on its neighbour; one part of it is a step off."""
    _core.set_simd_level(level)
    word = {"F32": torch.int32, "F16": torch.int16, "BF16": torch.int16}[dtype]
    start = {"F32": 0x3F800000, "F16": 0x0001, "BF16": 0x3F80}[dtype]
    low = torch.arange(start, start + 4 * 1029, 4, dtype=word) + torch.arange(1029, dtype=word) % 4
    inputs = [bits.view(TORCH[dtype]) for bits in (low, low + 1, low + 1 + side)]
    inputs = [x * torch.where(torch.arange(1029) % 2 == 0, 1, -1).to(x.dtype) for x in inputs]
    weights = [half, half - 1, 1]
    found = average(dtype, inputs, weights).double().tolist()
    for j, value in enumerate(found):
        exact = sum(
            w * Fraction(x[j].double().item()) for w, x in zip(weights, inputs, strict=True)
        )
        assert Fraction(value) == rounded(exact / sum(weights), dtype), (dtype, j)


def nearest(dtype: str, values: np.ndarray) -> np.ndarray:
    """The 16 bits of binary64 values rounded once, ties to even."""
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    near = values.astype(np.float32)
    bits = near.view(np.uint32) - (np.abs(near.astype(np.float64)) > np.abs(values))
    odd = bits.astype(np.uint32) | (near.astype(np.float64) != values)  # so that no tie is lost
    return ((odd + 0x7FFF + ((odd >> 16) & 1)) >> 16).astype(np.uint16)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("level", _core.simd_levels())
@pytest.mark.parametrize("weights", [(1, 1), (1, 2), (3, 5), (1, 1, 1, 1), (16777215, 16777214)])
def test_every_16_bit_number_is_averaged_with_others_far_and_near(
    dtype: str, level: str, weights: tuple[int, ...]
) -> None:
    _core.set_simd_level(level)
    exponent = {"F16": 0x7C00, "BF16": 0x7F80}[dtype]
    every = np.arange(1 << 16, dtype=np.uint16)
    every[every & exponent == exponent] &= 0x8000
    dice = np.random.default_rng(len(weights))
    others = [  # whatever there is, and what lies close enough for ties
        np.concatenate([dice.permutation(every), every ^ dice.integers(0, 8, 1 << 16, np.uint16)])
        for _ in weights[1:]
    ]
    inputs = [np.tile(every, 2), *others]
    inputs = [np.where(x & exponent == exponent, x & 0x8000, x).astype(np.uint16) for x in inputs]
    out = np.empty_like(inputs[0])
    _core.mean(dtype, inputs, list(weights), out)
    total = np.full(out.size, -0.0)
    for weight, bits in zip(weights, inputs, strict=True):
        if dtype == "F16":
            wide = bits.view(np.float16).astype(np.float64)
        else:
            wide = (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        total = total + weight * wide
    assert np.array_equal(out, nearest(dtype, total / sum(weights)))


@pytest.mark.parametrize("dtype", TORCH)
def test_identical_models_average_to_themselves(dtype: str) -> None:
    bits = np.random.default_rng(1).integers(0, 256, 8 * 999, np.uint8).tobytes()
    values = torch.frombuffer(bytearray(bits), dtype=TORCH[dtype])
    values = torch.where(torch.isfinite(values), values, torch.tensor(-0.0, dtype=TORCH[dtype]))
    found = average(dtype, [values] * 8, [1, 2, 3, 1000, 16777215, 5, 6, 7])
    assert raw(found) == raw(values)


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_alignment_and_level_do_not_change_a_bit(dtype: str, shift: int) -> None:
    inputs = [
        raw(torch.randn(1027, generator=torch.Generator().manual_seed(s)).to(TORCH[dtype]))
        for s in (1, 2)
    ]
    results = set()
    for level in _core.simd_levels():
        _core.set_simd_level(level)
        out = bytearray(len(inputs[0]) + shift)
        moved = [memoryview(bytes(shift) + x)[shift:] for x in inputs]
        _core.mean(dtype, moved, [3, 4], memoryview(out)[shift:])
        results.add(bytes(out[shift:]))
    assert len(results) == 1


def test_a_mean_of_huge_finite_doubles_is_finite() -> None:
    big = torch.tensor([1.7e308, -1.7e308], dtype=torch.float64)
    assert average("F64", [big, big], [16777215, 16777215]).tolist() == big.tolist()


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_named(dtype: str, bad: float) -> None:
    good = torch.ones(2000, dtype=TORCH[dtype])
    broken = good.clone()
    broken[1234] = bad
    with pytest.raises(NonFiniteError, match="input 1, element 1234"):
        average(dtype, [good, broken, good], [1, 1, 1])


def test_integers_come_from_the_base() -> None:
    out = bytearray(8)
    _core.mean(
        "I64", [struct.pack("<q", 1), struct.pack("<q", 3)], [1, 1], out, struct.pack("<q", 9)
    )
    assert struct.unpack("<q", out) == (9,)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("level", _core.simd_levels())
@pytest.mark.parametrize("shift", [1, 8, 40])
def test_large_weights_of_24_bits_give_the_mean_of_their_proportions(
    dtype: str, level: str, shift: int
) -> None:
    _core.set_simd_level(level)
    dice = torch.Generator().manual_seed(shift)
    inputs = [
        torch.randn(401, generator=dice, dtype=torch.float64).to(TORCH[dtype]) for _ in range(3)
    ]
    weights = [1, 77, 16777215]
    expected = average(dtype, inputs, weights)
    assert torch.equal(average(dtype, inputs, [w << shift for w in weights]), expected)


def test_a_weight_is_a_number_of_examples_rounded_to_24_bits() -> None:
    assert [effective_weight(n) for n in (1, (1 << 24) - 1, 1 << 24)] == [1, (1 << 24) - 1, 1 << 24]
    assert effective_weight((1 << 24) + 1) == 1 << 24
    assert effective_weight((1 << 64) - 1) == ((1 << 24) - 1) << 40
    dice = random.Random(5)
    for _ in range(1000):
        examples = dice.randrange(1, 1 << dice.randrange(1, 65))
        weight = effective_weight(examples)
        assert examples * (1 - 2**-23) <= weight <= examples
        _core.mean("F32", [bytes(4)], [weight], bytearray(4))


@pytest.mark.parametrize("weight", [0, -1, (1 << 24) + 1, (1 << 64) - 1, 1 << 64, 1 << 70])
def test_a_weight_out_of_range_is_refused(weight: int) -> None:
    with pytest.raises(WeightError, match=str(weight)):
        _core.mean("F32", [bytes(4)], [weight], bytearray(4))


def test_sizes_that_differ_are_refused() -> None:
    with pytest.raises(LayoutError):
        _core.mean("F32", [bytes(4), bytes(8)], [1, 1], bytearray(4))


def test_crc32c_gives_the_published_values() -> None:
    # RFC 3720, appendix B.4
    assert _core.crc32c(bytes(32)) == 0x8A9136AA
    assert _core.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert _core.crc32c(bytes(range(32))) == 0x46DD794E
    assert _core.crc32c(b"123456789") == 0xE3069283


@pytest.mark.parametrize(
    "size", [0, 1, 7, 8, 511, 512, 513, 767, 768, 1031, 12287, 12288, 12289, 100_003]
)
def test_every_path_of_crc32c_agrees_and_continues(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    whole = _core.crc32c(data)
    assert set(_core.crc32c_by_each_path(data)) == {whole}
    assert len(set(_core.crc32c_by_each_path(data, 0x12345678))) == 1
    assert _core.crc32c(data[size // 3 :], _core.crc32c(data[: size // 3])) == whole
