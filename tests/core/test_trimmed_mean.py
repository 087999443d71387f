"""The trimmed mean against exact fractions and against the mean of sorted values, bit by bit."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from fedcore import _core
from fedcore.errors import ConfigError, NonFiniteError
from fedcore.files.average import aggregate_files
from fedcore.model_file import open_model

from ..support.values import DTYPES, any_bits, ranked, write_values

COUNT = 2_083  # several pieces and a rest

pytestmark = pytest.mark.usefixtures("any_level")


def expected(dtype: str, inputs: list[np.ndarray], trim: int) -> bytes:
    rows = [
        np.ascontiguousarray(row) for row in ranked(np.stack(inputs))[trim : len(inputs) - trim]
    ]
    out = np.empty_like(rows[0])
    _core.mean(dtype, [row.view(np.uint8) for row in rows], [1] * len(rows), out.view(np.uint8))
    return out.tobytes()


def trimmed(
    folder: Path, dtype: str, inputs: list[np.ndarray], trim: int, threads: int = 1
) -> bytes:
    paths = [write_values(folder / f"{i}.safetensors", dtype, x) for i, x in enumerate(inputs)]
    out, settings = folder / "out.safetensors", {"trim": float(trim)}
    aggregate_files(
        paths, None, out, rule="trimmed-mean", settings=settings, threads=threads, force=True
    )
    return bytes(open_model(out).view("w"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sources", "trim"), [(3, 1), (4, 1), (5, 2), (8, 1), (8, 3), (16, 4), (40, 7)]
)
def test_it_is_the_mean_of_what_is_left_from_the_lowest_to_the_highest(
    dtype: str, sources: int, trim: int, tmp_path: Path
) -> None:
    inputs = [any_bits(dtype, seed, COUNT) for seed in range(sources)]
    assert trimmed(tmp_path, dtype, inputs, trim) == expected(dtype, inputs, trim)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16"])
def test_of_usual_values_it_is_the_exact_one_rounded_once(dtype: str, tmp_path: Path) -> None:
    dice, kind = np.random.default_rng(5), DTYPES[dtype]
    inputs = [dice.standard_normal(300).astype(kind) for _ in range(7)]
    found = np.frombuffer(trimmed(tmp_path, dtype, inputs, 2), kind)
    for value, values in zip(found, np.stack(inputs).T, strict=True):
        exact = sum(sorted(Fraction(float(x)) for x in values)[2:5], Fraction()) / 3
        near = [np.nextafter(value, kind(-np.inf)), np.nextafter(value, kind(np.inf))]
        distance = abs(Fraction(float(value)) - exact)
        assert all(distance <= abs(Fraction(float(other)) - exact) for other in near)


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_the_least_number_of_sources_it_is_the_median(dtype: str, tmp_path: Path) -> None:
    inputs = [any_bits(dtype, seed, COUNT) for seed in range(7)]
    paths = [write_values(tmp_path / f"m{i}", dtype, x) for i, x in enumerate(inputs)]
    out = tmp_path / "median.safetensors"
    aggregate_files(paths, None, out, rule="median")
    assert trimmed(tmp_path, dtype, inputs, 3) == bytes(open_model(out).view("w"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_threads_and_instruction_set_change_nothing(dtype: str, tmp_path: Path) -> None:
    inputs = [any_bits(dtype, seed, (1 << 18) + 5) for seed in range(5)]
    orders, found = itertools.cycle(list(itertools.permutations(range(5)))[::17]), set()
    for level, threads in itertools.product(_core.simd_levels(), (1, 3)):
        _core.set_simd_level(level)
        found.add(trimmed(tmp_path, dtype, [inputs[i] for i in next(orders)], 1, threads))
    assert found == {expected(dtype, inputs, 1)}


def test_a_value_that_is_not_finite_is_named_though_it_would_be_trimmed(tmp_path: Path) -> None:
    inputs = [np.full(3_000, i, np.float32) for i in range(5)]
    inputs[4][2_345] = np.inf
    with pytest.raises(NonFiniteError, match=r"4.safetensors: NaN or infinity in .*element 2345"):
        trimmed(tmp_path, "F32", inputs, 1)


def test_too_few_sources_and_a_trim_that_is_none_are_refused(tmp_path: Path) -> None:
    inputs = [np.zeros(3, np.float32)] * 4
    with pytest.raises(ConfigError, match="'trimmed-mean' needs at least 5 inputs, got 4"):
        trimmed(tmp_path, "F32", inputs, 2)
    for trim in (0.0, 1.5, -1.0):
        with pytest.raises(ConfigError, match="trim: expected an integer"):
            aggregate_files(
                [tmp_path / "0.safetensors"] * 3,
                None,
                tmp_path / "o",
                rule="trimmed-mean",
                settings={"trim": trim},
            )
        with pytest.raises(ConfigError, match="trim: expected an integer"):
            _core.rule_scratch(("trimmed-mean", {"trim": trim}), 3)


def test_its_scratch_memory_does_not_grow_with_the_model() -> None:
    assert _core.rule_scratch(("trimmed-mean", {"trim": 5.0}), 64) <= 512 << 10
    assert _core.rule_scratch(("trimmed-mean", {"trim": 5.0}), 1000) <= 3 << 20
