"""Rules in Python: the page about them, followed to the letter; the bits; and what is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedcore._core import Layout
from fedcore.cli import main
from fedcore.errors import ConfigError, NonFiniteError
from fedcore.files.average import aggregate_files
from fedcore.model_file import create_model, open_model
from fedcore.rules import RULES, PythonRule
from fedcore.rules.python import check_rule, load_rule

COUNT = 140_001  # several pieces and a rest


class Median(PythonRule):
    """the median"""

    weighted = False
    symmetric = True

    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        np.median(values, axis=0, out=out)


class Mean(PythonRule):
    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        out[:] = 0
        for row, weight in zip(values, self.weights, strict=True):
            out += row * weight
        out /= self.weights.sum()


class Neighbours(Median):
    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        out[:] = values.mean()


class First(Median):
    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        out[:] = values[0]


class Heaviest(Median):
    symmetric = False

    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        out[:] = values[np.argmax(self.weights)]


class Unfinished(PythonRule):
    pass


class Worded(Median):
    least = "3"  # type: ignore[assignment]


class Unsure(Median):
    symmetric = None  # type: ignore[assignment]


class Blank(Median):
    """ """


class Forgetful(Median):
    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        out[1:] = values[0, 1:]


class Huge(Median):
    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        out[:] = 1e39


class Failing(Median):
    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        raise RuntimeError("this rule can't go on")


class Greedy(Median):
    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        values[0, 0] = 1


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rules_of_this_test", sys.modules[__name__])


@pytest.fixture
def fresh_path() -> Iterator[None]:
    before = list(sys.path)
    yield
    sys.path[:] = before
    sys.modules.pop("trimmed", None)


def rule(kind: type[PythonRule]) -> str:
    return f"rules_of_this_test:{kind.__name__}"


def models(folder: Path, dtype: str = "F32", count: int = COUNT) -> list[Path]:
    paths = []
    for number in range(4):
        path = folder / f"{number}.safetensors"
        model = create_model(path, Layout([("w", dtype, [count]), ("n", "I32", [3])]))
        values = np.random.default_rng(number).standard_normal(count)
        kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
        model.view("w")[:] = values.astype(kinds[dtype]).tobytes()
        model.view("n")[:] = np.arange(3, dtype=np.int32).tobytes()
        model.file.sync()
        paths.append(path)
    return paths


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16"])
def test_a_rule_in_python_gives_the_bits_of_the_same_rule_in_the_core(
    dtype: str, threads: int, tmp_path: Path
) -> None:
    paths, out, weights = models(tmp_path, dtype), tmp_path / "out", [3, 5, 7, 11]
    pairs = [("median", Median)] if dtype == "F64" else [("median", Median), ("mean", Mean)]
    for name, kind in pairs:
        aggregate_files(paths, weights, out, rule=name, force=True)
        expected = out.read_bytes()
        aggregate_files(paths, weights, out, rule=rule(kind), threads=threads, force=True)
        assert out.read_bytes() == expected


@pytest.mark.parametrize("name", [*RULES, "rules_of_this_test:Median", "rules_of_this_test:Mean"])
def test_each_rule_keeps_the_contract_that_python_rules_are_checked_for(name: str) -> None:
    check_rule(load_rule(name))


@pytest.mark.parametrize(
    ("kind", "broken"),
    [(Neighbours, "cut into pieces"), (First, "another order"), (Heaviest, "weights change it")],
)
def test_a_rule_that_breaks_the_contract_is_found_by_the_check(
    kind: type[PythonRule], broken: str
) -> None:
    with pytest.raises(ConfigError, match=broken):
        check_rule(load_rule(rule(kind)))


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        (Forgetful, NonFiniteError, "left an element out"),
        (Huge, NonFiniteError, "too large for F32"),
        (Failing, RuntimeError, "can't go on"),
        (Greedy, ValueError, "read-only"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_rule_that_fails_ends_the_command_and_leaves_no_file(
    kind: type[PythonRule], error: type[Exception], text: str, threads: int, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(error, match=text):
        aggregate_files(models(tmp_path, count=500), None, out, rule=rule(kind), threads=threads)
    assert not out.exists()


def test_a_value_that_is_not_finite_does_not_reach_a_rule_in_python(tmp_path: Path) -> None:
    paths = models(tmp_path, count=500)
    values = np.ones(500, np.float32)
    values[77] = np.nan
    paths[1].unlink()
    spoiled = create_model(paths[1], open_model(paths[0]).layout)
    spoiled.view("w")[:] = values.tobytes()
    spoiled.view("n")[:] = open_model(paths[0]).view("n")
    spoiled.file.sync()
    with pytest.raises(NonFiniteError, match="1.safetensors: .* element 77"):
        aggregate_files(paths, None, tmp_path / "out", rule=rule(Failing))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("trimmed.TrimmedMean", "trimmed:TrimmedMean"),
        ("no_such_module:Rule", "can't be imported: No module"),
        ("json:Rule", "can't be imported: .*Rule"),
        ("json:JSONDecoder", "no subclass of fedcore.rules.PythonRule"),
        (":Rule", "can't be imported"),
        ("../json:Rule", "can't be imported: TypeError"),
        (f"{__name__}:Unfinished", "Unfinished' has no method 'combine'"),
        (f"{__name__}:Worded", "Worded': least: expected an integer above 0, got '3'"),
        (f"{__name__}:Unsure", "Unsure': symmetric: expected True or False, got None"),
    ],
)
def test_what_is_no_rule_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_rule(name)


def test_a_rule_whose_docstring_is_blank_is_called_by_its_class() -> None:
    assert load_rule(f"{__name__}:Blank").summary == "Blank"


@pytest.mark.usefixtures("fresh_path")
def test_the_page_about_rules_works_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs/write-your-own-rule.md").read_text(encoding="utf-8")
    skeleton, checking = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"^    fedcore (.*)$", page, re.MULTILINE)
    (tmp_path / "trimmed.py").write_text(skeleton, encoding="utf-8")
    for path, name in zip(models(tmp_path), "abc", strict=False):
        path.rename(tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    assert ended.value.code == 0, capsys.readouterr().err
    exec(checking, {})
    stack = [
        np.frombuffer(open_model(tmp_path / f"{n}.safetensors").view("w"), np.float32)
        for n in "abc"
    ]
    middle = np.sort(np.stack(stack), axis=0)[1]
    assert bytes(open_model(tmp_path / "trimmed.safetensors").view("w")) == middle.tobytes()
