"""The demo's worker processes, their progress, and the report of what they found."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from rich.console import Console

from fedcore.demo import arms as arms_module
from fedcore.demo.arms import run_arms
from fedcore.demo.causal import CausalTask
from fedcore.demo.encoder import EncoderTask
from fedcore.demo.progress import ArmsView, tell
from fedcore.demo.report import make_report, plot, show
from fedcore.demo.tasks import Task
from fedcore.errors import FedcoreError

WORKER = """
import json, pathlib, sys, time
name, out = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
if name == "bad":
    sys.exit("no such thing")
(out.parent / f"{name}.here").touch()
if name in ("a", "b"):  # these two meet
    other = out.parent / ("b.here" if name == "a" else "a.here")
    while not other.exists():
        time.sleep(0.01)
if name == "forever":
    time.sleep(600)
out.write_text(json.dumps({"name": name}))
"""


def console(terminal: bool, width: int = 100) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=width), text


def test_arms_run_two_at_a_time_and_report_as_they_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet, text = console(terminal=False)
    start, started, beside = arms_module.start_arm, [], []

    def count(command: list[str], out: Path) -> Any:
        beside.append(sum(child.poll() is None for child in started))
        started.append(start(command, out))
        return started[-1]

    monkeypatch.setattr(arms_module, "start_arm", count)
    ended: list[str] = []
    arms = {name: [name] for name in ("a", "b", "c")}
    command = [sys.executable, "-c", WORKER]
    found = run_arms(quiet, command, arms, tmp_path / "out", lambda name, *_: ended.append(name))
    assert found == {name: {"name": name} for name in arms}
    assert list(found) == ["a", "b", "c"]
    assert sorted(ended) == ["a", "b", "c"]
    assert beside in ([0, 1, 1], [0, 1, 0])
    assert not text.getvalue()


def test_an_arm_that_fails_ends_the_others_and_shows_its_log(tmp_path: Path) -> None:
    arms = {name: [name] for name in ("forever", "bad", "never")}
    with pytest.raises(FedcoreError, match=r"bad ended with status 1:\n.*no such thing"):
        run_arms(console(terminal=False)[0], [sys.executable, "-c", WORKER], arms, tmp_path)
    assert not (tmp_path / "never.here").exists()


def test_a_terminal_shows_steps_loss_and_the_time_left(tmp_path: Path) -> None:
    loud, text = console(terminal=True)
    with ArmsView(loud) as view:
        view.expect("school")
        view.expect("later")
        view.start("school")
        view.look("school", tmp_path / "school.json")
        for step in (8, 9):
            tell(tmp_path / "school.json", step, 36, 1.2345)
            view.look("school", tmp_path / "school.json")
        view.refresh()
        shown = text.getvalue()
        tell(tmp_path / "school.json", 36, 36, 0.5)
        view.look("school", tmp_path / "school.json")
        view.refresh()
    for part in ("later", "waiting", "step 9 of 36, loss 1.234", "left"):
        assert part in shown
    assert "step 36 of 36, loss 0.500" in text.getvalue()
    assert "ending" in text.getvalue()


def results(each: dict[str, list[float]]) -> dict[str, Any]:
    return {
        name: {"value": sum(v) / len(v), "each": v, "by_site": dict.fromkeys("xyz", 0.0)}
        for name, v in each.items()
    }


SUMMARY = {
    "ok": True,
    "versions": [{"metrics": {"val_accuracy": 0.1, "val_loss": 3.0}}] * 2,
    "best_version": 1,
    "bytes_in": 5,
    "bytes_out": 6,
}


@pytest.mark.parametrize(("task", "sign"), [(EncoderTask(), 1), (CausalTask(), -1)])
def test_the_lead_is_positive_where_the_federated_model_is_better(task: Task, sign: int) -> None:
    one, two, three = task.sites
    rows = {
        one: [0.0, 0.0, 0.0, sign * 1.0],
        two: [0.0, 0.0, sign * 1.0, sign * 1.0],
        three: [sign * 1.0, 0.0, 0.0, 0.0],
        "federated": [sign * 1.0, 0.0, sign * 1.0, sign * 1.0],
        "centralised": [sign * 1.0] * 4,
    }
    report = make_report(results(rows), SUMMARY, task, 9.0)
    assert (report["metric"], report["mode"]) == (task.metric, "max" if sign == 1 else "min")
    assert report["lead_over_best_local"] == 0.25
    # differences 1 0 0 0: variance 0.25, over four rows
    assert report["lead_standard_error"] == pytest.approx(0.25)
    assert report["federated_beats_every_local"]
    assert not make_report(results(rows), {**SUMMARY, "ok": False}, task, 9.0)[
        "federated_beats_every_local"
    ]
    rows["federated"] = rows[two]
    assert not make_report(results(rows), SUMMARY, task, 9.0)["federated_beats_every_local"]


def test_the_table_and_the_plot_show_every_arm(tmp_path: Path) -> None:
    task = CausalTask()
    rows = {name: [2.5, 3.5] for name in (*task.sites, "federated", "centralised")}
    found = results(rows)
    for number, result in enumerate(found.values()):
        result["by_site"] = dict.fromkeys(task.sites, number + 0.125)
    report = make_report(found, SUMMARY, task, 9.0) | {"best_model": "best"}
    plain, text = console(terminal=False, width=80)
    show(plain, report, task, tmp_path)
    lines = text.getvalue().splitlines()
    for number, label in enumerate(("finance alone", "school alone", "clinic alone", "federated ")):
        (line,) = [line for line in lines if label in line and "│" in line]
        assert "3.000" in line
        assert line.count(f"{number}.125") == 3
    assert "less is better" in text.getvalue()
    before = mpl.rcParams["font.size"]
    plot(report, task, tmp_path / "a.png")
    picture = (tmp_path / "a.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width = int.from_bytes(picture[16:20], "big")
    assert width >= 2000, "300 dots an inch"
    assert b"The federated model leads" in (tmp_path / "a.svg").read_bytes(), "text stays text"
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert mpl.rcParams["font.size"] == before, "the caller's own settings stay"
    json.dumps(report)
