"""What a Lightning trainer can do by itself, it does in rounds as well."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedcore.client.lightning as fl
from fedcore.client.torch import forget_site
from fedcore.errors import ConfigError
from fedcore.server.outcome import RunResult

ROUNDS = 3


def module_class(package: Any) -> Any:
    class Automatic(package.LightningModule):
        """One optimiser and a schedule by steps."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body = torch.nn.Linear(4, 8)
            self.head = torch.nn.Linear(8, 1)
            self.validations = 0

        def loss(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.head(self.body(batch[0]).tanh()), batch[1])

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.loss(batch)

        def validation_step(self, batch: Any, _: int) -> None:
            self.validations += 1
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.7)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    class Manual(Automatic):
        """Two optimisers with a schedule each, stepped by hand."""

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
                schedule.step()

        def configure_optimizers(self) -> Any:
            optimizers = [
                torch.optim.Adam(self.body.parameters(), lr=1e-2),
                torch.optim.SGD(self.head.parameters(), lr=1e-2, momentum=0.9),
            ]
            return optimizers, [
                torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5) for optimizer in optimizers
            ]

    return {"automatic": Automatic, "manual": Manual}


def loader() -> Any:
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(inputs, inputs.sum(1, keepdim=True))
    return torch.utils.data.DataLoader(data, batch_size=8)


def make_trainer(package: Any, **options: Any) -> Any:
    return package.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        **{"enable_checkpointing": False, "max_epochs": 2, **options},
    )  # fmt: skip


def federated(trainer: Any, model: Any, fit: Callable[..., Any] | None = None) -> None:
    fl.patch(trainer)
    while fl.is_running():
        trainer.validate(model, loader(), verbose=False)
        (fit or trainer.fit)(model, loader())


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("manual", {}),
        ("manual", {"max_epochs": -1, "max_steps": 20}),
        ("automatic", {"precision": "bf16-mixed"}),
        ("automatic", {"precision": "bf16-true"}),
        ("automatic", {"accumulate_grad_batches": 2}),
        ("automatic", {"gradient_clip_val": 0.1, "max_epochs": 5, "max_steps": 10}),
    ],
    ids=["manual", "manual-steps", "bf16", "bf16-true", "accumulation", "clipping"],
)
def test_rounds_are_one_unbroken_training(
    name: str, kind: str, options: dict[str, Any], run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module(name)
    total = {
        key: value * ROUNDS if key in ("max_epochs", "max_steps") and value > 0 else value
        for key, value in {"max_epochs": 2, **options}.items()
    }
    unbroken = module_class(package)[kind]()
    make_trainer(package, **total).fit(unbroken, loader())

    federated(make_trainer(package, **options), module_class(package)[kind]())
    assert run.result(200).ok
    final = load_file(tmp_path / "runs/t/final/model.safetensors")
    for key, value in unbroken.state_dict().items():
        assert torch.equal(final[key], value), key


def test_validation_within_fit_never_scores_the_global_model(
    run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module("lightning.pytorch")
    model = module_class(package)["automatic"]()
    trainer = make_trainer(package, num_sanity_val_steps=2)
    expected = []
    fl.patch(trainer)
    while fl.is_running():
        found = trainer.validate(model, loader(), verbose=False)
        expected.append(found[0]["val_loss"])
        before = model.validations
        trainer.fit(model, loader(), loader())
        ran = model.validations - before
        assert ran == (2 + 2 * 5 if len(expected) <= ROUNDS else 0), "sanity check and each epoch"
    assert run.result(200).ok
    versions = json.loads((tmp_path / "runs/t/summary.json").read_text())["versions"]
    assert [v["metrics_by_site"]["a"]["val_loss"] for v in versions] == pytest.approx(expected)


def test_without_validate_the_validation_within_fit_scores_nothing(
    run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module("lightning.pytorch")
    model, trainer = module_class(package)["automatic"](), make_trainer(package)
    fl.patch(trainer)
    while fl.is_running():
        trainer.fit(model, loader(), loader())
    run.result(200)
    versions = json.loads((tmp_path / "runs/t/summary.json").read_text())["versions"]
    scores = [v["metrics_by_site"].get("a", {}) for v in versions]
    assert all("val_loss" not in score for score in scores), scores


def test_early_stopping_looks_at_each_round_by_itself(run: Future[RunResult]) -> None:
    package = importlib.import_module("lightning.pytorch")

    class Worse(module_class(package)["automatic"]):
        """A loss that is best at once in each round and best of all in the first."""

        seen = 0.0

        def validation_step(self, batch: Any, _: int) -> None:
            self.seen += 1.0
            self.log("val_loss", self.seen)

    stopper = package.callbacks.EarlyStopping("val_loss", patience=2)
    trainer = make_trainer(
        package, max_epochs=9, callbacks=[stopper], limit_val_batches=1, num_sanity_val_steps=0
    )
    model, epochs = Worse(), []
    fl.patch(trainer)
    while fl.is_running():
        before = trainer.current_epoch
        trainer.fit(model, loader(), loader())
        epochs.append(trainer.current_epoch - before)
    assert run.result(200).ok
    assert epochs == [3, 3, 3, 0], "the first epoch of a round is its best, then two are waited for"


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_a_limit_of_time_is_for_each_round(
    name: str, run: Future[RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = importlib.import_module(name)
    clock = [0.0]
    monkeypatch.setattr(
        package.callbacks.timer, "time", SimpleNamespace(monotonic=lambda: clock[0])
    )

    class Slow(module_class(package)["automatic"]):
        """Three seconds a step."""

        def on_train_batch_start(self, *_: Any) -> None:
            clock[0] += 3.0

    def trainer_of_a_process() -> Any:
        trainer = make_trainer(package, max_epochs=4, max_time={"seconds": 10})
        fl.patch(trainer)
        return trainer

    def steps_of_a_round(checkpoint: Path | None = None) -> int:
        before = trainer.global_step
        trainer.fit(model, loader(), ckpt_path=checkpoint)
        clock[0] += 100.0
        return trainer.global_step - before

    model, trainer = Slow(), trainer_of_a_process()
    for _ in range(2):
        assert fl.is_running()
        assert steps_of_a_round() == 4
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    assert fl.is_running()
    forget_site()

    model, trainer = Slow(), trainer_of_a_process()
    assert fl.is_running()
    assert steps_of_a_round(tmp_path / "kept.ckpt") == 8 + 4, "those of the checkpoint too"
    while fl.is_running():
        assert steps_of_a_round() == 0
    assert run.result(200).ok


def test_checkpoints_are_written_in_each_round_and_a_restarted_site_resumes_from_one(
    run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module("lightning.pytorch")
    model_class = module_class(package)["automatic"]
    unbroken = model_class()
    make_trainer(package, max_epochs=2 * ROUNDS).fit(unbroken, loader())

    def trainer_of_a_process() -> Any:
        saver = package.callbacks.ModelCheckpoint(tmp_path / "kept", save_last=True)
        trainer = make_trainer(package, enable_checkpointing=True, callbacks=[saver])
        fl.patch(trainer)
        return trainer

    model, trainer = model_class(), trainer_of_a_process()
    for _ in range(2):
        assert fl.is_running()
        trainer.fit(model, loader())
        assert torch.load(tmp_path / "kept/last.ckpt")["global_step"] == trainer.global_step
    assert fl.is_running(), "the update of the second round is committed"
    forget_site()

    model, trainer = model_class(), trainer_of_a_process()
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(9.0)
    assert fl.is_running()
    trainer.fit(model, loader(), ckpt_path=tmp_path / "kept/last.ckpt")
    assert trainer.global_step == 5 * 2 * ROUNDS
    while fl.is_running():
        trainer.fit(model, loader())
    assert run.result(200).ok
    final = load_file(tmp_path / "runs/t/final/model.safetensors")
    for key, value in unbroken.state_dict().items():
        assert torch.equal(final[key], value), key


def test_another_model_than_the_global_one_is_not_scored(run: Future[RunResult]) -> None:
    package = importlib.import_module("lightning.pytorch")
    model, trainer = module_class(package)["automatic"](), make_trainer(package)
    fl.patch(trainer)
    assert fl.is_running()
    with pytest.raises(ConfigError, match="ckpt_path"):
        trainer.validate(model, loader(), ckpt_path="best")


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_a_strategy_that_ends_its_processes_after_each_fit_is_refused(
    strategy: str, run: Future[RunResult]
) -> None:
    package = importlib.import_module("lightning.pytorch")
    trainer = make_trainer(package, strategy=strategy, devices=2)
    with pytest.raises(ConfigError, match=r"in each call of fit.*strategy='ddp'"):
        fl.patch(trainer)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_a_strategy_that_keeps_copies_of_the_weights_is_refused(
    name: str, run: Future[RunResult]
) -> None:
    package = importlib.import_module("lightning.pytorch")
    # The real ones need accelerators.
    strategy = type(name, (package.strategies.SingleDeviceStrategy,), {})(torch.device("cpu"))
    trainer = make_trainer(package, strategy=strategy)
    with pytest.raises(ConfigError, match=rf"{name}, which keeps copies.*ModelParallelStrategy"):
        fl.patch(trainer)
