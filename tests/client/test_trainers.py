"""Patched trainers in a real run with one site: rounds must add up to one unbroken training."""

from __future__ import annotations

import contextlib
import importlib
import sqlite3
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedcore.client.hf as fl_hf
import fedcore.client.lightning as fl_lightning
from fedcore.errors import ClosedError, ConfigError, LayoutError
from fedcore.server.outcome import RunResult
from fedcore.server.storage.history import read_scores

from ..support.trainers import hf_trainer, lightning_module, loader, make_trainer

ROUNDS = 3


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("budget", ["max_epochs", "max_steps"])
def test_rounds_of_lightning_are_one_unbroken_training(
    name: str, budget: str, run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module(name)
    per_round = {"max_epochs": 2} if budget == "max_epochs" else {"max_steps": 10, "max_epochs": -1}
    total = (
        {"max_epochs": 2 * ROUNDS}
        if budget == "max_epochs"
        else {"max_steps": 10 * ROUNDS, "max_epochs": -1}
    )
    unbroken = lightning_module(package)
    make_trainer(package, **total).fit(unbroken, loader())

    model, trainer = lightning_module(package), make_trainer(package, **per_round)
    fl_lightning.patch(trainer)
    passes = 0
    while fl_lightning.is_running():
        assert fl_lightning.system_info()["site"] == "a"
        trainer.validate(model, loader(), verbose=False)
        trainer.fit(model, loader())
        passes += 1
    result = run.result(200)
    assert result.ok
    assert passes == ROUNDS + 1
    final = load_file(tmp_path / "runs/t/final/model.safetensors")
    assert model.rates == unbroken.rates
    assert set(final) == set(unbroken.state_dict())
    for key, value in unbroken.state_dict().items():
        assert torch.equal(final[key], value), key


@pytest.mark.parametrize("inside", ["no", "steps"])
def test_rounds_of_a_trainer_are_one_unbroken_training(
    inside: str, run: Future[RunResult], tmp_path: Path
) -> None:
    unbroken = hf_trainer(tmp_path, 5 * ROUNDS)
    unbroken.train()

    trainer = hf_trainer(tmp_path, 5, eval_strategy=inside, eval_steps=2)
    fl_hf.patch(trainer)
    passes = 0
    while fl_hf.is_running():
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        passes += 1
    result = run.result(200)
    assert result.ok
    assert passes == ROUNDS + 1
    final = load_file(tmp_path / "runs/t/final/model.safetensors")
    for key, value in unbroken.model.state_dict().items():
        torch.testing.assert_close(final[key], value, rtol=1e-5, atol=1e-6)
    import json

    summary = json.loads((tmp_path / "runs/t/summary.json").read_text())
    scores = [v["metrics_by_site"]["a"] for v in summary["versions"]]
    assert scores[-1]["eval_loss"] == pytest.approx(before)
    assert [s["examples"] for s in scores] == [16] * (ROUNDS + 1)
    assert [v["participants"].get("a") for v in summary["versions"]] == [None, 80, 80, 80]


def test_several_sets_of_rows_are_one_score(run: Future[RunResult], tmp_path: Path) -> None:
    import json

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        """Rows whose number nobody knows beforehand."""

        def __iter__(self) -> Any:
            return iter(rows[:5])

    trainer = hf_trainer(tmp_path, 1)
    rows = trainer.train_dataset
    trainer.eval_dataset = {"all": rows, "streamed": Stream()}
    fl_hf.patch(trainer)
    while fl_hf.is_running():
        found = trainer.evaluate()
        trainer.train()
    assert run.result(200).ok
    last = json.loads((tmp_path / "runs/t/summary.json").read_text())["versions"][-1]
    scored = {name: found[name] for name in ("eval_all_loss", "eval_streamed_loss")}
    assert last["metrics_by_site"]["a"] == pytest.approx({**scored, "examples": 16 + 5})
    assert rows_of_metrics(tmp_path) == {"eval_all_loss": 16, "eval_streamed_loss": 5}


def rows_of_metrics(folder: Path) -> Any:
    """Return the numbers of examples that the server weighs the last model's metrics by."""
    with contextlib.closing(sqlite3.connect(folder / "runs/t/run.sqlite")) as journal:
        found = read_scores(lambda query: journal.execute(query).fetchall())
    return found[ROUNDS][0].rows


def test_each_of_several_loaders_weighs_its_own_metrics(
    run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module("lightning.pytorch")

    class Model(type(lightning_module(package))):  # type: ignore[misc]
        def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, index)

    sets = [torch.utils.data.TensorDataset(torch.ones(n, 4), torch.ones(n, 1)) for n in (3, 10)]
    loaders = [torch.utils.data.DataLoader(one, batch_size=4) for one in sets]
    model, trainer = Model(), make_trainer(package, max_epochs=1)
    fl_lightning.patch(trainer)
    while fl_lightning.is_running():
        trainer.validate(model, loaders, verbose=False)
        trainer.fit(model, loader())
    assert run.result(200).ok
    rows = {"val_loss/dataloader_idx_0": 3, "val_loss/dataloader_idx_1": 10}
    assert rows_of_metrics(tmp_path) == rows


def test_a_checkpoint_is_no_place_to_train_from(run: Future[RunResult], tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path, 1)
    fl_hf.patch(trainer)
    assert fl_hf.is_running()
    for given, named in (((True,), {}), ((), {"resume_from_checkpoint": str(tmp_path)})):
        with pytest.raises(ConfigError, match=r"resume_from_checkpoint.*global model"):
            trainer.train(*given, **named)
    trainer.train(resume_from_checkpoint=None)
    while fl_hf.is_running():
        trainer.train()
    assert run.result(200).ok


def test_a_model_with_nothing_to_train_is_refused(run: Future[RunResult], tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path, 1)
    trainer.model.requires_grad_(False)
    fl_hf.patch(trainer)
    assert fl_hf.is_running()
    with pytest.raises(LayoutError, match="no trainable tensor"):
        trainer.train()


def test_training_twice_in_one_round_is_refused(run: Future[RunResult], tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path, 1)
    fl_hf.patch(trainer)
    assert fl_hf.is_running()
    trainer.train()
    with pytest.raises(ClosedError, match="twice in one round"):
        trainer.train()


def test_after_the_run_a_lightning_trainer_is_as_unpatched(run: Future[RunResult]) -> None:
    package = importlib.import_module("lightning.pytorch")
    model, trainer = lightning_module(package), make_trainer(package, max_epochs=2)
    fl_lightning.patch(trainer)
    while fl_lightning.is_running():
        trainer.validate(model, loader(), verbose=False)
        trainer.fit(model, loader())
    assert run.result(200).ok
    assert not fl_lightning.is_running()
    final = {key: value.clone() for key, value in model.state_dict().items()}
    before = trainer.validate(model, loader(), verbose=False)[0]["val_loss"]
    steps = len(model.rates)
    trainer.fit(model, loader())
    assert len(model.rates) == steps, "its budget is spent"
    for key, value in model.state_dict().items():
        assert torch.equal(final[key], value), key
    trainer.fit_loop.max_epochs += 2
    trainer.fit(model, loader())
    assert model.rates[steps:] == [1e-2] * 5 + [5e-3] * 5, "with new optimisers, as ever"
    assert trainer.validate(model, loader(), verbose=False)[0]["val_loss"] < before
    assert not fl_lightning.is_running()


def test_after_the_run_a_trainer_is_as_unpatched(run: Future[RunResult], tmp_path: Path) -> None:
    trainer = hf_trainer(tmp_path, 5, logging_steps=1)
    fl_hf.patch(trainer)
    while fl_hf.is_running():
        trainer.evaluate()
        trainer.train()
    assert run.result(200).ok
    assert not fl_hf.is_running()
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02]), "a schedule of its own, as ever"
    assert trainer.evaluate()["eval_loss"] < before
    assert not fl_hf.is_running()


def test_what_is_no_trainer_is_refused_with_the_module_to_import(
    run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module("pytorch_lightning")
    lightning_trainer = make_trainer(package, max_epochs=1)
    with pytest.raises(ConfigError, match=r"pytorch_lightning.*import fedcore\.client\.lightning"):
        fl_hf.patch(lightning_trainer)
    with pytest.raises(ConfigError, match=r"import fedcore\.client\.hf as fl"):
        fl_lightning.patch(hf_trainer(tmp_path, 1))
    module = lightning_module(package)
    for patch in (fl_lightning.patch, fl_hf.patch):
        with pytest.raises(ConfigError, match=r"Model.*pass the Trainer"):
            patch(module)
        with pytest.raises(ConfigError, match=r"Trainer, a class.*pass an instance"):
            patch(package.Trainer)
        with pytest.raises(ConfigError, match=r"dict.*import fedcore\.client as fl"):
            patch({})
        with pytest.raises(ConfigError, match="NoneType"):
            patch(None)
    fl_lightning.patch(lightning_trainer)
