"""Runs that do not average: the decisions without sockets, and whole runs of each kind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fedcore.config import parse_run
from fedcore.errors import ConfigError
from fedcore.server.rounds.actions import (
    Action,
    Choose,
    Commit,
    EndRun,
    GiveUp,
    HoldCollect,
    Participant,
    SendDropped,
    SendTask,
    StartCollect,
)
from fedcore.server.rounds.participation import Delivery, Roster
from fedcore.server.rounds.rounds import Phase
from fedcore.server.rounds.tasks import Comparing, Scoring

Command = Callable[..., subprocess.CompletedProcess[str]]

SITES = ["a", "b", "c"]


def scoring(quorum: int = 3) -> Scoring:
    rounds = Scoring(Roster(SITES, None), kind="infer", quorum=quorum, deadline=100)
    assert rounds.committed(0, 0.0) == []
    return rounds


def comparing(quorum: int = 2, version: int | None = None) -> Comparing:
    rounds = Comparing(
        Roster(SITES, None), sites=SITES, quorum=quorum, deadline=100, version=version
    )
    if version is None:
        assert rounds.committed(0, 0.0) == []
    return rounds


def join(rounds: Any, *names: str) -> list[Action]:
    return [action for name in names for action in rounds.joined(name, name * 32, 1.0)]


def deliver(rounds: Comparing, name: str) -> list[Action]:
    return rounds.ready(name, SITES.index(name) + 1, Delivery(name * 32, 5))


def collect(name: str) -> StartCollect:
    place = SITES.index(name) + 1
    return StartCollect(place, (Participant(name, name * 32, 5),))


def test_every_site_is_asked_and_a_run_ends_once_all_have_answered() -> None:
    rounds = scoring()
    assert join(rounds, "a", "b") == [SendTask("a", "infer", 0), SendTask("b", "infer", 0)]
    assert rounds.scored("a", 0) == rounds.scored("b", 0) == []  # one has not even joined
    assert join(rounds, "c") == [SendTask("c", "infer", 0)]
    assert rounds.scored("c", 0) == [EndRun(True, "")]


def test_at_the_deadline_enough_answers_do_and_too_few_are_named() -> None:
    rounds = scoring(quorum=2)
    join(rounds, "a", "b")
    rounds.scored("a", 0)
    (end,) = rounds.tick(102.0)
    assert isinstance(end, EndRun)
    assert not end.ok
    assert "1 of the 2 sites" in end.message
    assert "without an answer: b, c; 1 never joined" in end.message
    rounds = scoring(quorum=2)
    join(rounds, "a", "b")
    rounds.scored("a", 0)
    rounds.scored("b", 0)
    assert rounds.tick(102.0) == [EndRun(True, "")]


def test_a_site_that_is_gone_before_it_has_answered_is_waited_for_where_it_is_needed() -> None:
    rounds = scoring()
    join(rounds, "a", "b", "c")
    assert rounds.lost("c", "its process was ended by SIGTERM", 2.0, left=True) == []
    assert rounds.scored("a", 0) == rounds.scored("b", 0) == []
    assert join(rounds, "c") == [SendTask("c", "infer", 0)]
    assert rounds.scored("c", 0) == [EndRun(True, "")]


def test_each_submission_becomes_a_version_that_all_score() -> None:
    rounds = comparing(quorum=3)
    assert join(rounds, *SITES) == [SendTask(n, "submit", i) for i, n in enumerate(SITES, 1)]
    assert deliver(rounds, "c") == deliver(rounds, "a") == []
    assert deliver(rounds, "b") == [collect("a")]
    for place, name in enumerate(SITES, 1):
        assert rounds.reduced()[-1] == Commit(place, collect(name).participants)
        assert rounds.committed(place, 2.0) == [SendTask(n, "evaluate", place) for n in SITES]
        assert rounds.phase is Phase.EVALUATING
        assert rounds.scored("a", place) == rounds.scored("b", place) == []
        after = rounds.scored("c", place)
        assert after == ([collect(SITES[place])] if place < 3 else [EndRun(True, "")])


def test_a_comparison_goes_on_without_a_site_that_is_lost_or_invalid() -> None:
    rounds = comparing()
    join(rounds, *SITES)
    for name in SITES:
        deliver(rounds, name)
    assert rounds.lost("a", "gone", 2.0) == [HoldCollect(), collect("b")]
    dropped = rounds.rejected("b", "it holds NaN", 2.0)
    assert dropped == [SendDropped("b", 2, "it holds NaN"), HoldCollect()]
    assert rounds.tick(102.0) == [collect("c")]  # until then a was needed, and might have come back
    assert rounds.reduced()[-1] == Commit(3, collect("c").participants)
    rounds.committed(3, 2.0)
    rounds.scored("b", 3)
    assert rounds.scored("c", 3) == [EndRun(True, "")]


def test_a_site_that_submitted_and_is_back_gives_its_model_again_before_it_scores() -> None:
    rounds = comparing(quorum=3)
    join(rounds, *SITES)
    for name in SITES:
        deliver(rounds, name)
    rounds.reduced()
    rounds.committed(1, 2.0)
    assert rounds.scored("a", 1) == rounds.scored("b", 1) == []
    assert rounds.lost("b", "nothing heard for 1.1 s", 3.0) == []
    assert rounds.scored("c", 1) == []  # c's model is not pulled before b's
    assert rounds.joined("b", "another process", 4.0) == [SendTask("b", "submit", 2)]
    assert deliver(rounds, "b") == [collect("b")]
    assert rounds.lost("b", "nothing heard for 1.1 s", 5.0) == [HoldCollect()]
    assert rounds.tick(104.0) == []
    assert rounds.tick(105.0) == [collect("c")]  # the deadline of the step


def test_a_site_that_is_back_while_a_model_is_pulled_gives_its_own_again_and_scores() -> None:
    rounds = comparing(quorum=3)
    join(rounds, *SITES)
    for name in SITES:
        deliver(rounds, name)
    rounds.lost("c", "nothing heard for 1.1 s", 2.0)
    assert rounds.joined("c", "another process", 3.0) == [SendTask("c", "submit", 3)]
    rounds.reduced()
    assert rounds.committed(1, 4.0) == [SendTask(n, "evaluate", 1) for n in ("a", "b")]
    assert rounds.scored("a", 1) == rounds.scored("b", 1) == []
    assert deliver(rounds, "c") == [SendTask("c", "evaluate", 1)]
    assert rounds.scored("c", 1) == [collect("b")]


def test_a_server_that_is_started_again_in_a_comparison_knows_who_had_submitted() -> None:
    before = comparing(quorum=3)
    join(before, *SITES)
    for name in SITES:
        deliver(before, name)
    choice, commit = before.reduced()
    assert choice == Choose(1, ("a", "b", "c"))
    assert isinstance(commit, Commit)
    rounds = comparing(quorum=3, version=1)
    assert rounds.choice == 1
    rounds.restarted(SITES, ("a",), 15.0, (), choice.sites)
    assert rounds.joined("b", "another process", 4.0) == [SendTask("b", "submit", 2)]
    assert deliver(rounds, "b") == [SendTask("b", "evaluate", 1)]


def test_a_comparison_that_was_killed_pulls_one_model_after_the_other_and_none_ahead() -> None:
    rounds = comparing()
    rounds.restarted(SITES, (), 15.0, collect("a").participants)
    join(rounds, "b", "c")
    assert deliver(rounds, "b") == []
    assert [type(action) for action in rounds.tick(15.0)] == [GiveUp]
    assert deliver(rounds, "c") == [collect("b")]


def test_a_comparison_closes_at_the_deadline_and_its_steps_have_deadlines_too() -> None:
    rounds = comparing()
    join(rounds, *SITES)
    deliver(rounds, "b")
    (end,) = rounds.tick(101.0)
    assert isinstance(end, EndRun)
    assert not end.ok
    rounds = comparing()
    join(rounds, *SITES)
    deliver(rounds, "b")
    deliver(rounds, "c")
    assert rounds.tick(101.0) == [collect("b")]
    (late,) = deliver(rounds, "a")
    assert late == SendDropped("a", 1, "the update for round 1 came after that round had closed")
    rounds.reduced()
    rounds.committed(2, 110.0)
    assert rounds.tick(209.0) == []
    assert rounds.tick(210.0) == [collect("c")]


def test_a_paused_comparison_holds_between_two_models() -> None:
    rounds = comparing()
    join(rounds, *SITES)
    for name in SITES:
        deliver(rounds, name)
    rounds.reduced()
    rounds.committed(1, 2.0)
    rounds.paused = True
    assert [rounds.scored(name, 1) for name in SITES] == [[], [], []]
    assert rounds.held
    assert rounds.resume(3.0) == [collect("b")]


def test_a_comparison_goes_on_after_a_restart_with_the_models_that_are_offered_again() -> None:
    rounds = comparing(version=1)
    rounds.restarted(SITES, ["a", "b"], until=50.0)
    assert join(rounds, "a", "b") == []
    assert join(rounds, "c") == [SendTask("c", "evaluate", 1)]
    assert rounds.scored("c", 1) == []  # b may still offer its model again
    assert deliver(rounds, "b") == []
    assert rounds.tick(50.0) == [collect("b")]


@pytest.mark.parametrize(
    ("section", "values", "text"),
    [
        ("run", {"task": "evaluate", "rounds": 3}, "rounds is for task = 'train'"),
        ("run", {"task": "evaluate"}, "model.initial: missing"),
        ("run", {"task": "guess"}, "run.task"),
        ("run", {}, "rounds: missing; it must be given"),
        ("run", {"rounds": 0}, "rounds: expected 1 or more, got 0"),
        ("run", {"task": "compare"}, "participants.sites: missing"),
    ],
)
def test_a_run_file_that_does_not_fit_its_task_says_why(
    section: str, values: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        parse_run({section: {"name": "r", **values}, "participants": {"count": 2}})


SCRIPT = """
import os
import numpy as np
import fedcore.client as fl

site = os.environ["FEDCORE_SITE"]
step = {"north": 1, "south": 3}[site]
fl.init()
while fl.is_running():
    params = fl.receive()
    level = float(params["w"][0])
    if fl.is_infer():
        fl.answer({"mean": params["w"].mean(), "texts": [f"{site} sees {level}"]}, examples=step)
    elif fl.is_submit():
        fl.send({"w": params["w"] + step}, weight=step, metrics={"loss": level})
    else:
        fl.send(metrics={"loss": abs(level - step)}, examples=step)
"""


@pytest.fixture
def results(tmp_path: Path, fedcore: Command) -> Callable[[str], dict[str, Any]]:
    def run(task: str, script: str = SCRIPT) -> dict[str, Any]:
        save_file({"w": np.full(5, 2, np.float32)}, tmp_path / "start.safetensors")
        (tmp_path / "train.py").write_text(script)
        (tmp_path / "run.toml").write_text(
            f'[run]\nname = "t"\ntask = "{task}"\n[model]\ninitial = "start.safetensors"\n'
            '[participants]\nsites = ["north", "south"]\n'
            '[selection]\nmetric = "loss"\nmode = "min"\n[simulate]\nscript = "train.py"\n'
        )
        done = fedcore("simulate", tmp_path / "run.toml")
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"results: {tmp_path}/runs/t/results.json" in done.stdout
        found: dict[str, Any] = json.loads((tmp_path / "runs/t/results.json").read_text())
        return found

    return run


def test_a_given_model_is_scored_at_every_site(
    results: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    found = results("evaluate")
    (model,) = found["models"]
    assert model["from"] == "initial"
    assert model["metrics"] == {"loss": 1.0}
    assert model["sites"]["south"] == {"examples": 3, "metrics": {"loss": 1.0}}
    assert not (tmp_path / "runs/t/best").exists()


def test_outputs_that_a_script_chose_are_all_that_inference_yields(
    results: Callable[[str], dict[str, Any]],
) -> None:
    sites = results("infer")["models"][0]["sites"]
    assert sites["north"]["outputs"] == {"mean": 2.0, "texts": ["north sees 2.0"]}
    assert sites["south"] == {
        "examples": 3, "metrics": {}, "outputs": {"mean": 2.0, "texts": ["south sees 2.0"]},
    }  # fmt: skip


def test_each_sites_own_model_is_scored_at_every_site(
    results: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    models = results("compare")["models"]
    log = (tmp_path / "runs" / "t" / "server.log").read_text(encoding="utf-8")
    assert (log.count(" committed: "), log.count("initial model from ")) == (2, 0)
    assert [model["from"] for model in models] == ["initial", "north", "south"]
    assert [model["sites"]["north"]["metrics"]["loss"] for model in models] == [2.0, 2.0, 4.0]
    assert [model["sites"]["south"]["metrics"]["loss"] for model in models] == [2.0, 0.0, 2.0]
    values = [
        float(load_file(tmp_path / f"runs/t/models/round-000{i}.safetensors")["w"][0])
        for i in range(3)
    ]
    assert values == [2.0, 3.0, 5.0]
    best = json.loads((tmp_path / "runs/t/best/fedcore.json").read_text())
    assert best["version"] == 1
