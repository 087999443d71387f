"""Lightning's callbacks that change what is trained, or how, do in rounds what they do in one training."""

from __future__ import annotations

import importlib
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedcore.client.lightning as fl
from fedcore.errors import LayoutError
from fedcore.server.outcome import RunResult

ROUNDS = 3


def loader() -> Any:
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    return torch.utils.data.DataLoader(data, batch_size=8)


def make_module(package: Any, *, norm: bool = False) -> Any:
    class Net(package.LightningModule):
        """A backbone and a head."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.backbone = torch.nn.Linear(4, 8)
            self.norm = torch.nn.BatchNorm1d(8) if norm else torch.nn.Identity()
            self.head = torch.nn.Linear(8, 1)
            self.rates: list[list[float]] = []

        def loss(self, batch: Any) -> torch.Tensor:
            found = self.head(self.norm(self.backbone(batch[0])).tanh())
            return torch.nn.functional.mse_loss(found, batch[1])

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            self.rates.append([group["lr"] for group in self.optimizers().param_groups])
            return self.loss(batch)

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self) -> Any:
            trained = [p for p in self.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(trained, lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)]

    return Net()


def make_trainer(package: Any, callbacks: list[Any], epochs: int) -> Any:
    return package.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=callbacks, max_epochs=epochs,
    )  # fmt: skip


def finetuning(package: Any, epoch: int) -> Any:
    class Unfreeze(package.callbacks.BaseFinetuning):
        """Trains the head alone until that epoch."""

        def freeze_before_training(self, module: Any) -> None:
            self.freeze(module.backbone)

        def finetune_function(self, module: Any, now: int, optimizer: Any) -> None:
            if now == epoch:
                self.unfreeze_and_add_param_group(module.backbone, optimizer, lr=0.01)

    return Unfreeze()


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("epoch", [1, 2, 3], ids=["within", "between", "later"])
def test_what_is_unfrozen_within_the_run_is_trained_from_then_on(
    name: str, epoch: int, run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module(name)
    unbroken = make_module(package)
    make_trainer(package, [finetuning(package, epoch)], 2 * ROUNDS).fit(unbroken, loader())

    model, trainer = make_module(package), make_trainer(package, [finetuning(package, epoch)], 2)
    fl.patch(trainer)
    while fl.is_running():
        trainer.validate(model, loader(), verbose=False)
        trainer.fit(model, loader())
    assert run.result(200).ok
    assert model.rates == unbroken.rates
    final = load_file(tmp_path / "runs/t/final/model.safetensors")
    for key, value in unbroken.state_dict().items():
        assert torch.equal(final[key], value), key


def test_layers_that_were_frozen_when_the_site_joined_are_named_when_they_train(
    run: Future[RunResult],
) -> None:
    package = importlib.import_module("lightning.pytorch")
    model, trainer = make_module(package), make_trainer(package, [finetuning(package, 1)], 2)
    model.backbone.requires_grad_(False)
    fl.patch(trainer)
    assert fl.is_running()
    with pytest.raises(LayoutError, match=r"backbone\.weight.*requires_grad when the site joins"):
        trainer.fit(model, loader())


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch-norm"])
@pytest.mark.parametrize("start", [1, 0.5])
def test_stochastic_weight_averaging_is_for_each_round(
    start: float, norm: bool, run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module("lightning.pytorch")

    def averaging() -> Any:
        kind = package.callbacks.StochasticWeightAveraging
        return kind(swa_lrs=0.01, swa_epoch_start=start, annealing_epochs=1)

    first = make_module(package, norm=norm)
    make_trainer(package, [averaging()], 4).fit(first, loader())

    model, trainer = make_module(package, norm=norm), make_trainer(package, [averaging()], 4)
    sent, counted = [], []
    fl.patch(trainer)
    while fl.is_running():
        trainer.validate(model, loader(), verbose=False)
        trainer.fit(model, loader())
        sent.append({key: value.clone() for key, value in model.state_dict().items()})
        counted.append(trainer._fedcore.counted.total())
    assert run.result(200).ok
    for key, value in first.state_dict().items():
        assert torch.equal(sent[0][key], value), f"{key}: the first round is one training"
    assert counted[:ROUNDS] == [64] * ROUNDS, "the pass that sets batch norms anew trains nothing"
    steps = 2 * (4 + norm)
    script = [rates[0] for rates in model.rates[::steps]]
    assert script == sorted(script, reverse=True), "each round begins with the script's own rate"
    assert all(rates[0] < 0.05 for rates in model.rates[steps - 2 * norm - 1 :: steps])
    assert not torch.equal(sent[1]["head.weight"], sent[2]["head.weight"])
