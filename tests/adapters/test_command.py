"""`fedcore aggregate --lora` prints how wrong the mean of factors is; its page has what the code has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedcore.adapters.refusals import METHODS, traits_table
from fedcore.adapters.report import Figure, Report, total_of
from fedcore.cli.adapters import Lora
from fedcore.cli.app import main

from .tiny_adapters import adapted, save

ROOT = Path(__file__).parents[2]


def command(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(["aggregate", *map(str, arguments)])
    return ended.value.code


def test_the_command_writes_the_folder_and_prints_the_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [save(adapted(seed, r=4 * (1 + seed)), tmp_path / str(seed)) for seed in range(2)]
    out = tmp_path / "out"
    assert command("--lora", "exact", *paths, "--weights", "3,5", "--max-rank", 8, "-o", out) == 0
    text = capsys.readouterr().out
    assert text.startswith(
        "how wrong the mean of the factors, filled up with zeros, is: 5 modules of 6"
    )
    assert "\nall " in text
    assert f"{out}: 2 adapters combined by exact" in text
    assert {file.name for file in out.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    arguments = ("--lora", "exact", *paths, "--base", paths[0], "--json", "-o", tmp_path / "more")
    assert command(*arguments) == 0
    values = json.loads(capsys.readouterr().out)
    assert (values["method"], values["sites"], values["mixed_ranks"]) == ("exact", 2, True)
    assert len(values["modules"]) == 6
    assert values["total"]["of_norm"] > 0
    assert values["total"]["of_change"] > 0


def test_the_command_takes_each_method() -> None:
    assert tuple(Lora) == METHODS


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--lora", "exact", "--rule", "median", "--force"], "--lora does not go with --rule, --force"),
        (["--json"], "--max-rank, --allow and --json go with --lora alone"),
        (["--lora", "exact", "--allow", "all"], "--allow all: expected one of dora, bases"),
        (["--lora", "exact", "--weights", "3;5"], "--weights 3;5: expected integers"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(
    options: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*options, tmp_path / "a", "-o", tmp_path / "out") != 0
    assert text in capsys.readouterr().err


def test_the_report_is_of_the_worst_modules_and_of_all_together() -> None:
    figures = tuple(Figure(f"m{i}", 4.0, 0.5 * i, 2.0, rank=i, width=4) for i in range(7))
    total = total_of(figures)
    assert (total.norm, total.error) == ((7 * 16) ** 0.5, (91 / 4) ** 0.5)
    lines = list(Report("factors", 2, False, figures, ("a note",)).lines())
    assert [line.split()[0] for line in lines[2:]] == ["m6", "m5", "m4", "m3", "m2", "all", "a"]
    assert lines[2].split()[1:] == ["4", "3", "75", "%", "150", "%", "6", "0"]
    nothing = Figure("m", 0.0, 0.0)
    assert (nothing.of_norm, nothing.of_change) == (None, None)
    assert "-" in list(Report("factors", 1, False, (nothing,), ()).lines())[2]


def test_the_page_has_the_table_of_what_is_taken_and_refused() -> None:
    """Else: .venv/bin/python -P -c "from fedcore.adapters.refusals import *; print(traits_table())"."""
    page = (ROOT / "docs/lora.md").read_text(encoding="utf-8")
    assert traits_table() in page
    assert all(f"| `{method}` |" in page for method in METHODS)
