"""Learning rates over the rounds of a run: those of one unbroken training, or the same in every round."""

from __future__ import annotations

import importlib
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

import fedcore.client.hf as fl_hf
import fedcore.client.lightning as fl_lightning
from fedcore.server.outcome import RunResult

from ..support.trainers import make_trainer

ROUNDS = 3
ROWS, BATCH = 40, 8


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))
    return inputs, inputs.sum(1, keepdim=True)


def loader() -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows()), batch_size=BATCH)


def one_cycle(optimizer: Any, steps: int) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)


def cosine(optimizer: Any, steps: int) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)


def lightning_module(package: Any, schedule: Any) -> Any:
    class Model(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(4, 1)
            self.rates: list[float] = []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            self.rates.append(self.optimizers().param_groups[0]["lr"])
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val_loss", torch.nn.functional.mse_loss(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
            scheduler = schedule(optimizer, self.trainer.estimated_stepping_batches)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    return Model()


def lightning_trainer(package: Any, budget: dict[str, int], rounds: int = 1) -> Any:
    whole = {name: value * rounds if value > 0 else value for name, value in budget.items()}
    return make_trainer(package, **whole)


def federated(trainer: Any, model: Any, **options: Any) -> None:
    fl_lightning.patch(trainer, **options)
    while fl_lightning.is_running():
        trainer.validate(model, loader(), verbose=False)
        trainer.fit(model, loader())


PACKAGES = pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
SCHEDULES = pytest.mark.parametrize("schedule", [one_cycle, cosine])
BUDGETS = pytest.mark.parametrize(
    "budget",
    [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 7}, {"max_epochs": 2, "max_steps": 7}],
    ids=["epochs", "steps", "both"],
)


@PACKAGES
@SCHEDULES
@BUDGETS
def test_a_lightning_schedule_spans_all_rounds(
    name: str, schedule: Any, budget: dict[str, int], run: Future[RunResult]
) -> None:
    package = importlib.import_module(name)
    unbroken = lightning_module(package, schedule)
    lightning_trainer(package, budget, ROUNDS).fit(unbroken, loader())

    model = lightning_module(package, schedule)
    federated(lightning_trainer(package, budget), model)
    assert run.result(200).ok
    assert len(model.rates) == ROUNDS * (7 if "max_steps" in budget else 10)
    assert model.rates == unbroken.rates


@SCHEDULES
@BUDGETS
def test_without_the_optimizers_state_a_lightning_schedule_is_per_round(
    schedule: Any, budget: dict[str, int], run: Future[RunResult]
) -> None:
    package = importlib.import_module("lightning.pytorch")
    alone = lightning_module(package, schedule)
    lightning_trainer(package, budget).fit(alone, loader())

    model = lightning_module(package, schedule)
    federated(lightning_trainer(package, budget), model, keep_optimizer=False)
    assert run.result(200).ok
    assert model.rates == alone.rates * ROUNDS


def hf_trainer(folder: Path, kind: str, rounds: int = 1, **budget: Any) -> tuple[Any, list[float]]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(4, 1)

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            found = self.net(inputs)
            return {"loss": torch.nn.functional.mse_loss(found, labels), "logits": found}

    rates: list[float] = []

    class Rates(TrainerCallback):
        def on_step_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    data = [{"inputs": x, "labels": y} for x, y in zip(*rows(), strict=True)]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, learning_rate=0.1, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", lr_scheduler_type=kind, warmup_steps=3,
        **{name: value * rounds for name, value in budget.items()},
    )  # fmt: skip
    return Trainer(
        Model(), arguments, train_dataset=data, eval_dataset=data, callbacks=[Rates()]
    ), rates


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("budget", [{"num_train_epochs": 2}, {"max_steps": 7}], ids=str)
@pytest.mark.parametrize("lr_schedule", ["all_rounds", "per_round"])
def test_a_trainers_schedule_spans_all_rounds_or_each(
    kind: str, budget: dict[str, int], lr_schedule: Any, run: Future[RunResult], tmp_path: Path
) -> None:
    spans = lr_schedule == "all_rounds"
    other, expected = hf_trainer(tmp_path, kind, ROUNDS if spans else 1, **budget)
    other.train()

    trainer, rates = hf_trainer(tmp_path, kind, **budget)
    fl_hf.patch(trainer, lr_schedule=lr_schedule)
    while fl_hf.is_running():
        trainer.evaluate()
        trainer.train()
    assert run.result(200).ok
    assert rates == pytest.approx(expected if spans else expected * ROUNDS, rel=1e-12)
