"""Sites that train in two processes: rank 0 talks to the server, and the rounds are those of one process."""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from fedcore.server.outcome import RunResult

from ..support.ranks import SCRIPTS, finish, launch, start_two

ROUNDS = 3
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ACCELERATE = [  # without --multi_gpu it starts one process; the script says that there is no accelerator
    "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0",
]  # fmt: skip


def start(script: str, *arguments: object, launcher: list[str] | None = None) -> list[Any]:
    """Run a script that is started once, by itself or by a launcher, and starts its other processes."""
    return finish([launch([*(launcher or []), str(SCRIPTS / script), *map(str, arguments)])])


def assert_both_took_part(processes: list[Any]) -> None:
    said = "".join(process.said for process in processes)
    assert all(process.returncode == 0 for process in processes), said[-6000:]
    for rank in (0, 1):
        assert f"rank {rank} of 2: {ROUNDS + 1} passes" in said, said[-6000:]


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    return inputs, inputs.sum(1, keepdim=True)


def losses(net: torch.nn.Module, optimizer: Any, schedule: Any = None) -> list[float]:
    """Train on all rows at once, without a federation; the loss before each round and at the end."""
    inputs, labels = rows()
    found = []
    for step in range(5 * ROUNDS + 1):
        loss = torch.nn.functional.mse_loss(net(inputs), labels)
        if step % 5 == 0:
            found.append(loss.item())
        if step == 5 * ROUNDS:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return found


def assert_as_alone(
    folder: Path,
    net: torch.nn.Module,
    expected: list[float],
    metric: str,
    weight: int,
    *,
    prefix: str = "net.",
) -> None:
    final = load_file(folder / "runs/t/final/model.safetensors")
    for key, value in net.state_dict().items():
        torch.testing.assert_close(final[prefix + key], value, rtol=1e-5, atol=1e-6)
    versions = json.loads((folder / "runs/t/summary.json").read_text())["versions"]
    scores = [version["metrics_by_site"]["a"] for version in versions]
    assert [s[metric] for s in scores] == pytest.approx(expected, rel=1e-5)
    assert [s["examples"] for s in scores] == [16] * (ROUNDS + 1)
    assert [v["participants"].get("a") for v in versions[1:]] == [weight] * ROUNDS


@pytest.mark.parametrize(
    ("package", "strategy"),
    [
        ("lightning.pytorch", "ddp"),
        pytest.param("pytorch_lightning", "ddp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_of_lightning_train_as_one(
    package: str, strategy: str, run: Future[RunResult], tmp_path: Path
) -> None:
    assert_both_took_part(start("lightning_ddp.py", package, strategy))
    assert run.result(200).ok
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    expected = losses(net, torch.optim.Adam(net.parameters(), lr=1e-2))
    assert_as_alone(tmp_path, net, expected, "val_loss", 16 * 5)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.slow
def test_a_model_that_lightning_shards_trains_as_one(
    package: str, run: Future[RunResult], tmp_path: Path
) -> None:
    assert_both_took_part(start("lightning_fsdp2.py", package))
    assert run.result(200).ok
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    expected = losses(net, torch.optim.Adam(net.parameters(), lr=1e-2))
    assert_as_alone(tmp_path, net, expected, "val_loss", 16 * 5)


@pytest.mark.parametrize(
    "launcher",
    [
        None,
        pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.slow),
        pytest.param(ACCELERATE, id="accelerate", marks=pytest.mark.slow),
    ],
)
def test_two_processes_of_a_trainer_train_as_one(
    launcher: list[str] | None, run: Future[RunResult], tmp_path: Path
) -> None:
    if launcher:
        done = start("hf_ddp.py", tmp_path / "hf", launcher=launcher)
    else:
        done = start_two("hf_ddp.py", tmp_path / "hf")
    assert_both_took_part(done)
    assert run.result(200).ok
    assert_trainer_as_alone(tmp_path)


def assert_trainer_as_alone(folder: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / (5 * ROUNDS))
    expected = losses(net, optimizer, schedule)
    assert_as_alone(folder, net, expected, "eval_loss", 16 * 5)


@pytest.mark.slow
def test_a_model_that_accelerate_shards_trains_as_one(
    run: Future[RunResult], tmp_path: Path
) -> None:
    assert_both_took_part(start("hf_fsdp2.py", tmp_path / "hf", launcher=TORCHRUN))
    assert run.result(200).ok
    assert_trainer_as_alone(tmp_path)


@pytest.mark.slow
def test_a_model_whose_weights_accelerate_makes_fp32_takes_part(
    run: Future[RunResult], tmp_path: Path
) -> None:
    assert_both_took_part(start("hf_fsdp2.py", tmp_path / "hf", "bf16", launcher=TORCHRUN))
    assert run.result(200).ok
    final = load_file(tmp_path / "runs/t/final/model.safetensors")
    assert {value.dtype for value in final.values()} == {torch.float32}


@pytest.mark.slow
def test_an_adapter_that_accelerate_shards_trains_as_one(
    run: Future[RunResult], tmp_path: Path
) -> None:
    assert_both_took_part(start("hf_fsdp2.py", tmp_path / "hf", "lora", launcher=TORCHRUN))
    assert run.result(200).ok
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 1))
    net = get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 - n / (5 * ROUNDS))
    expected = losses(net, optimizer, schedule)
    versions = json.loads((tmp_path / "runs/t/summary.json").read_text())["versions"]
    scores = [version["metrics_by_site"]["a"]["eval_loss"] for version in versions]
    assert scores == pytest.approx(expected, rel=1e-5)
    sent = load_file(tmp_path / "runs/t/final/adapter_model.safetensors")
    for name, value in get_peft_model_state_dict(net).items():
        torch.testing.assert_close(sent[name.replace(".0.", ".net.")], value, rtol=1e-4, atol=1e-5)
    assert len(sent) == 2


def test_a_loop_of_its_own_runs_in_two_processes(run: Future[RunResult], tmp_path: Path) -> None:
    assert_both_took_part(start_two("plain.py", "well"))
    assert run.result(200).ok
    first = load_file(tmp_path / "runs/t/models/round-0000.safetensors")["weight"]
    final = load_file(tmp_path / "runs/t/final/model.safetensors")["weight"]
    torch.testing.assert_close(final, first + ROUNDS)


def test_a_rank_other_than_0_that_sends_is_refused_and_ends_both(run: Future[RunResult]) -> None:
    zero, one = start_two("plain.py", "send")
    assert one.returncode
    assert "ClosedError: fl.send was called by rank 1 of 2: rank 0 alone sends" in one.said
    assert zero.returncode
    assert "rank 0 lost another process of this site" in zero.said


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("script_lets_go", [[], ["destroy"]], ids=["left open", "destroyed"])
def test_no_thread_of_gloo_is_left_when_the_interpreter_ends(
    tmp_path: Path, script_lets_go: list[str]
) -> None:
    """One that still drops a tensor then aborts the process."""
    (process,) = start("leaves.py", tmp_path / "store", *script_lets_go)
    assert process.returncode == 0, process.said
    assert "at work True" in process.said
    assert "at the end 0" in process.said


@pytest.mark.parametrize(
    "script",
    [["plain.py", "frozen"], pytest.param(["hf_ddp.py", "hf", "frozen"], marks=pytest.mark.slow)],
    ids=["loop", "transformers"],
)
def test_an_error_of_rank_0_is_raised_by_all(
    script: list[str], run: Future[RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    zero, one = start_two(*script)
    assert "LayoutError: the model has no trainable tensor" in zero.said
    assert zero.returncode
    assert one.returncode


@pytest.mark.slow
def test_a_sharded_model_travels_whole_and_trains_as_one(
    run: Future[RunResult], tmp_path: Path
) -> None:
    assert_both_took_part(start_two("sharded.py"))
    assert run.result(200).ok
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3), torch.nn.Linear(3, 1)
    )
    expected = losses(net, torch.optim.Adam(net.parameters(), lr=1e-2))
    assert_as_alone(tmp_path, net, expected, "val_loss", 16 * 5, prefix="")
