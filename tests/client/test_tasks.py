"""What scripts do in tasks beyond training, and what they are told where they do something else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import fedcore.client as fl
import fedcore.client.hf as fl_hf
from fedcore.client.torch import forget_site
from fedcore.config import parse_run
from fedcore.errors import ClosedError, ProtocolError
from fedcore.server.outcome import RunResult
from fedcore.server.service import Server

Start = Callable[..., Future[RunResult]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a server of the given task for this process as its one site."""
    servers: list[Server] = []
    with ThreadPoolExecutor(1) as pool:

        def run(task: str, *, initial: bool = True) -> Future[RunResult]:
            save_file({"w": np.full(3, 2, np.float32)}, tmp_path / "start.safetensors")
            config = parse_run(
                {
                    "run": {"name": "t", "task": task},
                    "model": {"initial": "start.safetensors"} if initial else {},
                    "participants": {"sites": ["a"], "idle_timeout": "60s"},
                    "server": {"listen": "tcp://127.0.0.1:0", "insecure": True},
                },
                folder=tmp_path,
            )
            servers.append(Server(config))
            monkeypatch.setenv("FEDCORE_SERVER", servers[0].endpoint)
            monkeypatch.setenv("FEDCORE_SITE", "a")
            monkeypatch.setenv("FEDCORE_INSECURE", "1")
            return pool.submit(servers[0].run)

        try:
            yield run
        finally:
            fl.shutdown()
            forget_site()
            for server in servers:
                server.stop()


def models(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "runs/t/results.json").read_text())["models"]
    return found


def test_an_answer_is_given_once_and_in_its_own_task_alone(start: Start, tmp_path: Path) -> None:
    result = start("infer")
    fl.init()
    assert fl.is_running()
    with pytest.raises(ClosedError, match=r"asks for outputs.*fl\.answer"):
        fl.send({"w": np.zeros(3, np.float32)}, weight=1)
    with pytest.raises(ProtocolError, match=r"answer: outputs.rows: .*numbers, texts and lists"):
        fl.answer({"rows": {"a": 1}})
    with pytest.raises(ProtocolError, match="exceed the limit of 1,048,576"):
        fl.answer({"text": "x" * (1 << 20)})
    fl.answer({"labels": np.array([1, 2]), "mean": torch.tensor(0.5), "text": "fine"}, examples=2)
    with pytest.raises(ClosedError, match="sent already"):
        fl.answer({"text": "again"})
    assert not fl.is_running()
    assert result.result(200).ok
    outputs = {"labels": [1, 2], "mean": 0.5, "text": "fine"}
    assert models(tmp_path)[0]["sites"]["a"] == {"examples": 2, "metrics": {}, "outputs": outputs}


def test_a_task_that_trains_takes_no_answer(start: Start) -> None:
    start("compare")
    fl.init()
    assert fl.is_running()
    assert fl.is_submit()
    with pytest.raises(ClosedError, match="'submit' takes no answer"):
        fl.answer({"text": "x"})


def test_outputs_leave_through_a_block_too(start: Start, tmp_path: Path) -> None:
    result = start("infer")
    fl.init()
    while fl.is_running():
        with fl.task() as task:
            assert task.kind == "infer"
            task.outputs = {"sum": float(task.params["w"].sum())}
    assert result.result(200).ok
    assert models(tmp_path)[0]["sites"]["a"]["outputs"] == {"sum": 6.0}


def test_a_patched_trainer_submits_what_it_trains_by_itself(start: Start, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(2, 1)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": torch.nn.functional.mse_loss(self.net(x), labels)}

    rows = [{"x": torch.ones(2), "labels": torch.tensor([5.0])}] * 4
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=30, learning_rate=0.05, report_to="none", use_cpu=True
    )
    trainer = Trainer(Model(), arguments, train_dataset=rows, eval_dataset=rows)
    result = start("compare", initial=False)
    fl_hf.patch(trainer)
    while fl_hf.is_running():
        trainer.evaluate()
        trainer.train()
    assert result.result(200).ok
    initial, own = models(tmp_path)
    assert (initial["from"], own["from"]) == ("initial", "a")
    assert own["metrics"]["eval_loss"] < initial["metrics"]["eval_loss"]
