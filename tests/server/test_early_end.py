"""A run that ends early by what the sites scored, the best models that it keeps, and sites that lose by them."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fedcore.config import RunConfig, parse_run
from fedcore.errors import ConfigError
from fedcore.monitor.ask import read_summary
from fedcore.monitor.view import PlainLines, render
from fedcore.server.opening import RunFinishedError
from fedcore.server.outcome import RunResult
from fedcore.server.ranking import early_end
from fedcore.server.rounds.selection import EarlyEnd, SiteScore, ranked_versions, worse_at
from fedcore.server.service import Server
from fedcore.server.storage.past import read_past
from fedcore.server.storage.store import Store
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

from ..support.run_folders import SETTINGS, commit
from ..support.runs import SPECS, run, writer

BEST_AT = {"a": 4.0, "b": 4.0}


def config(
    folder: Path, rounds: int, keep: int | None = None, sites: int = 2, **selection: Any
) -> RunConfig:
    kept = {} if keep is None else {"keep_versions": keep}
    return parse_run(
        {
            "run": {"name": "t", "rounds": rounds},
            "participants": {"sites": ["a", "b", "c"][:sites], "round_deadline": "300s"},
            "selection": {"metric": "loss", "mode": "min", **selection},
            "server": {"listen": "tcp://127.0.0.1:0", "insecure": True, **kept},
        },
        folder=folder,
    )


def site(address: str, name: str, best_at: float) -> int:
    """Add 1 to the model in each round; its loss is how far the model is from ``best_at``."""
    session = Session(SiteSettings(server=address, site=name, connect_timeout=200))
    try:
        while session.is_running():
            model = session.begin(SPECS, {}, writer(0))
            value = float(np.frombuffer(model.tensors["w"], np.float32)[0])
            session.score({"loss": abs(value - best_at)}, 1)
            if model.kind == "evaluate":
                session.end_task()
            else:
                session.submit(writer(value + 1), 1)
    finally:
        session.close()
    return 0


def train(config: RunConfig, best_at: dict[str, float] = BEST_AT) -> RunResult:
    server = Server(config)
    sites = [functools.partial(site, server.endpoint, name, at) for name, at in best_at.items()]
    return run(server, *sites)[0]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "runs/t/summary.json").read_text())
    return found


def test_a_run_ends_after_so_many_rounds_without_a_better_model(tmp_path: Path) -> None:
    result = train(config(tmp_path, 20, patience=2))
    assert (result.ending, result.version, result.best_version) == ("complete", 7, 4)
    assert "selection.patience is 2" in result.message
    assert summary(tmp_path)["message"] == result.message
    with pytest.raises(RunFinishedError, match="no model of the last 2 rounds .* change selection"):
        Server(config(tmp_path, 30, patience=2))
    assert train(config(tmp_path, 20, patience=4)).version == 9


def test_a_run_ends_once_a_model_reaches_the_target(tmp_path: Path) -> None:
    result = train(config(tmp_path, 20, target=1))
    assert (result.ending, result.version, result.best_version) == ("complete", 4, 4)
    assert "the model of round 3 has 1, and selection.target is 1" in result.message


def test_an_early_end_is_the_same_after_restarts(tmp_path: Path) -> None:
    for rounds in (1, 5, 6):
        assert train(config(tmp_path, rounds)).version == rounds
    result = train(config(tmp_path, 20, patience=2))
    assert (result.version, result.best_version) == (7, 4)


@pytest.mark.parametrize("limit", [{"target": 0.5}, {"patience": 1}])
def test_a_late_score_changes_no_decision_of_a_commit_before_it(
    tmp_path: Path, limit: dict[str, float]
) -> None:
    chosen = config(tmp_path, 20, sites=1, **limit)
    store = Store(tmp_path / "run", SETTINGS)
    for version, loss in enumerate((9.0, 2.0, 3.0 if "target" in limit else 1.0)):
        commit(store, version, loss)
    commit(store, 3)
    decided = early_end(chosen, store, 3)
    assert not decided
    store.add_score(1, SiteScore("b", 1, {"loss": -2.0}))  # with it, version 1 is the best
    store.close()
    store = Store(tmp_path / "run", SETTINGS)
    assert early_end(chosen, store, 3) == decided
    commit(store, 4)
    assert "round 1" in early_end(chosen, store, 4)
    store.roll_back(3)
    assert early_end(chosen, store, 3) == decided
    commit(store, 4)
    assert "round 1" in early_end(chosen, store, 4)
    store.close()


def test_the_best_models_are_kept_and_named(tmp_path: Path) -> None:
    train(config(tmp_path, 7, 1, keep_best=3))
    models = sorted(path.name for path in (tmp_path / "runs/t/models").glob("round-*"))
    assert models == [f"round-000{version}.safetensors" for version in (3, 4, 5, 7)]
    assert summary(tmp_path)["best_versions"] == [4, 3, 5]


def test_a_better_model_that_is_worse_at_a_site_is_shown_as_such(tmp_path: Path) -> None:
    train(config(tmp_path, 4, sites=3), {"a": 9.0, "b": 0.5, "c": 9.0})
    found = summary(tmp_path)
    worse = {row["version"]: row["worse_at"] for row in found["versions"]}
    assert worse == {0: [], 1: [], 2: ["b"], 3: ["b"], 4: ["b"]}
    assert found["versions"][2]["metrics_by_site"]["b"]["loss"] == 1.5
    reply = read_summary(tmp_path / "runs/t")
    (tmp_path / "runs/t/summary.json").unlink()  # the journal alone has it, too
    for shown in (reply, read_past(tmp_path / "runs/t")):
        assert [v.worse_at for v in shown.versions] == [[], [], ["b"], ["b"], ["b"]]
        assert {s.site: s.best_score for s in shown.sites} == {"a": 5.0, "b": 3.5, "c": 5.0}
    lines: list[str] = []
    PlainLines(lines.append).show(reply)
    assert any(line.endswith("loss 4.5 (best; worse at b)") for line in lines)
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(render(reply))
    assert "of the best" in console.export_text()
    scores = {1: score(a=8.0, b=0.5), 2: score(a=5.0, b=1.5), 3: score(a=6.0, b=0.2)}
    assert worse_at(scores[1], scores[2], "loss", "min") == ["b"]
    assert worse_at(scores[1], scores[2], "loss", "max") == ["a"]
    assert worse_at(scores[1], [], "loss", "min") == []


def score(**values: float) -> list[SiteScore]:
    return [SiteScore(name, 1, {"loss": value}) for name, value in values.items()]


def test_versions_are_ranked_and_a_tie_keeps_the_earlier() -> None:
    table = {v: score(a=x) for v, x in enumerate((3.0, 1.0, 2.0, 1.0))}
    assert ranked_versions(table, "loss", "min", 1) == [(1, 1.0), (3, 1.0), (2, 2.0), (0, 3.0)]
    assert ranked_versions(table, "loss", "max", 1)[0] == (0, 3.0)
    assert ranked_versions(table, "loss", "min", 2) == []


@pytest.mark.parametrize(
    ("limits", "ranked", "scored", "text"),
    [
        (EarlyEnd("min", patience=2), [(1, 0.5)], 2, ""),
        (EarlyEnd("min", patience=2), [(1, 0.5)], 3, "no model of the last 2 rounds"),
        (EarlyEnd("min", patience=2), [], 9, ""),
        (EarlyEnd("min", target=0.5), [(1, 0.6)], 3, ""),
        (EarlyEnd("min", target=0.5), [(1, 0.5)], 3, "round 1 has 0.5"),
        (EarlyEnd("max", target=0.5), [(1, 0.4)], 3, ""),
        (EarlyEnd("max", target=0.5), [(2, 0.6)], 3, "round 2 has 0.6"),
        (EarlyEnd("max"), [(2, 0.6)], 99, ""),
    ],
)
def test_the_reason_of_an_early_end_follows_from_the_ranking(
    limits: EarlyEnd, ranked: Sequence[tuple[int, float]], scored: int, text: str
) -> None:
    found = limits.reason(ranked, scored)
    assert text in found
    assert bool(found) == bool(text)


def test_what_selects_needs_a_metric_and_a_task_that_trains(tmp_path: Path) -> None:
    for name in ("keep_best", "patience", "target"):
        with pytest.raises(ConfigError, match=f"selection.{name}: there is no metric"):
            parse_run(
                {
                    "run": {"name": "t", "rounds": 1},
                    "participants": {"count": 1},
                    "selection": {name: 2},
                }
            )
    with pytest.raises(ConfigError, match="patience and target are for run.task = 'train'"):
        parse_run(
            {
                "run": {"name": "t", "task": "evaluate"},
                "model": {"initial": "m"},
                "participants": {"count": 1},
                "selection": {"metric": "loss", "mode": "min", "patience": 1},
            }
        )
