"""What a script can get wrong, and what it is told then."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedcore.client
import fedcore.client.hf as fl_hf
import fedcore.client.lightning as fl_lightning
from fedcore import protocol
from fedcore.client.parameters import ModelParameters
from fedcore.errors import ClosedError, ConfigError, LayoutError, MetricError
from fedcore.server.outcome import RunResult
from fedcore.site.metrics import MetricCheck


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.net(inputs)
        return {"loss": torch.nn.functional.mse_loss(found, labels), "logits": found}


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    from transformers import Trainer, TrainingArguments

    def make(model: torch.nn.Module | None = None, rows: int = 8, **options: Any) -> Any:
        inputs = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1))
        data = [{"inputs": row, "labels": row.sum(0, keepdim=True)} for row in inputs]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "hf"), report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no",
            **{"max_steps": 1, **options},
        )  # fmt: skip
        return Trainer(model or Model(), arguments, train_dataset=data, eval_dataset=data)

    return make


def lightning_trainer(**options: Any) -> Any:
    import lightning

    return lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **{"max_epochs": 1, **options},
    )  # fmt: skip


def lightning_model() -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Module()


def test_a_trainer_is_patched_once(
    run: Future[RunResult], make_trainer: Callable[..., Any]
) -> None:
    trainer = make_trainer()
    fl_hf.patch(trainer)
    with pytest.raises(ClosedError, match=r"this trainer is patched already.*once"):
        fl_hf.patch(trainer)
    with pytest.raises(ClosedError, match="another trainer"):
        fl_hf.patch(make_trainer())
    fedcore.client.torch.forget_site()
    trainer = lightning_trainer()
    fl_lightning.patch(trainer)
    with pytest.raises(ClosedError, match=r"this trainer is patched already.*once"):
        fl_lightning.patch(trainer)


def test_training_before_the_loop_is_refused(
    run: Future[RunResult], make_trainer: Callable[..., Any]
) -> None:
    trainer = make_trainer()
    fl_hf.patch(trainer)
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(ClosedError, match=r"before fl\.is_running\(\)"):
            call()
    fedcore.client.torch.forget_site()
    other = lightning_trainer()
    fl_lightning.patch(other)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(4, 4)))
    for fit in (other.fit, other.validate):
        with pytest.raises(ClosedError, match=r"before fl\.is_running\(\)"):
            fit(lightning_model(), data)


def test_a_model_without_values_is_refused_by_its_tensor(
    run: Future[RunResult], make_trainer: Callable[..., Any]
) -> None:
    trainer = make_trainer()
    with torch.device("meta"):
        trainer.model.net = torch.nn.Linear(4, 1)
    fl_hf.patch(trainer)
    assert fl_hf.is_running()
    with pytest.raises(LayoutError, match=r"net\.weight.*meta device"):
        trainer.train()
    with pytest.raises(LayoutError, match=r"weight.*meta device"):
        fedcore.client.init(torch.nn.Linear(4, 1, device="meta"))


def test_a_round_without_training_examples_is_refused(run: Future[RunResult]) -> None:
    trainer, model = lightning_trainer(limit_train_batches=0), lightning_model()
    fl_lightning.patch(trainer)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(4, 4)))
    assert fl_lightning.is_running()
    with pytest.raises(ClosedError, match="trained on no example"):
        trainer.fit(model, data)


@pytest.mark.parametrize("changed", [False, True])
def test_an_update_that_is_all_zeros_is_warned_of(
    changed: bool,
    run: Future[RunResult],
    make_trainer: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = make_trainer(learning_rate=0.1 if changed else 0.0)
    fl_hf.patch(trainer)
    caplog.set_level(logging.WARNING)
    while fl_hf.is_running():
        trainer.train()
    assert run.result(200).ok
    for logger in ("fedcore.client", "fedcore.server"):
        said = [r.getMessage() for r in caplog.records if r.name == logger]
        assert any("round 1 is all zeros" in text for text in said) is not changed, said


def test_an_update_of_a_plain_loop_that_is_all_zeros_is_warned_of(
    run: Future[RunResult], caplog: pytest.LogCaptureFixture
) -> None:
    fedcore.client.init({"a": np.ones(3, np.float32), "b": np.ones(700_000, np.float64)})
    caplog.set_level(logging.WARNING)
    while fedcore.client.is_running():
        params = fedcore.client.receive()
        if fedcore.client.is_train() and fedcore.client.system_info()["round"] != 2:
            params["b"][-1] += 1
        fedcore.client.send(params, weight=1, metrics={"val_loss": 1.0})
    assert run.result(200).ok
    said = [r.getMessage() for r in caplog.records if r.name == "fedcore.client"]
    assert [text for text in said if "all zeros" in text] == [t for t in said if "round 2" in t]
    assert any("round 2" in text for text in said)


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_metric_that_no_site_reports_is_told_with_those_that_they_do(
    evaluates: bool,
    run: Future[RunResult],
    make_trainer: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = make_trainer()
    fl_hf.patch(trainer)
    while fl_hf.is_running():
        if evaluates:
            trainer.evaluate()
        trainer.train()
    assert run.result(200).ok
    said = "\n".join(r.getMessage() for r in caplog.records if r.name == "fedcore.server")
    assert "no model was scored with 'val_loss'" in said
    what = "eval_loss: set selection.metric to one of them" if evaluates else "no metric: call "
    assert f"the sites reported {what}" in said
    early = (
        "reports eval_loss of model 0, and not val_loss"
        if evaluates
        else "reports no metric of model 0"
    )
    assert said.count(early) == 1
    assert said.index(early) < said.index("no model was scored")


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"x": [1, 2]}, "'x' is a list, which is no number; give one number"),
        ({"x": "0.3"}, r"'x' is the text '0.3'; give a number, such as float\('0.3'\)"),
        ({"x": torch.ones(2)}, "'x' is a Tensor, which is no number"),
        ({str(i): 1.0 for i in range(65)}, "65 are given; at most 64"),
        ([("x", 1.0)], "expected numbers by name"),
        ({"x": 10**400}, "'x' is too large"),
    ],
)
def test_a_metric_that_is_no_number_is_named_at_the_site(metrics: Any, said: str) -> None:
    with pytest.raises(MetricError, match=said):
        MetricCheck()(metrics)


def test_a_metric_whose_name_cannot_travel_goes_under_one_that_can() -> None:
    given = {"loss\udc80": 1.0, "\x1b[2Jloss": 2.0, "": 3.0}
    found = MetricCheck()(given)
    assert found == {r"loss\udc80": 1.0, r"\x1b[2Jloss": 2.0, "unnamed": 3.0}
    protocol.Log(round=1, step=0, metrics=found)


def test_a_metric_that_is_not_finite_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    given = {"loss": torch.tensor(0.5), "odd_metric": float("nan"), "n": np.int64(3), "ok": True}
    check = MetricCheck()
    for _ in range(3):
        found = check(given)
    assert (found["loss"], found["n"], found["ok"]) == (0.5, 3.0, 1.0)
    assert [r.getMessage() for r in caplog.records] == [
        "metrics: 'odd_metric' is nan; it counts in no mean over the sites"
    ]


def test_what_is_neither_a_module_nor_a_mapping_is_refused(run: Future[RunResult]) -> None:
    with pytest.raises(LayoutError, match=r"was given list: expected a torch module, or a mapping"):
        fedcore.client.init([1, 2, 3])
    fedcore.client.shutdown()
    assert not run.done()


def test_values_that_a_loaded_model_would_not_reach_are_refused(
    run: Future[RunResult], make_trainer: Callable[..., Any]
) -> None:
    class FullyShardedDataParallel(torch.nn.Sequential):
        """Has the name of FSDP1's wrapper, which needs a process group to be made."""

    with pytest.raises(LayoutError, match=r"FSDP1.*use FSDP2"):
        ModelParameters(torch.nn.Sequential(FullyShardedDataParallel(torch.nn.Linear(2, 1))))
    partitioned = torch.nn.Linear(2, 1)
    partitioned.weight.ds_id = 0
    with pytest.raises(LayoutError, match="DeepSpeed"):
        ModelParameters(partitioned)
    trainer = make_trainer()
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ConfigError, match="DeepSpeed"):
        fl_hf.patch(trainer)


def test_what_describes_the_model_is_made_once_in_a_run_and_each_tensor_read_once_a_round(
    run: Future[RunResult], make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer()
    made: list[object] = []
    read: list[str] = []
    cards = ModelParameters.files.fget
    values = ModelParameters.read
    monkeypatch.setattr(ModelParameters, "files", property(lambda p: made.append(p) or cards(p)))
    monkeypatch.setattr(ModelParameters, "read", lambda p, n: read.append(n) or values(p, n))
    model = trainer.model
    fl_hf.patch(trainer)
    while fl_hf.is_running():
        trainer.evaluate()
        trainer.train()
    assert run.result(200).ok
    assert len(made) == 1
    assert sorted(read) == sorted(["net.weight", "net.bias"] * 4), (
        "the initial model, three updates"
    )
    assert trainer.model is model
