"""The global model is what a site scores and trains from, whatever callbacks and hooks put in its place."""

from __future__ import annotations

import copy
import importlib
import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedcore.client.hf as fl_hf
import fedcore.client.lightning as fl
from fedcore.client.torch import current_site, forget_site
from fedcore.server.outcome import RunResult


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return inputs, (inputs.sum(1, keepdim=True) > 0).float()


def loader() -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), batch_size=8)


def make_module(package: Any) -> Any:
    class Net(package.LightningModule):
        """A network with few weights."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
            )

        def loss(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.loss(batch)

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.05)

    return Net()


def make_trainer(package: Any, callbacks: list[Any], **options: Any) -> Any:
    return package.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=callbacks, **{"enable_checkpointing": False, "max_epochs": 2, **options},
    )  # fmt: skip


def swapping(package: Any, into: str, back: str) -> Any:
    """Return a callback that keeps an average over all rounds and swaps it in and back again in those hooks."""

    class Average(package.Callback):
        """A running average."""

        kept: list[torch.Tensor] | None = None

        def on_train_batch_end(self, _: Any, module: Any, *__: Any) -> None:
            if self.kept is None:
                self.kept = [p.detach().clone() for p in module.parameters()]
            for mean, p in zip(self.kept, module.parameters(), strict=True):
                mean.lerp_(p.detach(), 0.1)

        def swap(self, _: Any, module: Any, *__: Any) -> None:
            for mean, p in zip(self.kept or [], module.parameters(), strict=False):
                now = p.detach().clone()
                p.data.copy_(mean)
                mean.copy_(now)

    setattr(Average, into, Average.swap)
    setattr(Average, back, Average.swap)
    return Average()


def scores_and_truth(
    trainer: Any, model: Any, train: Any = None
) -> tuple[list[float], list[float]]:
    """Take part in the run; return what `validate` found of each version, and what is true of it."""
    found, truth = [], []
    fl.patch(trainer)
    while fl.is_running():
        current_site().receive(model)
        truth.append(float(copy.deepcopy(model).loss(examples()).detach()))
        found.append(trainer.validate(model, loader(), verbose=False)[0]["val_loss"])
        (train or trainer.fit)(model, loader())
    return found, truth


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_an_average_of_weights_is_sent_but_never_scored(
    name: str, run: Future[RunResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    package = importlib.import_module(name)
    averaging = package.callbacks.EMAWeightAveraging(decay=0.5)
    model, trainer = make_module(package), make_trainer(package, [averaging])

    def differ() -> None:
        """Set the average of the last round apart from the global model, as other sites' updates do."""
        for mean in averaging._average_model.parameters() if averaging._average_model else ():
            mean.data.zero_()

    def train(*args: Any) -> None:
        trainer.fit(*args)
        differ()

    found, truth = scores_and_truth(trainer, model, train)
    assert run.result(200).ok
    assert found == pytest.approx(truth)
    assert "global model was put back" not in caplog.text, "Lightning's own are known"
    final = load_file(tmp_path / "runs/t/final/model.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(final[key], value), "one site: its averages are the global model"


@pytest.mark.parametrize(
    ("into", "back"),
    [
        ("on_validation_start", "on_validation_end"),
        ("on_validation_epoch_start", "on_validation_epoch_end"),
    ],
)
def test_a_callback_that_swaps_weights_for_validation_swaps_nothing_into_the_score(
    into: str, back: str, run: Future[RunResult], caplog: pytest.LogCaptureFixture
) -> None:
    package = importlib.import_module("lightning.pytorch")
    average = swapping(package, into, back)
    model = make_module(package)
    means: list[list[torch.Tensor]] = []
    trainer = make_trainer(package, [average])

    def train(*args: Any) -> None:
        means.append([mean.clone() for mean in average.kept or []])
        trainer.fit(*args)

    found, truth = scores_and_truth(trainer, model, train)
    assert run.result(200).ok
    assert found == pytest.approx(truth)
    assert "global model was put back" in caplog.text
    assert "'net.0.bias'" in caplog.text
    weights = [p.detach() for p in model.parameters()]
    assert means[-1]
    assert not any(torch.equal(m, w) for m, w in zip(means[-1], weights, strict=True))


def test_a_hook_that_loads_other_weights_within_validation_changes_no_score(
    run: Future[RunResult],
) -> None:
    package = importlib.import_module("lightning.pytorch")
    model = make_module(package)

    def spoil(_: Any, index: int, *__: Any) -> None:
        if index == 2:
            for p in model.parameters():
                p.data.zero_()

    model.on_validation_batch_start = spoil
    found, truth = scores_and_truth(make_trainer(package, []), model)
    assert run.result(200).ok
    assert found == pytest.approx(truth)


def test_training_begins_with_the_global_model_whatever_happened_before(
    run: Future[RunResult], caplog: pytest.LogCaptureFixture
) -> None:
    package = importlib.import_module("lightning.pytorch")
    model = make_module(package)
    begun: list[torch.Tensor] = []

    class Spoiler(package.Callback):
        """Leaves zeros behind before each training."""

        def on_fit_start(self, _: Any, module: Any) -> None:
            for p in module.parameters():
                p.data.zero_()

        def on_train_start(self, _: Any, module: Any) -> None:
            begun.append(module.net[0].weight.detach().clone())

    trainer = make_trainer(package, [Spoiler()])
    fl.patch(trainer)
    expected = []
    while fl.is_running():
        trainer.validate(model, loader(), verbose=False)
        expected.append(model.net[0].weight.detach().clone())
        trainer.fit(model, loader())
    assert run.result(200).ok
    assert len(begun) == 3
    assert all(torch.equal(b, e) for b, e in zip(begun, expected, strict=False))
    assert "something else than the global model was about to be trained from" in caplog.text


@pytest.mark.parametrize(
    ("kept", "expected"), [(False, [(3, 14), (5, 22)]), (True, [(2, 8), (4, 16)])]
)
def test_a_checkpoint_of_a_requeued_job_gives_its_state_once_and_never_its_weights(
    kept: bool,
    expected: list[tuple[int, int]],
    run: Future[RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = importlib.import_module("lightning.pytorch")
    monkeypatch.setenv("FEDCORE_WORK", str(tmp_path / "work"))
    for name in ("NTASKS", "JOB_ID", "PROCID", "LOCALID", "NODEID", "NTASKS_PER_NODE"):
        monkeypatch.setenv(f"SLURM_{name}", "1" if name.startswith("NTASKS") else "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    ended = tmp_path / "hpc_ckpt_1.ckpt"

    class Ended(package.Callback):
        """The job ends in the fourth epoch."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 14:
                trainer.save_checkpoint(ended)
                raise TimeoutError

    trainer = make_trainer(package, [Ended()], default_root_dir=tmp_path)
    with pytest.raises(TimeoutError):
        scores_and_truth(trainer, make_module(package))
    assert ended.exists()
    forget_site()
    states = list((tmp_path / "work").glob("a/*/trainer-*"))
    assert states
    for path in [] if kept else states:
        shutil.rmtree(path)

    model, trainer = make_module(package), make_trainer(package, [], default_root_dir=tmp_path)
    begun, rows, steps = [], [], []

    def begin() -> None:
        state = next(iter(trainer.optimizers[0].state.values()), None)
        begun.append((trainer.current_epoch, int(state["step"]) if state else 0))

    def train(*args: Any) -> None:
        trainer.fit(*args)
        steps.append(trainer.global_step)
        rows.append(trainer._fedcore.counted.total())

    model.on_train_start = begin
    found, truth = scores_and_truth(trainer, model, train)
    assert run.result(200).ok
    assert found == pytest.approx(truth)
    assert begun == expected, "the epoch that was cut short begins anew, or the whole round"
    assert rows[:2] == [64, 64]
    assert steps[:2] == [expected[1][1], expected[1][1] + 8]


def hf_trainer(base: Any, tmp_path: Path, **given: Any) -> Any:
    from transformers import TrainingArguments

    inputs, labels = examples()
    rows = [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "hf"), max_steps=2, per_device_train_batch_size=16, learning_rate=0.05,
        report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", optim="adamw_torch",
    )  # fmt: skip
    return base(args=arguments, train_dataset=rows, eval_dataset=rows, **given)


class Regression(torch.nn.Module):
    """A model as `transformers.Trainer` takes it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.net(inputs)
        return {"loss": torch.nn.functional.mse_loss(found, labels), "logits": found}


def test_a_trainer_that_swaps_weights_in_evaluate_scores_the_global_model(
    run: Future[RunResult], tmp_path: Path
) -> None:
    from transformers import Trainer

    class Swapping(Trainer):
        """Evaluates zeros."""

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            now = copy.deepcopy(self.model.state_dict())
            for p in self.model.parameters():
                p.data.zero_()
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                self.model.load_state_dict(now)

    trainer = hf_trainer(Swapping, tmp_path, model=Regression())
    found, truth = [], []
    fl_hf.patch(trainer)
    while fl_hf.is_running():
        current_site().receive(trainer.model)
        truth.append(float(trainer.model(*examples())["loss"].detach()))
        found.append(trainer.evaluate()["eval_loss"])
        trainer.train()
    assert run.result(200).ok
    assert found == pytest.approx(truth)


def test_a_trainer_that_makes_a_model_for_each_training_trains_from_the_global_one(
    run: Future[RunResult], tmp_path: Path
) -> None:
    from transformers import Trainer, TrainerCallback

    begun: list[torch.Tensor] = []

    class First(TrainerCallback):
        """Shows the weights after the first step, which moves each by the learning rate at most."""

        def on_step_end(self, _: Any, state: Any, *__: Any, **given: Any) -> None:
            if state.global_step % 2:
                begun.append(given["model"].net.weight.detach().clone())

    trainer = hf_trainer(Trainer, tmp_path, model_init=Regression, callbacks=[First()])
    expected = []
    fl_hf.patch(trainer)
    while fl_hf.is_running():
        trainer.evaluate()
        expected.append(trainer.model.net.weight.detach().clone())
        trainer.train()
    assert run.result(200).ok
    assert len(begun) == 3
    for first, weights in zip(begun, expected, strict=False):
        torch.testing.assert_close(first, weights, rtol=0, atol=0.051)
    assert not torch.allclose(begun[0], begun[2], atol=0.051)
