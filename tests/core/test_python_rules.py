"""Rules in Python: the page about them, followed to the letter; the bits; and what is refused."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from fedcore._core import Layout
from fedcore.cli import main
from fedcore.errors import ConfigError, NonFiniteError, RuleError
from fedcore.files.average import aggregate_files
from fedcore.model_file import create_model, open_model
from fedcore.rules import RULES, PythonRule
from fedcore.rules.python import check_rule, load_rule

from ..support.python_rules import Mean, Median, Trimmed, named

COUNT = 140_001  # several pieces and a rest


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


class Flat(Median):
    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        out[:] = np.median(values, axis=1)


class Returning(Median):
    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        return np.median(values, axis=0)  # type: ignore[no-any-return]


class Unmade(Median):
    def __init__(self, weights: np.ndarray, settings: Mapping[str, float]) -> None:
        super().__init__(weights, settings)
        raise KeyError("no such number")


class Wordless(Median):
    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        class Silent(Exception):
            def __str__(self) -> str:
                raise RuntimeError

        raise Silent


class Listed(Median):
    options = "trim"  # type: ignore[assignment]


class Greedy(Median):
    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        values[0, 0] = 1


@pytest.fixture
def fresh_path() -> Iterator[None]:
    before = list(sys.path)
    yield
    sys.path[:] = before
    sys.modules.pop("trimmed", None)


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
        aggregate_files(paths, weights, out, rule=named(kind), threads=threads, force=True)
        assert out.read_bytes() == expected


@pytest.mark.parametrize("name", [*RULES, named(Median), named(Mean), named(Trimmed)])
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
        check_rule(load_rule(named(kind)))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Forgetful, "'w', element 0: it left the element out, or gave NaN or infinity"),
        (Huge, "'w', element 0: it gave a number that is too large for F32"),
        (Failing, "'w', element 0: RuntimeError: this rule can't go on"),
        (Greedy, "'w', element 0: ValueError: .*read-only"),
        (Flat, "'w', element 0: ValueError: .*could not broadcast"),
        (Returning, "'w', element 0: TypeError: combine returned a value .* fills in `out`"),
        (Unmade, "Unmade' can't be made: KeyError: 'no such number'"),
        (Wordless, "'w', element 0: it raised an exception that has no text"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_rule_that_fails_ends_the_command_and_leaves_no_file(
    kind: type[PythonRule], text: str, threads: int, tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    with pytest.raises(RuleError, match=f"the rule .*{text}"):
        aggregate_files(models(tmp_path, count=500), None, out, rule=named(kind), threads=threads)
    assert not out.exists()


def test_the_error_of_a_rule_that_fails_is_one_line_and_keeps_where_it_was_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(path) for path in models(tmp_path, count=500)]
    rule = named(Failing)
    with pytest.raises(SystemExit) as ended:
        main(["aggregate", *paths, "--rule", rule, "-o", str(tmp_path / "out.safetensors")])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the rule '{rule}' failed in tensor 'w', element 0: Runtime")
    with pytest.raises(RuleError) as failed:
        aggregate_files([Path(path) for path in paths], None, tmp_path / "out", rule=rule)
    assert 'raise RuntimeError("this rule can\'t go on")' in failed.value.trace


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
        aggregate_files(paths, None, tmp_path / "out", rule=named(Failing))


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
        (f"{__name__}:Listed", "Listed': options: expected a dict of fedcore.rules.Option"),
        (f"{__name__}:Unsure", "Unsure': symmetric: expected True or False, got None"),
    ],
)
def test_what_is_no_rule_is_refused_by_name(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_rule(name)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"trum": 1}, r"unknown key 'trum' of .*; did you mean 'trim'\?"),
        ({"trim": 0}, "trim: expected an integer at least 1 and below 100, got 0"),
        ({"trim": 1.5}, "trim: expected an integer .* got 1.5"),
        ({"trim": float("nan")}, "trim: expected an integer .* got nan"),
        ({"trim": float("inf")}, "trim: expected an integer .* got inf"),
    ],
)
def test_a_setting_that_a_rule_does_not_declare_is_refused_by_name(
    settings: dict[str, float], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        load_rule(named(Trimmed), settings)


def test_a_rule_gets_its_settings_which_change_what_it_needs_and_are_recorded(
    tmp_path: Path,
) -> None:
    rule = load_rule(named(Trimmed), {"trim": 2})
    assert rule.least == 5
    assert rule.recorded == f"{named(Trimmed)} 1 trim=0x1.0000000000000p+1"
    assert load_rule(named(Trimmed)).settings == {"trim": 1.0}
    assert load_rule(named(Trimmed)).key() != rule.key()
    with pytest.raises(ConfigError, match="needs at least 5 inputs, got 4"):
        aggregate_files(
            models(tmp_path, count=500),
            None,
            tmp_path / "out",
            rule=named(Trimmed),
            settings={"trim": 2},
        )


def test_a_rule_whose_docstring_is_blank_is_called_by_its_class() -> None:
    assert load_rule(f"{__name__}:Blank").summary == "Blank"


@pytest.mark.usefixtures("fresh_path")
def test_the_page_about_rules_works_as_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs/write-your-own-rule.md").read_text(encoding="utf-8")
    skeleton, checking, _ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"^    fedcore (aggregate .*)$", page, re.MULTILINE)
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


@pytest.mark.usefixtures("fresh_path")
def test_the_options_on_the_page_about_rules_work_as_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs/write-your-own-rule.md").read_text(encoding="utf-8")
    *_, skeleton = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (option,) = re.findall(r"`(--option .*?)`", page)
    (tmp_path / "trimmed.py").write_text(skeleton, encoding="utf-8")
    paths = [str(path) for path in models(tmp_path)]
    monkeypatch.chdir(tmp_path)
    command = ["aggregate", *paths, "--rule", "trimmed:TrimmedMean", "-o", "out.safetensors"]
    with pytest.raises(SystemExit) as ended:
        main([*command, *option.split()])
    assert ended.value.code == 2
    assert "needs at least 5 inputs, got 4" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([*command, "--option", "trim=1"])
    assert ended.value.code == 0, capsys.readouterr().err
    check_rule(load_rule("trimmed:TrimmedMean", {"trim": 2}))
