"""The rounds of a Lightning trainer see the batches that one unbroken training sees, in its order."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fedcore.client.lightning as fl
from fedcore.client.torch import forget_site
from fedcore.errors import ConfigError
from fedcore.server.outcome import RunResult

ROUNDS = 3
ROWS = torch.arange(40.0).reshape(20, 2)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Rows whose number nobody knows beforehand."""

    def __iter__(self) -> Any:
        return iter(ROWS)


class Alternating(torch.utils.data.Sampler[int]):
    """Another order in each epoch, as the samplers of several processes have it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(
            torch.randperm(20, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        )

    def __len__(self) -> int:
        return 20


def dataset() -> Any:
    return TensorDataset(ROWS)


LOADERS: dict[str, Callable[[], Any]] = {
    "stream": lambda: DataLoader(Stream(), batch_size=2),
    "in-order": lambda: DataLoader(dataset(), batch_size=2),
    "shuffled": lambda: DataLoader(dataset(), batch_size=2, shuffle=True),
    "own-generator": lambda: DataLoader(
        dataset(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "by-epoch": lambda: DataLoader(dataset(), batch_size=2, sampler=Alternating()),
    "two": lambda: {
        "a": DataLoader(dataset(), batch_size=2),
        "b": DataLoader(Stream(), batch_size=5),
    },
}


def make_module(package: Any, **members: Any) -> Any:
    class Net(package.LightningModule):
        """Remembers what it has seen."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Linear(2, 1)
            self.seen: list[Any] = []
            self.epochs: list[int] = []

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            parts = batch.values() if isinstance(batch, dict) else [batch]
            parts = [part[0] if isinstance(part, list) else part for part in parts]
            self.seen.append([part[:, 0].int().tolist() for part in parts])
            return sum(self.net(part / 40).square().mean() for part in parts)

        def validation_step(self, batch: Any, _: int) -> None:
            part = batch[0] if isinstance(batch, list) else batch
            self.log("val_loss", self.net(part / 40).square().mean())

        def on_train_epoch_start(self) -> None:
            self.epochs.append(self.current_epoch)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
            return [optimizer], [schedule]

    for name, member in members.items():
        setattr(Net, name, member)
    return Net()


def make_trainer(package: Any, **options: Any) -> Any:
    return package.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, **options,
    )  # fmt: skip


def federated(trainer: Any, model: Any, fit: Callable[[], None], **options: Any) -> None:
    fl.patch(trainer, **options)
    while fl.is_running():
        trainer.validate(model, DataLoader(dataset(), batch_size=5), verbose=False)
        fit()


def equal_to(unbroken: Any, model: Any, tmp_path: Path) -> None:
    assert model.seen == unbroken.seen
    assert model.epochs == unbroken.epochs
    final = load_file(tmp_path / "runs/t/final/model.safetensors")
    for key, value in unbroken.state_dict().items():
        assert torch.equal(final[key], value), key


L, PL = "lightning.pytorch", "pytorch_lightning"


@pytest.mark.parametrize(
    ("name", "kind", "budget"),
    [
        pytest.param(L, "stream", {"max_steps": 4}, id="stream"),
        pytest.param(PL, "stream", {"max_steps": 4}, id="stream-pytorch_lightning"),
        pytest.param(L, "in-order", {"max_steps": 13}, id="in-order"),
        pytest.param(L, "shuffled", {"max_steps": 4}, id="shuffled"),
        pytest.param(L, "by-epoch", {"max_steps": 7}, id="by-epoch"),
        pytest.param(L, "two", {"max_steps": 3, "accumulate_grad_batches": 2}, id="two-loaders"),
        pytest.param(L, "shuffled", {"max_epochs": 2}, id="epochs"),
        pytest.param(PL, "shuffled", {"max_epochs": 2}, id="epochs-pytorch_lightning"),
        pytest.param(L, "stream", {"max_epochs": 1}, id="epochs-of-a-stream"),
    ],
)
def test_rounds_go_on_in_the_data(
    name: str, kind: str, budget: dict[str, int], run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module(name)
    total = {k: v * ROUNDS if k.startswith("max") else v for k, v in budget.items()}
    unbroken = make_module(package)
    make_trainer(package, **{"max_epochs": -1, **total}).fit(unbroken, LOADERS[kind]())

    model, trainer = make_module(package), make_trainer(package, **{"max_epochs": -1, **budget})
    loader = LOADERS[kind]()
    federated(trainer, model, lambda: trainer.fit(model, loader))
    assert run.result(200).ok
    equal_to(unbroken, model, tmp_path)


@pytest.mark.parametrize(
    "kind", ["stream", "in-order", "shuffled", "own-generator", "by-epoch", "two"]
)
def test_a_loader_that_is_made_anew_in_each_round_goes_on_as_well(
    kind: str, run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module("lightning.pytorch")
    unbroken = make_module(package)
    make_trainer(package, max_epochs=-1, max_steps=21).fit(unbroken, LOADERS[kind]())

    model, trainer = make_module(package), make_trainer(package, max_epochs=-1, max_steps=7)
    federated(trainer, model, lambda: trainer.fit(model, LOADERS[kind]()))
    assert run.result(200).ok
    equal_to(unbroken, model, tmp_path)


@pytest.mark.parametrize("reload", [0, 1])
def test_the_loaders_of_a_datamodule_go_on(
    reload: int, run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module("lightning.pytorch")

    class Data(package.LightningDataModule):
        """Makes a new loader whenever it is asked."""

        def train_dataloader(self) -> Any:
            return LOADERS["in-order"]()

    options = {"max_epochs": -1, "reload_dataloaders_every_n_epochs": reload}
    unbroken = make_module(package)
    make_trainer(package, max_steps=21, **options).fit(unbroken, datamodule=Data())

    model, trainer, data = (
        make_module(package),
        make_trainer(package, max_steps=7, **options),
        Data(),
    )
    federated(trainer, model, lambda: trainer.fit(model, datamodule=data))
    assert run.result(200).ok
    equal_to(unbroken, model, tmp_path)


@pytest.mark.parametrize("budget", [{"max_steps": 4}, {"max_epochs": 1}], ids=["steps", "epochs"])
def test_shuffled_loaders_that_are_made_in_each_epoch_go_on(
    budget: dict[str, int], run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module("lightning.pytorch")
    options = {"max_epochs": -1, "reload_dataloaders_every_n_epochs": 1}

    def loader() -> Any:
        return DataLoader(dataset(), batch_size=3, shuffle=True)

    unbroken, trainer = make_module(package), make_trainer(package, **{**options, **budget})
    total = {name: value * ROUNDS for name, value in budget.items()}
    torch.manual_seed(7)
    make_trainer(package, **{**options, **total}).fit(unbroken, loader())

    model = make_module(package)
    torch.manual_seed(7)
    federated(trainer, model, lambda: trainer.fit(model, loader()))
    assert run.result(200).ok
    equal_to(unbroken, model, tmp_path)


PERSISTENT = {"num_workers": 1, "persistent_workers": True}


@pytest.mark.parametrize(
    ("make", "budget", "anew"),
    [
        pytest.param({"shuffle": True, **PERSISTENT}, {"max_epochs": 1}, False, id="workers"),
        pytest.param({"shuffle": True, **PERSISTENT}, {"max_steps": 12}, True, id="new-workers"),
        pytest.param({"shuffle": True, "seed": 5}, {"max_epochs": 1}, True, id="new-generator"),
        pytest.param(
            {"sampler": Alternating, "num_workers": 1}, {"max_epochs": 1}, True, id="by-epoch"
        ),
    ],
)
def test_epochs_go_on_whatever_makes_the_order_of_a_loader(
    make: dict[str, Any], budget: dict[str, int], anew: bool, run: Future[RunResult]
) -> None:
    package = importlib.import_module("lightning.pytorch")

    def loader() -> Any:
        options = dict(make)
        if seed := options.pop("seed", None):
            options["generator"] = torch.Generator().manual_seed(seed)
        if sampler := options.pop("sampler", None):
            options["sampler"] = sampler()
        return DataLoader(dataset(), batch_size=2, **options)

    unbroken, model = make_module(package), make_module(package)
    total = {name: value * ROUNDS for name, value in budget.items()}
    torch.manual_seed(7)
    make_trainer(package, **{"max_epochs": -1, **total}).fit(unbroken, loader())
    trainer = make_trainer(package, **{"max_epochs": -1, **budget})
    torch.manual_seed(7)
    one = loader()
    federated(trainer, model, lambda: trainer.fit(model, loader() if anew else one))
    assert run.result(200).ok
    assert model.seen == unbroken.seen


def test_a_generator_that_a_script_seeds_by_round_keeps_its_seed(run: Future[RunResult]) -> None:
    package = importlib.import_module("lightning.pytorch")
    model, trainer = make_module(package), make_trainer(package, max_epochs=1)
    seeds = iter(range(1, 9))

    def order(seed: int) -> list[int]:
        return torch.randperm(20, generator=torch.Generator().manual_seed(seed)).mul(2).tolist()

    def loader() -> Any:
        generator = torch.Generator().manual_seed(next(seeds))
        sampler = torch.utils.data.RandomSampler(dataset(), generator=generator)
        return DataLoader(dataset(), batch_size=20, sampler=sampler)

    federated(trainer, model, lambda: trainer.fit(model, loader()))
    assert run.result(200).ok
    assert model.seen == [[order(seed)] for seed in range(1, ROUNDS + 1)]


def test_accumulation_that_a_schedule_changes_goes_on(
    run: Future[RunResult], tmp_path: Path
) -> None:
    package = importlib.import_module("lightning.pytorch")

    def make(rounds: int) -> Any:
        schedule = package.callbacks.GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})
        return make_trainer(package, max_epochs=rounds, callbacks=[schedule])

    unbroken, model = make_module(package), make_module(package)
    make(ROUNDS).fit(unbroken, LOADERS["in-order"]())
    trainer = make(1)
    federated(trainer, model, lambda: trainer.fit(model, LOADERS["in-order"]()))
    assert run.result(200).ok
    equal_to(unbroken, model, tmp_path)


def test_by_choice_each_round_begins_its_data_anew_and_says_so(
    run: Future[RunResult], caplog: pytest.LogCaptureFixture
) -> None:
    package = importlib.import_module("lightning.pytorch")
    caplog.set_level("INFO", "fedcore.client")
    model, trainer = make_module(package), make_trainer(package, max_epochs=-1, max_steps=3)
    loader = LOADERS["in-order"]()
    federated(trainer, model, lambda: trainer.fit(model, loader), data="per_round")
    assert run.result(200).ok
    assert model.seen == model.seen[:3] * ROUNDS
    assert "the data begin anew" in caplog.text


def test_a_limit_of_batches_is_for_each_epoch_and_is_named(
    run: Future[RunResult], caplog: pytest.LogCaptureFixture
) -> None:
    package = importlib.import_module("lightning.pytorch")
    caplog.set_level("INFO", "fedcore.client")
    model = make_module(package)
    trainer = make_trainer(package, max_epochs=1, limit_train_batches=2)
    federated(trainer, model, lambda: trainer.fit(model, LOADERS["in-order"]()))
    assert run.result(200).ok
    assert model.seen == model.seen[:2] * ROUNDS
    assert caplog.text.count("limit_train_batches: each epoch takes the first 2 batches") == 1


def test_an_unknown_choice_of_data_is_refused(run: Future[RunResult]) -> None:
    package = importlib.import_module("lightning.pytorch")
    with pytest.raises(ConfigError, match=r"data='anew'.*'all_rounds' or 'per_round'"):
        fl.patch(make_trainer(package, max_steps=1), data="anew")


@pytest.mark.parametrize(
    ("kind", "budget"),
    [
        ("in-order", {"max_steps": 7}),
        ("shuffled", {"max_steps": 7}),
        ("own-generator", {"max_steps": 7}),
        ("shuffled", {"max_epochs": 2}),
        ("own-generator", {"max_epochs": 1}),
    ],
    ids=["in-order", "shuffled", "own-generator", "epochs", "own-generator-epochs"],
)
def test_a_site_that_is_started_again_goes_on_with_data_optimiser_and_schedule(
    kind: str,
    budget: dict[str, int],
    run: Future[RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = importlib.import_module("lightning.pytorch")
    total = {k: v * ROUNDS for k, v in budget.items()}
    unbroken = make_module(package)
    make_trainer(package, **{"max_epochs": -1, **total}).fit(unbroken, LOADERS[kind]())

    monkeypatch.setenv("FEDCORE_WORK", str(tmp_path / "work"))
    models = []
    for number in range(ROUNDS):  # each is a process of its own
        if number:
            assert fl.is_running(), "the update is committed"
            forget_site()
        models.append(model := make_module(package))
        trainer = make_trainer(package, **{"max_epochs": -1, **budget})
        fl.patch(trainer)
        assert fl.is_running()
        trainer.validate(model, DataLoader(dataset(), batch_size=5), verbose=False)
        trainer.fit(model, LOADERS[kind]())
    while fl.is_running():
        trainer.fit(model, LOADERS[kind]())
    assert run.result(200).ok
    model.seen = [batch for one in models for batch in one.seen]
    model.epochs = [epoch for one in models for epoch in one.epochs]
    equal_to(unbroken, model, tmp_path)
