"""The geometric median, clipping and mixing against references of 60 digits, written from the papers."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from decimal import Decimal, getcontext, localcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from fedcore import _core
from fedcore.cli import main
from fedcore.errors import ConfigError, NonFiniteError
from fedcore.files.average import aggregate_files
from fedcore.model_file import create_model, open_model
from fedcore.rules.clipping import CENTRED_CLIPPING, NORM_CLIPPING
from fedcore.rules.deciding import Decision, SeveralPasses
from fedcore.rules.geometric import RFA
from fedcore.rules.mixing import mixing_of
from fedcore.rules.several import SEVERAL

Vector = list[Decimal]


def vectors(*rows: Sequence[float]) -> list[Vector]:
    return [[Decimal(value) for value in row] for row in rows]


def minus(one: Vector, other: Vector) -> Vector:
    return [a - b for a, b in zip(one, other, strict=True)]


def norm(vector: Vector) -> Decimal:
    return sum((value * value for value in vector), Decimal()).sqrt()


def mean(rows: Sequence[Vector], weights: Sequence[Decimal]) -> Vector:
    whole = sum(weights)
    pairs = list(zip(rows, weights, strict=True))
    return [sum(w * row[j] for row, w in pairs) / whole for j in range(len(rows[0]))]


def mixed(rows: list[Vector], f: int) -> list[Vector]:
    """Allouah et al. 2023, algorithm 2."""
    found = []
    for own in rows:
        near = sorted(rows, key=lambda row: (norm(minus(row, own)), row is not own))
        found.append(mean(near[: len(rows) - f], [Decimal(1)] * (len(rows) - f)))
    return found


def rfa(rows: list[Vector], weights: Sequence[int], iterations: int, nu: float) -> Vector:
    """Pillutla et al. 2022, algorithm 2."""
    alphas = [Decimal(weight) for weight in weights]
    z = mean(rows, alphas)
    for _ in range(iterations):
        pulls = [a / max(Decimal(nu), norm(minus(z, y))) for a, y in zip(alphas, rows, strict=True)]
        z = mean(rows, pulls)
    return z


def centred(
    rows: list[Vector], weights: Sequence[int], base: Vector, radius: Decimal, iterations: int
) -> Vector:
    """Karimireddy et al. 2021, equation of centred clipping, begun at the base."""
    v = base
    for _ in range(iterations):
        moves = []
        for row in rows:
            away = minus(row, v)
            factor = min(Decimal(1), radius / norm(away)) if norm(away) else Decimal(1)
            moves.append([factor * value for value in away])
        v = [a + b for a, b in zip(v, mean(moves, list(map(Decimal, weights))), strict=True)]
    return v


def squares_of(rows: list[Vector]) -> list[list[float]]:
    def square(one: Vector, other: Vector) -> float:
        return float(sum((value * value for value in minus(one, other)), Decimal()))

    return [[square(one, other) for other in rows] for one in rows]


def decided(
    rule: SeveralPasses, rows: list[Vector], weights: Sequence[int], base: Vector, **options: float
) -> tuple[Vector, Decision]:
    """What a decision makes of vectors, exactly."""
    found = rule.decide(squares_of([*rows, base]), weights, rule.having(options))
    parts = [*map(Decimal, found.weights), Decimal(found.base)]
    return mean([*rows, base], parts), found


@pytest.fixture(autouse=True)
def sixty_digits() -> object:
    with localcontext() as context:
        context.prec = 60
        yield getcontext()


def some(seed: int, count: int, size: int = 5, spread: float = 1.0) -> list[Vector]:
    dice = np.random.default_rng(seed)
    centre = dice.standard_normal(size)
    return vectors(*(centre + spread * dice.standard_normal((count, size))).tolist())


def off(found: Vector, wanted: Vector) -> float:
    return float(norm(minus(found, wanted)))


ZERO = vectors([0.0] * 5)[0]


@pytest.mark.parametrize("base", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-160, 1e140])
def test_mixed_distances_of_64_updates_are_exact_but_for_one_rounding(
    base: bool, scale: float
) -> None:
    dice, count = random.Random(scale), 64
    places = [scale * dice.gauss(0, 1) * 10 ** dice.choice((-9, 0, 3)) for _ in range(count)]
    places[7] = places[3]
    squares = [[(a - b) ** 2 for b in [*places, 0.0][: count + base]] for a in [*places, 0.0]][
        : count + base
    ]
    found = mixing_of(squares, 48, {"mix": 16}, base)
    sets = [*found.members, *([(count,)] if base else [])]
    assert found.squares[3][7] == 0.0
    for one, other in dice.sample(list(itertools.permutations(range(count + base), 2)), 40):
        a, b = sets[one], sets[other]

        def whole(rows: Sequence[int], columns: Sequence[int]) -> Fraction:
            return sum((Fraction(squares[i][j]) for i in rows for j in columns), Fraction())

        exact = whole(a, b) / len(a) / len(b)
        exact -= whole(a, a) / len(a) ** 2 / 2 + whole(b, b) / len(b) ** 2 / 2
        assert found.squares[one][other] == max(0.0, float(exact))


@pytest.mark.parametrize("mix", [0, 2])
@pytest.mark.parametrize("liar", [None, 30.0, 1e5])
def test_the_geometric_median_is_that_of_the_paper(liar: float | None, mix: int) -> None:
    for seed in range(6):
        rows = some(seed, 5 + seed)
        if liar is not None:
            rows[1] = [Decimal(liar) * value for value in rows[0]]
        weights = [1 + (7 * k + seed) % 5 for k in range(len(rows))]
        found, _ = decided(RFA, rows, weights, ZERO, iterations=60, mix=mix)
        wanted = rfa(mixed(rows, mix) if mix else rows, weights, 60, 1e-6)
        assert off(found, wanted) < 1e-6


@pytest.mark.parametrize("mix", [0, 1])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_centred_clipping_is_that_of_the_paper(iterations: int, mix: int) -> None:
    for seed in range(6):
        rows = some(seed, 4 + seed)
        rows[2] = [10_000 * value for value in rows[0]]
        weights = [1 + (3 * k + seed) % 4 for k in range(len(rows))]
        found, decision = decided(
            CENTRED_CLIPPING, rows, weights, ZERO, radius=0.7, iterations=iterations, mix=mix
        )
        points = mixed(rows, mix) if mix else rows
        wanted = centred(points, weights, ZERO, Decimal("0.7"), iterations)
        assert off(found, wanted) < 1e-6
        assert decision.scale < 1
        whole = sum(decision.weights)
        assert decision.scale == whole / (whole + decision.base)


@pytest.mark.parametrize("bound", [0.0, 0.5, 1e3])
def test_norm_clipping_is_the_mean_of_updates_that_were_shortened(bound: float) -> None:
    for seed in range(6):
        rows = some(seed, 4 + seed)
        rows[1] = [100_000 * value for value in rows[0]]
        base = some(99, 1)[0]
        weights = [1 + (3 * k + seed) % 4 for k in range(len(rows))]
        found, decision = decided(NORM_CLIPPING, rows, weights, base, bound=bound)
        norms = [norm(minus(row, base)) for row in rows]
        half = sorted(n for n, w in zip(norms, weights, strict=True) for _ in range(w))
        most = Decimal(bound) or half[(len(half) - 1) // 2]
        wanted = centred(rows, weights, base, most, 1)
        assert off(found, wanted) < 1e-6 * float(most)
        parts = [Fraction(w, sum(decision.weights) + decision.base) for w in decision.weights]
        for part, weight, length in zip(parts, weights, norms, strict=True):
            assert part * Fraction(length) <= Fraction(weight, sum(weights)) * Fraction(most) * (
                1 + Fraction(1, 2**50)
            )


def test_updates_that_need_no_clipping_weigh_what_they_do_in_the_mean() -> None:
    rows = some(3, 4)
    weights = [16_777_215, 3 << 30, 1, 7]
    for rule, options in ((NORM_CLIPPING, {"bound": 1e3}), (CENTRED_CLIPPING, {"radius": 1e3})):
        _, decision = decided(rule, rows, weights, ZERO, **options)
        assert decision.weights == tuple(weights)
        assert (decision.base, decision.scale) == (0, 1.0)


@pytest.mark.parametrize("rule", [RFA, NORM_CLIPPING, CENTRED_CLIPPING])
def test_a_liar_far_beyond_the_others_is_left_out_and_moves_nothing(rule: SeveralPasses) -> None:
    rows = some(1, 6)
    without, _ = decided(rule, rows[:5], [1] * 5, ZERO)
    found = []
    for liar in (1e30, -1e30, 1e38):
        rows[5] = [Decimal(liar)] * 5
        result, decision = decided(rule, rows, [1] * 6, ZERO)
        assert decision.weights[5] == 0
        assert all(decision.weights[:5])
        found.append(result)
    assert found[0] == found[1] == found[2]
    assert off(found[0], without) < 0.5 if rule is NORM_CLIPPING else found[0] == without


@pytest.mark.parametrize("rule", [RFA, NORM_CLIPPING, CENTRED_CLIPPING])
def test_equal_updates_weigh_the_same_and_one_alone_is_the_result(rule: SeveralPasses) -> None:
    one = some(2, 1)
    for count in (1, 2, 5):
        result, decision = decided(rule, one * count, [1] * count, ZERO)
        assert decision.weights == (1,) * count
        assert result == one[0]
    none, decision = decided(rule, [ZERO] * 3, [1] * 3, ZERO)
    assert none == ZERO
    assert decision.weights == (1, 1, 1)


def test_what_most_sites_sent_alike_is_their_geometric_median() -> None:
    rows = [*some(2, 1) * 3, *some(4, 2, spread=3)]
    result, decision = decided(RFA, rows, [1] * 5, ZERO)
    assert decision.weights == (1, 1, 1, 0, 0)
    assert result == rows[0]


@pytest.mark.parametrize("rule", [RFA, CENTRED_CLIPPING])
def test_another_order_gives_each_update_the_same_weight(rule: SeveralPasses) -> None:
    rows = some(5, 4)
    wanted = decided(rule, rows, [1, 2, 3, 4], ZERO)[1]
    for order in itertools.permutations(range(4)):
        _, found = decided(rule, [rows[k] for k in order], [k + 1 for k in order], ZERO)
        assert found.weights == tuple(wanted.weights[k] for k in order)
        assert found.scores == tuple(wanted.scores[k] for k in order)


def test_weights_have_24_bits_and_scores_are_distances() -> None:
    rows = some(6, 7)
    for rule in (RFA, NORM_CLIPPING, CENTRED_CLIPPING):
        result, decision = decided(rule, rows, [1] * 7, ZERO)
        for weight in (*decision.weights, decision.base):
            assert weight < 2**63
            assert weight >> max(0, weight.bit_length() - 24) << max(
                0, weight.bit_length() - 24
            ) == weight  # fmt: skip
        to = ZERO if rule is NORM_CLIPPING else result
        for score, row in zip(decision.scores, rows, strict=True):
            assert math.isclose(score, float(norm(minus(row, to))), rel_tol=1e-6)


def test_distances_beyond_binary64_and_too_few_updates_are_refused() -> None:
    infinite = [[0.0 if i == j else math.inf for j in range(4)] for i in range(4)]
    for rule in (RFA, NORM_CLIPPING, CENTRED_CLIPPING):
        with pytest.raises(ConfigError, match="beyond binary64"):
            rule.decide(infinite, [1, 1, 1], rule.having({}))
    for rule in (RFA, CENTRED_CLIPPING):
        with pytest.raises(ConfigError, match=r"at least 5 inputs \(2 mix \+ 1\), got 3"):
            rule.decide(infinite, [1, 1, 1], rule.having({"mix": 2}))


def test_krum_chooses_among_mixed_updates_and_counts_what_they_are_made_of() -> None:
    for seed in range(6):
        rows = some(seed, 7)
        rows[3] = [-50 * value for value in rows[0]]
        points = mixed(rows, 1)
        scores = []
        for own in points:
            near = sorted(norm(minus(own, other)) ** 2 for other in points if other is not own)
            scores.append(sum(near[: 7 - 1 - 2]))
        best = sorted(range(7), key=lambda own: (scores[own], own))
        for name, count in (("krum", 1), ("multi-krum", 6)):
            result, decision = decided(SEVERAL[name], rows, [1] * 7, ZERO, f=1, mix=1)
            wanted = mean([points[k] for k in best[:count]], [Decimal(1)] * count)
            assert off(result, wanted) < 1e-12
            for score, exact in zip(decision.scores, scores, strict=True):
                assert math.isclose(score, float(exact), rel_tol=1e-9)


def written(path: Path, values: np.ndarray) -> Path:
    model = create_model(path, _core.Layout([("w", "F32", [len(values)])]))
    model.view("w")[:] = values.astype(np.float32).view(np.uint8).data
    model.file.sync()
    return path


def trained(folder: Path) -> tuple[Path, list[Path]]:
    """A base, and five files that were trained from it, the last one by a liar."""
    base = np.random.default_rng(0).standard_normal(3_000)
    steps = [0.01 * np.random.default_rng(s).standard_normal(3_000) for s in range(1, 5)]
    files = [
        written(folder / f"{i}", base + step) for i, step in enumerate([*steps, 300 * steps[0]])
    ]
    return written(folder / "base", base), files


@pytest.mark.parametrize("rule", ["rfa", "centred-clipping", "norm-clipping"])
def test_files_give_what_the_decision_says_in_any_order_and_the_header_has_it(
    rule: str, tmp_path: Path
) -> None:
    base, files = trained(tmp_path)
    started = base if SEVERAL[rule].needs_base else None
    results, decisions = set(), []
    for order in (files, files[::-1]):
        aggregate_files(
            order, None, tmp_path / "out", rule=rule, base=started, force=True,
            choice=lambda paths, found: decisions.append({*zip(paths, found.weights, strict=True)}),
        )  # fmt: skip
        results.add(bytes(open_model(tmp_path / "out").view("w")))
    assert len(results) == 1
    assert decisions[0] == decisions[1]
    made = open_model(tmp_path / "out")
    record = json.loads(made.metadata["fedcore.decision"])
    weights = {path.name: weight for path, weight in decisions[0]}
    assert {of["file"]: of["weight"] for of in record["files"]} == weights
    assert made.metadata["fedcore.rule"].startswith(f"{rule} 1 ")
    kept = [*files, *([base] if record["base"] else [])]
    parts = [Fraction(weights.get(path.name, record["base"])) for path in kept]
    wide = np.array([np.frombuffer(open_model(path).view("w"), np.float32) for path in kept])
    wanted = [
        sum((p * Fraction(float(x)) for p, x in zip(parts, wide[:, j], strict=True)), Fraction())
        / sum(parts)
        for j in range(0, 3_000, 97)
    ]
    found = np.frombuffer(results.pop(), np.float32)[::97]
    assert np.array_equal(found, np.array([float(value) for value in wanted], np.float32))
    away = np.linalg.norm(found - wide[0][::97])
    assert away < 0.1
    assert np.linalg.norm(wide[4][::97] - wide[0][::97]) > 5


def test_a_base_is_asked_for_where_it_is_needed_and_refused_elsewhere(tmp_path: Path) -> None:
    base, files = trained(tmp_path)
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="shortens the way from the model"):
        aggregate_files(files, None, out, rule="norm-clipping")
    for rule in ("rfa", "mean"):
        with pytest.raises(ConfigError, match=f"{rule!r} makes no use of a base"):
            aggregate_files(files, None, out, rule=rule, base=base)
    bad = written(tmp_path / "bad", np.array([1.0] * 2_999 + [np.nan]))
    with pytest.raises(NonFiniteError, match="bad: NaN or infinity in tensor 'w', element 2999"):
        aggregate_files([*files, bad], None, out, rule="rfa")
    with pytest.raises(NonFiniteError, match="bad: NaN"):
        aggregate_files(files, None, out, rule="norm-clipping", base=bad)
    with pytest.raises(ConfigError, match="is one of the inputs"):
        aggregate_files(files, None, base, rule="norm-clipping", base=base, force=True)
    assert not out.exists()


def test_the_command_prints_each_share_and_the_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, files = trained(tmp_path)
    names, out = [str(path) for path in files], str(tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        main(["aggregate", *names, "--rule", "norm-clipping", "--base", str(base), "-o", out])
    assert ended.value.code == 0
    printed = capsys.readouterr().err
    assert printed.count(": norm of the update ") == 5
    assert "base: share " in printed
