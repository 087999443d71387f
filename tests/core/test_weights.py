"""What updates weigh: bounds of their shares against exact fractions, in files and in the core."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedcore import _core
from fedcore.cli import main
from fedcore.errors import ConfigError, WeightError
from fedcore.files.average import aggregate_files
from fedcore.model_file import open_model
from fedcore.weighing import Weighing, effective_weight

from ..support.python_rules import Mean, Median, named


def bound(examples: list[int], share: Fraction) -> Fraction:
    """What a source weighs at most: the number c > 0 that is `share` of the sum of all min(examples, c)."""
    left = sorted(examples, reverse=True)
    if left[0] <= share * sum(left):
        return Fraction(left[0])
    levels = (
        share * sum(left[count:]) / (1 - share * count)
        for count in range(1, len(left))
        if share * count < 1
    )
    return next(c for c in levels if c == share * sum(min(n, c) for n in examples))


def floored(number: Fraction) -> Fraction:
    """The greatest number of 24 significant bits that is no greater."""
    exponent = math.floor(math.log2(number)) - 23
    for shift in (exponent + 1, exponent, exponent - 1):
        digits = math.floor(number / Fraction(2) ** shift)
        if 1 << 23 <= digits < 1 << 24:
            return digits * Fraction(2) ** shift
    raise AssertionError(number)


def numbers(dice: random.Random, count: int) -> list[int]:
    kinds = [
        lambda: dice.randrange(1, 10),
        lambda: dice.randrange(1, 1 << 20),
        lambda: effective_weight(dice.randrange(1, 1 << 64)),
        lambda: 7,
    ]
    kind = dice.choice(kinds)
    return [kind() if dice.random() < 0.8 else dice.choice(kinds)() for _ in range(count)]


@pytest.mark.parametrize("seed", range(8))
def test_a_bounded_share_is_that_of_exact_fractions(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(60):
        count = dice.randrange(2, 40)
        weighing = Weighing(max_share=dice.randrange(1_000_000 // count + 1, 999_999) / 1_000_000)
        share = Fraction(weighing.millionths, 1_000_000)
        examples = numbers(dice, count)
        found = [Fraction(weight) for weight in weighing.of(examples)]
        level = bound(examples, share)
        wanted = [min(Fraction(n), floored(level)) if n > level else Fraction(n) for n in examples]
        assert found == wanted
        assert max(found) <= share * sum(found)
        order = dice.sample(range(count), count)
        assert [Fraction(w) for w in weighing.of([examples[i] for i in order])] == [
            found[i] for i in order
        ]


def test_the_least_share_that_is_allowed_makes_all_weigh_the_same() -> None:
    for count in (2, 4, 5, 8):
        examples = [effective_weight((1 << 64) - 1), *range(1, count)]
        assert Weighing(max_share=1 / count).of(examples) == [1] * count
    assert Weighing(equal=True).of([3, 1 << 60]) == [1, 1]
    assert Weighing().of([3, 1 << 60]) == [3, 1 << 60]
    with pytest.raises(ConfigError, match="3 can be held to less than an equal share"):
        Weighing(max_share=0.333333).of([1, 1, 1])
    with pytest.raises(WeightError, match="whole numbers of examples"):
        _core.weigh([0.5, 1.0], False, 600_000)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan"), 0.1234567])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="max_share: expected a number above 0 and below 1"):
        Weighing(max_share=share)


def files(folder: Path) -> tuple[list[Path], list[np.ndarray]]:
    dice = np.random.default_rng(5)
    values = [dice.standard_normal(5_000).astype(np.float32) for _ in range(3)]
    paths = [folder / f"{number}.safetensors" for number in range(3)]
    for path, of in zip(paths, values, strict=True):
        save_file({"w": of}, path)
    return paths, values


@pytest.mark.parametrize("rule", ["mean", named(Mean)])
def test_files_are_weighed_within_the_bound_in_any_order(tmp_path: Path, rule: str) -> None:
    paths, values = files(tmp_path)
    counts, weights = [10, 2, 6], [8, 2, 6]  # 8 is half of 16
    wanted = [
        sum(Fraction(float(v[i])) * w for v, w in zip(values, weights, strict=True)) / 16
        for i in range(50)
    ]
    sums = set()
    for order in itertools.permutations(range(3)):
        out = tmp_path / "out.safetensors"
        chosen = [paths[i] for i in order], [counts[i] for i in order]
        sums.add(aggregate_files(*chosen, out, rule=rule, max_share=0.5, force=True).sha256())
    assert len(sums) == 1
    found = load_file(out)["w"]
    assert found[:50].tolist() == [np.float32(float(number)) for number in wanted]


def test_the_command_weighs_within_the_bound_too(tmp_path: Path) -> None:
    paths, _ = files(tmp_path)
    names, out = [str(path) for path in paths], tmp_path / "out.safetensors"
    with pytest.raises(SystemExit) as ended:
        main(["aggregate", *names, "--weights", "10,2,6", "--max-share", "0.5", "-o", str(out)])
    assert ended.value.code == 0
    other = aggregate_files(paths, [10, 2, 6], tmp_path / "other.safetensors", max_share=0.5)
    assert open_model(out).sha256() == other.sha256()


def test_a_bound_that_can_not_hold_is_refused_for_files_with_the_reason(tmp_path: Path) -> None:
    paths, _ = files(tmp_path)
    out = tmp_path / "out.safetensors"
    with pytest.raises(ConfigError, match=r"max_share = 0\.3 needs 4 or more files, got 3"):
        aggregate_files(paths, None, out, max_share=0.3)
    with pytest.raises(ConfigError, match="at most 6 decimals, got 2"):
        aggregate_files(paths, None, out, max_share=2)
    for rule in ("median", named(Median)):
        with pytest.raises(ConfigError, match=f"{rule}.* does not weigh"):
            aggregate_files(paths, None, out, rule=rule, max_share=0.5)
    assert not out.exists()
