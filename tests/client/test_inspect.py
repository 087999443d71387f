"""`fedcore inspect` lists what would leave, and nothing leaves while it does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import fedcore.client
import fedcore.client.hf as fl_hf
from fedcore.client.torch import forget_site
from fedcore.files.inspection import Inspection

SCRIPT = """
import sys
import numpy as np
import fedcore.client as fl

print("arguments", sys.argv[1:])
fl.init({"w": np.zeros((3, 4), np.float32), "steps": np.zeros((), np.int64)})
while fl.is_running():
    fl.log({"loss": 1.0})
    params = fl.receive()
    print("trained")
    fl.send(params, weight=1)
"""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    fedcore.client.shutdown()
    forget_site()


def inspect(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "fedcore", "inspect", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=200,
        check=False,
    )


def test_a_script_is_listed_up_to_its_first_tensors_and_no_server_is_dialled(
    tmp_path: Path,
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        done = inspect(script, "--epochs", 3, FEDCORE_SERVER=address, FEDCORE_SITE="a")
        assert done.returncode == 0, done.stderr
        with pytest.raises(BlockingIOError):
            server.accept()
    assert done.stdout.splitlines()[:3] == [
        "tensor  dtype   shape  bytes  goes as",
        "steps   I64    scalar      8  raw",
        "w       F32       3x4     48  raw",
    ]
    assert "2 tensors, 56 bytes" in done.stdout
    assert "arguments ['--epochs', '3']" in done.stderr
    assert "trained" not in done.stderr


def test_patterns_and_json(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = inspect("--json", "--exclude", "steps", script)
    assert json.loads(done.stdout)["tensors"] == [["w", "F32", [3, 4]]]


def test_the_encoding_of_a_run_is_shown_with_its_size(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("(3, 4)", "(128, 128)"))
    (tmp_path / "run.toml").write_text(
        '[run]\nname = "r"\nrounds = 1\n[participants]\ncount = 1\n[transfer]\nupdate = "int8"\n'
    )
    lines = inspect("--run", tmp_path / "run.toml", script).stdout.splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["raw", "int8"]
    assert "65,544 bytes, about 16,904 as int8;" in lines[4]  # 128 x (128 codes + a scale of 4) + 8


def test_a_script_that_fails_or_takes_no_part_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit(3)")
    failed = inspect(script)
    assert (failed.returncode, "status 3" in failed.stderr) == (1, True)
    script.write_text("print('no federation here')")
    assert "ended without taking part" in inspect(script).stderr
    assert "does not exist" in inspect(tmp_path / "none.py").stderr


def test_files_and_folders_are_listed_too(tmp_path: Path) -> None:
    save_file({"lora_A": np.zeros((8, 2), np.float16)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    done = inspect(tmp_path)
    assert "lora_A  F16      8x2     32  raw" in done.stdout, done.stderr
    assert "adapter_config.json (2 bytes)" in done.stdout
    assert "holds none of adapter_model.safetensors" in inspect(tmp_path.parent).stderr


def test_a_patched_trainer_is_listed_before_it_evaluates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

    monkeypatch.setenv("FEDCORE_INSPECT", str(tmp_path / "report.json"))
    base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    rows = [{"input_ids": torch.zeros(4, dtype=torch.long), "labels": torch.zeros(4)}]
    arguments = TrainingArguments(str(tmp_path / "out"), report_to="none", use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.evaluation_loop = lambda *_, **__: pytest.fail("it evaluated")
    fl_hf.patch(trainer, exclude="*lora_A*")
    assert fl_hf.is_running()
    with pytest.raises(SystemExit) as ended:
        trainer.evaluate()
    assert ended.value.code == 0
    found = Inspection.model_validate_json((tmp_path / "report.json").read_text())
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
    assert found.tensors == [(name, "F32", [48, 2])]
    assert list(found.files) == ["adapter_config.json", "fedcore_model.json"]
