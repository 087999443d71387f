"""The SFT experiment in small: a Llama of four layers and a few made-up questions."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from benchmarks.experiments import sft
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.reports import SftRun, score_arms, sft_report
from benchmarks.experiments.sft import Settings, load_exchanges, share_out, train_arms
from fedcore.demo.causal import Exchange
from fedcore.errors import ConfigError
from fedcore.evaluate.scorer import TaskScore

from ..support.texts import exchanges

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Settings(
    train_rows=8, val_rows=3, max_tokens=40, rounds=2, steps=2, batch_size=4, learning_rate=1e-2
)


SOURCES = {"north": exchanges("snow"), "south": exchanges("sand")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_no_prompt_comes_twice_and_a_source_that_is_too_small_is_named() -> None:
    sites = share_out(SOURCES, SETTINGS)
    rows = [row.prompt for parts in sites.values() for part in parts for row in part]
    assert len(rows) == len(set(rows)) == 22
    twice = {"one": exchanges("snow"), "two": exchanges("SNOW")}
    with pytest.raises(ConfigError, match="two: 11 rows wanted, 0 found"):
        share_out(twice, SETTINGS)


def test_the_mean_of_one_site_is_that_site_and_every_arm_opens_as_a_model(
    base: Path, tmp_path: Path
) -> None:
    sites = share_out({"north": SOURCES["north"]}, SETTINGS)
    curves = train_arms(tmp_path, base, sites, SETTINGS, lambda _: None)
    assert list(curves) == ["federated", "north", "centralised"]
    for name, tensor in weights(tmp_path / "north").items():
        assert torch.equal(weights(tmp_path / "federated")[name], tensor), name
    model = LlamaForCausalLM.from_pretrained(tmp_path / "federated")
    assert torch.equal(
        model.lm_head.weight, weights(tmp_path / "north")["model.embed_tokens.weight"]
    )
    begin, end = (curves["federated"]["points"][n]["loss"]["north"] for n in (0, -1))
    assert end < begin
    # The step at the start of a round: the sites' models and their mean are scored at the same step.
    steps = [(p["step"], p["who"]) for p in curves["federated"]["points"]]
    assert steps == [
        (0, "federated"),
        (2, "north"),
        (2, "federated"),
        (4, "north"),
        (4, "federated"),
    ]


def test_a_round_takes_up_the_order_of_rows_where_the_last_one_left_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    loss = sft.School.loss

    def record(school: sft.School, rows: Any) -> torch.Tensor:
        seen.extend(map(str, rows))
        return loss(school, rows)

    monkeypatch.setattr(sft.School, "loss", record)
    one = dataclasses.replace(SETTINGS, steps=1)  # two rounds of one step: every row once
    school = sft.School(base, share_out(SOURCES, one), one)
    for done in range(one.rounds):
        school.train(("north",), "north", done)
    assert len(seen) == len(set(seen)) == one.train_rows


class Stopped(Exception):
    pass


def test_a_run_that_is_stopped_after_any_round_ends_as_one_that_is_not(
    base: Path, tmp_path: Path
) -> None:
    sites = share_out(SOURCES, SETTINGS)
    whole = train_arms(tmp_path / "whole", base, sites, SETTINGS, lambda _: None)

    def stop(_: str) -> None:
        raise Stopped

    for _ in range(8):  # four arms of two rounds
        with pytest.raises(Stopped):
            train_arms(tmp_path / "parts", base, sites, SETTINGS, stop)
    parts = train_arms(tmp_path / "parts", base, sites, SETTINGS, stop)
    for arm in whole:
        assert parts[arm]["points"] == whole[arm]["points"], arm
        for name, tensor in weights(tmp_path / "parts" / arm).items():
            assert torch.equal(weights(tmp_path / "whole" / arm)[name], tensor), (arm, name)
    other = dataclasses.replace(SETTINGS, steps=1)
    with pytest.raises(ConfigError, match="made with other settings"):
        train_arms(tmp_path / "parts", base, sites, other, stop)
    model = tmp_path / "another"
    shutil.copytree(base, model)
    rows = {**sites, "north": (sites["north"][0], sites["south"][1])}
    for given, held in ((model, sites), (base, rows)):
        with pytest.raises(ConfigError, match="made with other settings"):
            train_arms(tmp_path / "parts", given, held, SETTINGS, stop)


def test_a_run_that_ended_goes_on_with_more_rounds_as_one_that_was_asked_for_them(
    base: Path, tmp_path: Path
) -> None:
    sites = share_out(SOURCES, SETTINGS)
    one = dataclasses.replace(SETTINGS, rounds=1)
    whole = train_arms(tmp_path / "whole", base, sites, SETTINGS, lambda _: None)
    first = train_arms(tmp_path / "parts", base, sites, one, lambda _: None)
    assert {arm: curve["rounds"] for arm, curve in first.items()} == dict.fromkeys(whole, 1)
    parts = train_arms(tmp_path / "parts", base, sites, SETTINGS, lambda _: None)
    assert {a: c["points"] for a, c in parts.items()} == {a: c["points"] for a, c in whole.items()}
    assert all(curve["cpu_seconds"] > 0 for curve in parts.values())
    with pytest.raises(ConfigError, match="federated holds 2 rounds, more than 1"):
        train_arms(tmp_path / "parts", base, sites, one, lambda _: None)


def test_all_arms_take_a_round_before_any_takes_the_next(base: Path, tmp_path: Path) -> None:
    told: list[str] = []
    train_arms(tmp_path, base, share_out(SOURCES, SETTINGS), SETTINGS, told.append)
    rounds = [line.split(",")[0] for line in told]
    arms = ("federated", "north", "south", "centralised")
    assert rounds == [f"{arm}: round {number} of 2" for number in (1, 2) for arm in arms]


def test_the_loss_of_the_validation_rows_does_not_depend_on_how_they_are_batched(
    base: Path,
) -> None:
    found = []
    for size in (1, 2, 3):
        settings = dataclasses.replace(SETTINGS, batch_size=size, mixed=False)
        school = sft.School(base, share_out(SOURCES, settings), settings)
        found.append(school.score())
        school.model.eval()
        with torch.inference_mode():
            rows = school.validation["north"]
            each = [float(school.loss([row])[0]) for row in rows]
        assert found[-1]["north"] == pytest.approx(sum(each) / len(rows), rel=1e-5)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)


def test_an_arm_that_was_stopped_between_two_renames_is_found(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "arm"
    folder.mkdir()
    (folder / "curve.json").write_text('{"rounds": 1}')
    folder.replace(folder.with_suffix(".old"))
    assert sft.curve_of(folder) == {"rounds": 1}
    assert (folder / "curve.json").is_file()


def test_rows_are_read_by_column_and_a_missing_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "who  is it", "a": "a cat"}\n{"q": "", "a": "x"}\n')
    assert load_exchanges(str(path), "train", ["q", "a"]) == [Exchange("who is it", "a cat")]
    with pytest.raises(ConfigError, match="row 1: no column b; it has q, a"):
        load_exchanges(str(path), "train", ["q", "b"])
    path.write_text('{"q": "who"}\n["a"]\n')
    with pytest.raises(ConfigError, match="line 2: expected a JSON object"):
        load_exchanges(str(path), "train", ["q", "a"])


def test_the_quick_form_trains_every_arm_and_draws_the_curves(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = []
    for name, rows in SOURCES.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps(dataclasses.asdict(row)) for row in rows))
        given.append(f"{name}={path}")
    out = tmp_path / "out"
    start = ["x", "sft", "--quick", "--tasks", "none", "--model", str(base), "--sites"]
    monkeypatch.setattr("sys.argv", [*start, ",".join(given), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "north alone" in shown
    found = json.loads((out / "sft.json").read_text())
    assert list(found["seeds"]) == ["1"]
    assert list(found["seeds"]["1"]["curves"]) == ["federated", "north", "south", "centralised"]
    assert (out / "sft.png").read_bytes().startswith(b"\x89PNG")


def test_scores_of_other_tasks_are_not_mixed_in_and_columns_that_were_not_run_stay_empty(
    tmp_path: Path,
) -> None:
    score: dict[str, Any] = {"task": "local_piqa", "rows": 4, "acc": 0.5, "acc_stderr": 0.25}
    score |= {"acc_norm": 0.25, "acc_norm_stderr": None}
    for arm, folder in (("base", tmp_path), ("federated", tmp_path / "seed-7")):
        (folder / "scores").mkdir(parents=True)
        kept = {"tasks": ["local_piqa"], "limit": 4, "scores": [score]}
        kept |= {} if arm == "base" else {"rounds": 2}
        (folder / "scores" / f"{arm}.json").write_text(json.dumps(kept))
    given: dict[str, Any] = {"cache": tmp_path, "notice": lambda _: None, "tasks": ["local_piqa"]}
    trained = {"federated": {"rounds": 2}}
    found = score_arms(tmp_path, 7, "base", trained, limit=4, **given)
    with pytest.raises(ConfigError, match="other tasks or another limit"):
        score_arms(tmp_path, 7, "base", trained, limit=5, **given)
    points = [{"step": s, "who": "federated", "loss": {"north": 3.0 - s}} for s in (0, 1)]
    points.insert(1, {"step": 1, "who": "north", "loss": {"north": 2.5}})
    curves = {"federated": {"settings": {"sites": ["north"]}, "points": points}}
    points_of_8 = [{**p, "loss": {"north": p["loss"]["north"] + p["step"]}} for p in points]
    other = {"federated": {**curves["federated"], "points": points_of_8}}
    runs = {7: SftRun(curves, found), 8: SftRun(other)}
    sft_report(tmp_path, runs, "base", 4)
    text = (tmp_path / "sft.md").read_text()
    assert "hellaswag: not run | winogrande: not run" in text
    assert "| federated | 0.50 ± 0.25 | 0.25 |  |  |" in text
    assert "| federated | 2.500 ± 0.707 | 2.500 ± 0.707 |" in text, "2 and 3"
    assert "| base | 3.000 ± 0.000 |" in text


def test_arms_are_scored_again_after_more_rounds_and_the_base_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[str] = []

    def count(arguments: dict[str, Any], *_: Any, **__: Any) -> list[TaskScore]:
        scored.append(Path(arguments["pretrained"]).name)
        return [TaskScore("piqa", 4, len(scored) / 10, None, None, None)]

    monkeypatch.setattr("fedcore.evaluate.scorer.evaluate", count)

    def score(rounds: int, limit: int = 4) -> list[str]:
        before = len(scored)
        curves = {arm: {"rounds": rounds} for arm in ("federated", "north")}
        found = score_arms(
            tmp_path, 7, "hub/base", curves, tasks=["piqa"], limit=limit, cache=tmp_path, notice=len
        )
        for arm, result in found.items():
            last = max(number for number, made in enumerate(scored, 1) if made == arm)
            assert result["scores"][0]["acc"] == last / 10, arm
        return scored[before:]

    assert score(3) == ["base", "federated", "north"]
    assert score(3) == []
    assert score(5) == ["federated", "north"]
    assert score(5) == []
    for name in ("scores/base", "seed-7/scores/north"):  # as files were before they had the rounds
        path = tmp_path / f"{name}.json"
        kept = json.loads(path.read_text())
        del kept["rounds"]
        path.write_text(json.dumps(kept))
    assert score(5) == ["north"]
