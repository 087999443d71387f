"""What an optimiser trains and is no part of the model is refused by name, or stays at its site by choice."""

from __future__ import annotations

import importlib
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedcore.client.hf as fl_hf
import fedcore.client.lightning as fl_lightning
from fedcore.client.choice import forget_choice
from fedcore.client.extras import hidden_parameters, refuse_beside
from fedcore.client.parameters import ModelParameters
from fedcore.errors import LayoutError
from fedcore.server.outcome import RunResult

from ..support.trainers import hf_trainer, loader, make_trainer


class Loss(torch.nn.Module):
    """A loss with weights of its own, as those that end in a classifier have."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Linear(1, 1)

    def forward(self, outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(self.scale(outputs), labels)


def losing_trainer(tmp_path: Path) -> Any:
    trainer = hf_trainer(tmp_path, 2, remove_unused_columns=False)
    trainer.loss = Loss()

    def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        loss = trainer.loss(outputs["logits"], inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss
    parts = [*trainer.model.parameters(), *trainer.loss.parameters()]
    trainer.optimizer = torch.optim.SGD(parts, lr=0.01)
    return trainer


def test_a_loss_with_weights_of_its_own_is_refused_by_name(
    run: Future[RunResult],
    tmp_path: Path,
) -> None:
    trainer = losing_trainer(tmp_path)
    fl_hf.patch(trainer)
    assert fl_hf.is_running()
    trainer.evaluate()
    with pytest.raises(LayoutError, match=r"loss\.scale\.weight, loss\.scale\.bias") as refused:
        trainer.train()
    assert "exclude='loss.*'" in str(refused.value)


def test_a_site_may_keep_the_weights_of_its_loss_by_choice(
    run: Future[RunResult], tmp_path: Path
) -> None:
    trainer = losing_trainer(tmp_path)
    before = trainer.loss.scale.weight.detach().clone()
    fl_hf.patch(trainer, exclude="loss.*")
    while fl_hf.is_running():
        trainer.evaluate()
        trainer.train()
    assert run.result(200).ok
    assert set(load_file(tmp_path / "runs/t/final/model.safetensors")) == {"net.weight", "net.bias"}
    assert not torch.equal(trainer.loss.scale.weight, before)


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_parts_that_a_lightning_module_does_not_know_are_refused_by_name(
    name: str,
    run: Future[RunResult],
) -> None:
    package = importlib.import_module(name)

    class Model(package.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 1)
            self.heads = [torch.nn.Linear(1, 1)]

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.heads[0](self.net(batch[0])), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([*self.parameters(), *self.heads[0].parameters()], lr=0.1)

    model, trainer = Model(), make_trainer(package, max_epochs=1)
    fl_lightning.patch(trainer)
    assert fl_lightning.is_running()
    with pytest.raises(LayoutError, match=r"heads\.0\.weight, heads\.0\.bias"):
        trainer.fit(model, loader())


def test_what_a_modules_state_dict_leaves_out_is_refused_by_name() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))

    def leave_out(_: Any, state: dict[str, Any], *__: Any) -> None:
        del state["1.weight"]

    model._register_state_dict_hook(leave_out)
    with pytest.raises(LayoutError, match=r"not in the module's state_dict.*1\.weight"):
        ModelParameters(model)
    model[1].weight.requires_grad_(False)
    assert ModelParameters(model).names == ["0.weight", "0.bias", "1.bias"]


def test_what_has_no_name_is_described_and_what_is_frozen_is_let_pass() -> None:
    model = torch.nn.Linear(2, 2)
    unknown = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = torch.optim.SGD([{"params": list(model.parameters())}, {"params": [unknown]}], lr=1)
    with pytest.raises(LayoutError, match=r"shape \[3, 5\] in group 1 of the optimiser"):
        refuse_beside(model, [optimizer], {})
    unknown.requires_grad_(False)
    refuse_beside(
        model, [optimizer], hidden_parameters(object.__new__(type("Owner", (), {})), model)
    )
    forget_choice()
