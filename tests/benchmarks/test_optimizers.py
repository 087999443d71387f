"""The optimizers experiment in small: what is tried, what is chosen, and what the core's optimizers make of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.experiments.federation import Optimizer, mean
from benchmarks.experiments.optimizers import (
    GRID,
    TUNED_ON,
    OptimizerSettings,
    choose,
    run_optimizers,
)
from benchmarks.experiments.peft import Source
from benchmarks.experiments.reports import optimizers_report
from benchmarks.experiments.summary import optimizer_rows
from fedcore.errors import ConfigError
from fedcore.rules.finishers import FINISHERS

from ..support.texts import texts

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = OptimizerSettings(
    layers=2, frozen=1, max_tokens=8, train_rows=15, test_rows=5, rounds=3, steps=1, batch_size=2,
    sites=3, sampled=2,
)  # fmt: skip


def test_the_best_try_of_each_optimizer_runs_on_every_seed_and_is_kept(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(encoder, texts(), "made up")
    some = {name: dict(list(GRID[name].items())[:2]) for name in ("mean", "adam", "mean, ema")}
    monkeypatch.setattr("benchmarks.experiments.optimizers.GRID", some)
    tried, found = run_optimizers(tmp_path, SETTINGS, source, [0, 1], lambda _: None)
    assert list(tried) == [name for tries in some.values() for name in tries]
    assert {result["seed"] for result in tried.values()} == {TUNED_ON}
    assert list(found) == list(some)
    for name, results in found.items():
        assert [result["seed"] for result in results] == [0, 1]
        assert {result["try"] for result in results} == {choose(tried)[name]}
        assert all(len(result["accuracy"]) == 4 for result in results)

    optimizers_report(tmp_path, tried, found, SETTINGS, source)
    assert "| mean, ema | mean, ema " in (tmp_path / "optimizers.md").read_text()
    written = json.loads((tmp_path / "optimizers.json").read_text())
    assert [row["optimizer"] for row in written["rows"]] == list(some)

    monkeypatch.setattr("benchmarks.experiments.optimizers.Heads", None)  # nothing is trained again
    assert run_optimizers(tmp_path, SETTINGS, source, [0, 1], lambda _: None) == (tried, found)
    other = dataclasses.replace(SETTINGS, rate=1.0)
    with pytest.raises(ConfigError, match="made with other settings"):
        run_optimizers(tmp_path, other, source, [0], lambda _: None)


def test_every_optimizer_of_the_core_is_tried_with_all_of_its_options() -> None:
    assert set(FINISHERS) <= set(GRID)
    for tries in GRID.values():
        for tried in tries.values():
            options = FINISHERS[tried.optimizer].options if tried.optimizer in FINISHERS else {}
            assert {name for name, _ in tried.options} == set(options)


def test_the_best_try_is_that_with_the_best_second_half() -> None:
    curves = {name: {"accuracy": [0.9, 0.0, 0.1, 0.1]} for tries in GRID.values() for name in tries}
    better = "adam, rate 0.01"
    curves[better] = {"accuracy": [0.0, 0.0, 0.2, 0.2]}
    assert choose(curves)["adam"] == better


def test_without_an_optimizer_the_mean_is_the_next_model_and_an_average_lags() -> None:
    last = {"w": torch.tensor([0.0, 8.0])}
    sites = [{"w": torch.tensor([4.0, 8.0])}, {"w": torch.tensor([8.0, 0.0])}]
    server = Optimizer("none", {}, ema=0.75)
    made = server.take(last, sites, [1, 3])
    assert torch.equal(made["w"], mean(sites, [1, 3])["w"])
    assert server.served(made)["w"].tolist() == [0.25 * 7.0, 0.75 * 8 + 0.25 * 2]
    assert Optimizer("none", {}).served(made) is made


def test_an_optimizer_carries_its_state_from_round_to_round() -> None:
    server = Optimizer("momentum", {"learning_rate": 0.5, "momentum": 0.5})
    first = server.take({"w": torch.zeros(2)}, [{"w": torch.tensor([4.0, -4.0])}], [1])
    assert first["w"].tolist() == [2.0, -2.0]
    second = server.take(first, [first], [1])  # no step: half of the last one is carried on
    assert second["w"].tolist() == [3.0, -3.0]


def test_leads_are_paired_by_seed() -> None:
    found = {
        name: [
            {"try": name, "seed": seed, "accuracy": [0.0, 0.0, value, value + 0.1]}
            for seed, value in enumerate(values)
        ]
        for name, values in (("mean", (0.3, 0.5)), ("adam", (0.4, 0.6)))
    }
    plain, adam = optimizer_rows(found)
    assert plain["lead"]["values"] == [0.0, 0.0]
    assert adam["lead"]["values"] == pytest.approx([0.1, 0.1])
    assert adam["lead"]["half_interval"] == pytest.approx(0.0, abs=1e-12)
    assert adam["move"]["mean"] == pytest.approx(0.1)
    assert adam["drop"]["values"] == [0.0, 0.0]
