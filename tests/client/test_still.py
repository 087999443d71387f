"""What is frozen and moves in training all the same: put back before the global model is scored, or warned of."""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fedcore.client as fl
from fedcore.client.parameters import ModelParameters
from fedcore.client.still import Still, moved_text
from fedcore.server.outcome import RunResult


def net() -> Any:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "backbone": nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU()),
            "head": nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3)),
        }
    )
    model["backbone"].requires_grad_(False)
    return model


def train(model: Any) -> None:
    model.train()
    rows = 3 * torch.randn(16, 4) + 4
    model["head"](model["backbone"](rows)).sum().backward()
    with torch.no_grad():
        for parameter in model["head"].parameters():
            parameter.sub_(0.01 * parameter.grad)


def test_statistics_of_what_is_trained_travel_without_parameters_of_their_own() -> None:
    assert set(ModelParameters(net()).names) == {
        "head.0.running_mean", "head.0.running_var", "head.0.num_batches_tracked", "head.1.weight", "head.1.bias",
    }  # fmt: skip


def test_statistics_of_a_frozen_module_are_put_back_and_named() -> None:
    model = net()
    before = {name: value.clone() for name, value in model["backbone"].state_dict().items()}
    still = Still(ModelParameters(model).frozen_tensors)
    assert still.restore(ModelParameters(model).frozen_tensors()) == ([], [])
    train(model)
    moved = model["head"][0].running_mean.clone()
    restored, left = still.restore(ModelParameters(model).frozen_tensors())
    assert restored == [
        f"backbone.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    ]
    assert left == []
    assert "backbone.1.running_mean" in moved_text(restored, left)
    for name, value in model["backbone"].state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(model["head"][0].running_mean, moved), "what travels is left alone"


def test_statistics_below_an_adapter_are_put_back() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.norm(self.first(rows))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Small(), LoraConfig(r=2, target_modules=["first"]))
    still = Still(ModelParameters(model).frozen_tensors)
    model(torch.ones(3, 4))
    restored, _ = still.restore(ModelParameters(model).frozen_tensors())
    assert restored == ["norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert float(model.base_model.model.norm.running_mean.abs().sum()) == 0


def test_frozen_parameters_that_a_script_changes_are_named() -> None:
    model = net()
    still = Still(ModelParameters(model).frozen_tensors)
    model["backbone"][0].weight.data.mul_(0.9)
    restored, moved = still.restore(ModelParameters(model).frozen_tensors())
    assert (restored, moved) == ([], ["backbone.0.weight"])
    assert "no model of the run holds them" in moved_text(restored, moved)
    assert still.restore(ModelParameters(model).frozen_tensors()) == ([], [])


def test_each_round_of_a_plain_loop_scores_the_model_that_the_server_has(
    run: Future[RunResult], caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    first = model["backbone"][1].running_mean.clone()
    fl.init(model)
    while fl.is_running():
        fl.load(fl.receive())
        assert torch.equal(model["backbone"][1].running_mean, first)
        train(model)
        fl.send(weight=16, metrics={"val_loss": 1.0})
    run.result(200)
    said = [r for r in caplog.records if "backbone.1.running_mean" in r.getMessage()]
    assert len([r for r in said if r.name == "fedcore.client"]) == 1


def test_a_module_that_was_moved_after_it_was_given_is_loaded_and_sent(
    run: Future[RunResult],
) -> None:
    model = nn.Linear(2, 1)
    fl.init(model)
    for parameter in model.parameters():  # as moving it to another device does
        parameter.data = parameter.data.clone()
    seen = []
    while fl.is_running():
        received = fl.receive()
        fl.load(received)
        assert torch.equal(model.weight, received["weight"])
        seen.append(float(model.bias.detach()))
        with torch.no_grad():
            model.bias += 1
        fl.send(weight=1, metrics={"val_loss": 1.0})
    run.result(200)
    assert [round(value - seen[0], 5) for value in seen] == [0, 1, 2, 3]
