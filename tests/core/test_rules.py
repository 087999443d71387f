"""Rules: what the registry says of them, and the median against a reference, bit by bit."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fedcore import _core
from fedcore.cli import main
from fedcore.errors import ConfigError, NonFiniteError
from fedcore.files.average import aggregate_files
from fedcore.model_file import open_model
from fedcore.rules import RULES
from fedcore.rules.python import load_rule

from ..support.values import DTYPES, any_bits, ranked, write_values

COUNT = 4_099  # several pieces and a rest

pytestmark = pytest.mark.usefixtures("any_level")


def expected_median(inputs: list[np.ndarray]) -> np.ndarray:
    """The middle value in the order of the bits, or half the binary64 sum of the two middle ones."""
    rows = ranked(np.stack(inputs))
    low, high = rows[(len(inputs) - 1) // 2], rows[len(inputs) // 2]
    if len(inputs) % 2:
        return low
    a, b = low.astype(np.float64), high.astype(np.float64)
    with np.errstate(over="ignore"):
        middle = np.where(np.isfinite(a + b), (a + b) / 2, a / 2 + b / 2)
    return nearest(middle, low.dtype)


def nearest(values: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Rounded once, ties to even: bfloat16 by its neighbours, as a cast would round to binary32 first."""
    if kind != ml_dtypes.bfloat16:
        return values.astype(kind)
    near = values.astype(np.float32).astype(kind)
    around = np.stack([near.view(np.uint16) + np.uint16(step) for step in (0, 1, 0xFFFF)])
    distance = np.abs(around.view(kind).astype(np.float64) - values)
    tie = around & 1
    best = np.lexsort((tie, distance), axis=0)[0]
    chosen = np.take_along_axis(around, best[None], axis=0)[0].view(kind)
    return np.where(values == near.astype(np.float64), near, chosen)


def median(folder: Path, dtype: str, inputs: list[np.ndarray], threads: int = 1) -> bytes:
    paths = [write_values(folder / f"{i}.safetensors", dtype, x) for i, x in enumerate(inputs)]
    out = folder / "out.safetensors"
    aggregate_files(paths, None, out, rule="median", threads=threads, force=True)
    return bytes(open_model(out).view("w"))


def test_the_registry_says_of_each_rule_what_the_core_says() -> None:
    listed = [
        (r.name, r.version, r.weighted, r.symmetric, r.folds, r.least, list(r.options))
        for r in RULES.values()
    ]
    assert listed == _core.rules()


def test_the_page_of_numerics_lists_the_rules_of_the_registry() -> None:
    page = (Path(__file__).parents[2] / "docs/numerics.md").read_text(encoding="utf-8")
    table = page.split("## Rules", 1)[1].split("## ", 1)[0]
    assert re.findall(r"^\| `([\w-]+)`", table, re.MULTILINE) == list(RULES)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sources", [1, 2, 3, 4, 5, 8, 13, 40])
def test_the_median_has_the_bits_of_the_reference(dtype: str, sources: int, tmp_path: Path) -> None:
    inputs = [any_bits(dtype, seed, COUNT) for seed in range(sources)]
    assert median(tmp_path, dtype, inputs) == expected_median(inputs).tobytes()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16"])
def test_the_median_of_usual_values_is_that_of_numpy(dtype: str, tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    inputs = [random.standard_normal(COUNT).astype(DTYPES[dtype]) for _ in range(6)]
    wide = np.median(np.stack(inputs).astype(np.float64), axis=0)
    assert median(tmp_path, dtype, inputs) == wide.astype(DTYPES[dtype]).tobytes()


def test_minus_zero_lies_below_zero_and_huge_doubles_stay_finite(tmp_path: Path) -> None:
    largest = np.finfo(np.float64).max
    rows = [[0.0, -0.0, 0.0, -0.0, largest], [-0.0, -0.0, 0.0, 1.0, largest]]
    found = np.frombuffer(median(tmp_path, "F64", [np.array(row) for row in rows]))
    expected = np.array([0.0, -0.0, 0.0, 0.5, largest])
    assert found.tobytes() == expected.tobytes()
    odd = [np.array([value]) for value in (0.0, -0.0, -0.0)]
    assert median(tmp_path, "F64", odd) == np.array([-0.0]).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_threads_and_instruction_set_do_not_change_a_median(
    dtype: str, tmp_path: Path
) -> None:
    inputs = [any_bits(dtype, seed, 3 * (1 << 17) + 5) for seed in range(4)]
    found = set()
    orders = itertools.cycle(list(itertools.permutations(range(4)))[::5])
    for level, threads in itertools.product(_core.simd_levels(), (1, 3)):
        _core.set_simd_level(level)
        order = next(orders)
        found.add(median(tmp_path, dtype, [inputs[i] for i in order], threads))
    assert found == {expected_median(inputs).tobytes()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_that_is_not_finite_is_named_also_where_no_median_shows_it(
    dtype: str, tmp_path: Path
) -> None:
    inputs = [np.full(3_000, i, DTYPES[dtype]) for i in range(5)]
    inputs[4][2_345] = np.inf
    with pytest.raises(NonFiniteError, match=r"4.safetensors: NaN or infinity in .*element 2345"):
        median(tmp_path, dtype, inputs)
    assert not (tmp_path / "out.safetensors").exists()


def test_the_scratch_memory_of_a_median_does_not_grow_with_the_model() -> None:
    assert _core.rule_scratch("mean", 64) <= 64 << 10
    assert _core.rule_scratch("median", 64) <= 256 << 10
    assert _core.rule_scratch("median", 1000) <= 2 << 20


@pytest.mark.parametrize("level", _core.simd_levels())
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_finisher_gets_rounds_to_what_a_rule_writes(
    dtype: str, level: str, tmp_path: Path
) -> None:
    _core.set_simd_level(level)
    kind = np.dtype(DTYPES[dtype])
    inputs = [any_bits(dtype, seed, COUNT) for seed in range(4)]
    wide = np.empty(COUNT)
    _core.combine_wide("median", dtype, [x.view(np.uint8) for x in inputs], [1, 2, 3, 4], wide)
    assert nearest(wide, kind).tobytes() == expected_median(inputs).tobytes()
    out = np.empty(COUNT, kind)
    weights = [3, 1, 16777215, 7]
    _core.mean(dtype, [x.view(np.uint8) for x in inputs], weights, out.view(np.uint8))
    _core.combine_wide("mean", dtype, [x.view(np.uint8) for x in inputs], weights, wide)
    assert nearest(wide, kind).tobytes() == out.tobytes()
    if dtype != "F64":
        values = [x.astype(np.float64) * w for x, w in zip(inputs, weights, strict=True)]
        total = values[0] + values[1] + values[2] + values[3]
        assert wide.tobytes() == (total / sum(weights)).tobytes()


def test_what_a_finisher_gets_is_checked_for_values_that_are_not_finite() -> None:
    inputs = [np.full(3_000, i, np.float32) for i in range(4)]
    inputs[3][2_345] = np.nan
    for rule in RULES:
        with pytest.raises(NonFiniteError):
            _core.combine_wide(load_rule(rule).core, "F32", inputs, [1] * 4, np.empty(3_000))


def test_an_unknown_rule_is_refused_with_the_names_of_those_there_are(tmp_path: Path) -> None:
    path = write_values(tmp_path / "a.safetensors", "F32", np.ones(3, np.float32))
    with pytest.raises(ConfigError, match=r"'mode'; expected one of mean, median"):
        aggregate_files([path], None, tmp_path / "out.safetensors", rule="mode")


@pytest.mark.parametrize("name", RULES)
def test_the_core_takes_the_options_that_the_registry_declares_and_no_other(name: str) -> None:
    rule = load_rule(name)
    assert rule.settings.keys() == rule.options.keys()
    assert _core.rule_scratch(rule.core, 8) > 0
    with pytest.raises(ConfigError, match=f"the rule '{name}' has no option 'nothing'"):
        _core.rule_scratch((name, {**rule.settings, "nothing": 1.0}), 8)


def test_the_command_takes_a_median_and_says_that_weights_changed_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = [np.full(3, value, np.float32) for value in (1, 2, 9)]
    paths = [
        str(write_values(tmp_path / f"{i}.safetensors", "F32", x)) for i, x in enumerate(inputs)
    ]
    out = tmp_path / "out.safetensors"
    with pytest.raises(SystemExit) as ended:
        main(["aggregate", *paths, "--rule", "median", "--weights", "1,1,99", "-o", str(out)])
    assert ended.value.code == 0
    assert "'median' does not weigh: --weights changed nothing" in capsys.readouterr().err
    assert bytes(open_model(out).view("w")) == inputs[1].tobytes()
