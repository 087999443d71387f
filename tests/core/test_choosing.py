"""Krum and multi-Krum over files: distances against exact fractions, and the choice against the paper's words."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fedcore import _core
from fedcore.cli import main
from fedcore.errors import ConfigError, NonFiniteError
from fedcore.files.average import aggregate_files
from fedcore.files.choosing import square_distances
from fedcore.files.weights import open_weights
from fedcore.model_file import create_model, open_model
from fedcore.rules.deciding import Decision
from fedcore.rules.several import SEVERAL

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.fixture(autouse=True)
def restore_level() -> Iterator[None]:
    before = _core.simd_level()
    yield
    _core.set_simd_level(before)


def write(path: Path, **tensors: tuple[str, np.ndarray]) -> Path:
    layout = _core.Layout([(name, dtype, [len(v)]) for name, (dtype, v) in tensors.items()])
    path.unlink(missing_ok=True)
    model = create_model(path, layout)
    for name, (_, values) in tensors.items():
        model.view(name)[:] = np.ascontiguousarray(values).view(np.uint8).data
    model.file.sync()
    return path


def distances(paths: Sequence[Path], threads: int = 1) -> list[list[float]]:
    return square_distances([open_weights(path) for path in paths], threads=threads)


def exact(one: np.ndarray, other: np.ndarray) -> Fraction:
    pairs = zip(one.astype(np.float64), other.astype(np.float64), strict=True)
    return sum(((Fraction(float(a)) - Fraction(float(b))) ** 2 for a, b in pairs), Fraction())


def of_seed(seed: int, count: int = 3_001, dtype: str = "F32") -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(count).astype(DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_distances_are_those_of_exact_fractions_however_near_two_files_are(
    dtype: str, tmp_path: Path
) -> None:
    first = of_seed(1, dtype=dtype)
    near, subnormal = first.copy(), first.copy()
    near[1_234] = np.nextafter(near[1_234], DTYPES[dtype](9))
    least = np.ones(1, f"u{first.dtype.itemsize}").view(first.dtype)[0]
    first[7], subnormal[7] = DTYPES[dtype](0), least
    near[7] = first[7]
    values = [first, near, subnormal, first.copy(), -first, of_seed(2, dtype=dtype)]
    ints = "I32", np.arange(5, dtype=np.int32)
    paths = [write(tmp_path / f"{i}", w=(dtype, v), n=ints) for i, v in enumerate(values)]
    found = distances(paths)
    for (i, one), (j, other) in itertools.product(enumerate(values), repeat=2):
        assert found[i][j] == found[j][i]
        wanted = exact(one, other)
        if dtype != "F64" or wanted > Fraction(1, 10**200):  # a smaller square is below binary64
            assert abs(Fraction(found[i][j]) - wanted) <= wanted / 10**9
    assert found[0][3] == 0
    assert found[0][1] > 0


def test_order_threads_and_instruction_set_change_no_bit_of_a_distance(tmp_path: Path) -> None:
    tensors = [
        {"a": ("F32", of_seed(s, 700_001)), "b": ("F16", of_seed(s, 77, "F16"))} for s in range(4)
    ]
    paths = [write(tmp_path / f"{i}", **of) for i, of in enumerate(tensors)]
    wanted = distances(paths)
    for level, threads in itertools.product(_core.simd_levels(), (1, 3)):
        _core.set_simd_level(level)
        for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
            found = distances([paths[i] for i in order], threads)
            assert found == [[wanted[i][j] for j in order] for i in order]


def krum(values: Sequence[np.ndarray], f: int) -> list[Fraction]:
    """The score of each update: the sum of its K - f - 2 least squared distances to others."""
    scores = []
    for i, one in enumerate(values):
        others = sorted(exact(one, other) for j, other in enumerate(values) if j != i)
        scores.append(sum(others[: len(values) - f - 2], Fraction()))
    return scores


def combined(paths: Sequence[Path], out: Path, rule: str, **settings: float) -> tuple[bytes, Any]:
    told: list[tuple[list[Path], Decision]] = []
    aggregate_files(
        paths, None, out, rule=rule, settings=settings, force=True,
        choice=lambda files, choice: told.append((list(files), choice)),
    )  # fmt: skip
    return bytes(open_model(out).view("w")), told[0]


@pytest.mark.parametrize("f", [0, 1, 2])
def test_the_choice_is_that_of_the_paper_in_any_order(tmp_path: Path, f: int) -> None:
    values = [of_seed(9, 50) + (0.1 * (1 + s)) * of_seed(s, 50) for s in range(5)]
    values += [-values[0] * np.float32(3), values[1] * np.float32(100)]
    paths = [write(tmp_path / f"{i}", w=("F32", v)) for i, v in enumerate(values)]
    scores = krum(values, f)
    best = sorted(range(7), key=lambda i: scores[i])
    found = set()
    for order in (range(7), range(6, -1, -1), (3, 1, 6, 0, 5, 2, 4)):
        made, (files, choice) = combined([paths[i] for i in order], tmp_path / "out", "krum", f=f)
        assert made == values[best[0]].tobytes()
        kept = {path for path, chosen in zip(files, choice.chosen, strict=True) if chosen}
        assert kept == {paths[best[0]]}
        for path, score in zip(files, choice.scores, strict=True):
            wanted = scores[paths.index(path)]
            assert abs(Fraction(score) - wanted) <= wanted / 10**9
        several, (files, choice) = combined(
            [paths[i] for i in order], tmp_path / "out", "multi-krum", f=f, m=3
        )
        kept = {path for path, chosen in zip(files, choice.chosen, strict=True) if chosen}
        assert kept == {paths[i] for i in best[:3]}
        found.add(several)
    aggregate_files([paths[i] for i in best[:3]], None, tmp_path / "mean", rule="mean")
    assert found == {bytes(open_model(tmp_path / "mean").view("w"))}


def test_multi_krum_leaves_out_as_many_as_may_lie_unless_it_is_told_otherwise() -> None:
    rule = SEVERAL["multi-krum"]
    squares = [[abs(i - j) ** 2.0 for j in range(7)] for i in range(7)]
    squares[6] = [1e9] * 6 + [0.0]
    for row in squares[:6]:
        row[6] = 1e9
    choice = rule.decide(squares, [1] * 7, rule.having({}))
    assert choice.chosen == (True,) * 6 + (False,)
    assert sum(rule.decide(squares, [1] * 7, rule.having({"f": 2})).chosen) == 5
    with pytest.raises(ConfigError, match="m = 6: expected at most 5"):
        rule.decide(squares, [1] * 7, rule.having({"f": 2, "m": 6}))


def test_of_equal_scores_the_first_name_counts_whatever_the_bytes_are(tmp_path: Path) -> None:
    near, nearer, far = (np.array([v, 0], np.float32) for v in (1, 1.5, 9))
    for first, second in ((near, nearer), (nearer, near)):
        for folder in (tmp_path, tmp_path / "a-b"):  # as names of sites are ordered
            folder.mkdir(exist_ok=True)
            paths = [
                write(folder / f"{name}.safetensors", w=("F32", v))
                for name, v in (("a", first), ("a-b", second), ("far", far))
            ]
            for order in itertools.permutations(paths):
                made, (files, _) = combined(order, tmp_path / "out", "krum", f=0)
                assert (made, files) == (first.tobytes(), paths)


def test_where_all_updates_are_too_far_apart_they_are_named(tmp_path: Path) -> None:
    values = [np.array([k * 1e200, 1.0]) for k in range(3)]
    paths = [write(tmp_path / f"{i}", w=("F64", v)) for i, v in enumerate(values)]
    for rule, settings in (("krum", {"f": 0.0}), ("rfa", {})):
        with pytest.raises(ConfigError, match="beyond binary64") as caught:
            combined(paths, tmp_path / "out", rule, **settings)
        assert all(str(path) in str(caught.value) for path in paths)


def test_equal_updates_and_ties_give_one_result_in_any_order(tmp_path: Path) -> None:
    corners = [np.array(v, np.float32) for v in ([0, 0], [0, 1], [1, 0], [1, 1], [0.5, 0.5])]
    same = [write(tmp_path / f"s{i}", w=("F32", corners[0])) for i in range(3)]
    assert combined(same, tmp_path / "out", "krum", f=0)[0] == corners[0].tobytes()
    paths = [write(tmp_path / f"{i}", w=("F32", v)) for i, v in enumerate(corners[:4])]
    results = {
        combined(order, tmp_path / "out", "krum", f=0)[0] for order in itertools.permutations(paths)
    }
    assert len(results) == 1


def test_what_can_not_be_is_refused_with_the_numbers(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}", w=("F32", of_seed(i, 3))) for i in range(4)]
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match=r"needs at least 5 inputs \(2 f \+ 3.*\), got 4"):
        aggregate_files(paths, None, out, rule="krum")
    with pytest.raises(ConfigError, match="does not weigh"):
        aggregate_files(paths, None, out, rule="krum", settings={"f": 0}, max_share=0.5)
    with pytest.raises(ConfigError, match="f: expected an integer"):
        aggregate_files(paths, None, out, rule="krum", settings={"f": 0.5})
    bad = write(tmp_path / "bad", w=("F32", np.array([0, 1, np.inf], np.float32)))
    with pytest.raises(NonFiniteError, match=r"bad: NaN or infinity in tensor 'w', element 2"):
        aggregate_files([*paths, bad], None, out, rule="multi-krum")
    assert not out.exists()


def test_the_command_says_of_each_file_its_score_and_whether_it_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = [of_seed(9, 50) + np.float32(0.1) * of_seed(s, 50) for s in range(4)]
    names = [str(write(tmp_path / f"{i}", w=("F32", v))) for i, v in enumerate(values)]
    liar, out = str(write(tmp_path / "liar", w=("F32", -values[0]))), str(tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        main(["aggregate", *names, liar, "--rule", "multi-krum", "--option", "f=1", "-o", out])
    assert ended.value.code == 0
    said = capsys.readouterr().err
    assert said.count(", share 25 %") == 4
    assert f"{liar}: sum of squared distances to its neighbours " in said.splitlines()[-1]
    assert said.splitlines()[-1].endswith("left out")
