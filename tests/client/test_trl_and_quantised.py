"""TRL's trainer and a quantised base take part by the same lines as any `transformers.Trainer`."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

import fedcore.client.hf as fl
from fedcore.server.outcome import RunResult

from .tiny_llama import llama, tokenizer, write_rows

pytestmark = pytest.mark.slow
ROUNDS = 3
OPTIONS: Any = {
    "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "learning_rate": 3e-2,
    "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16, "lr_scheduler_type": "linear",
}  # fmt: skip


def lora() -> Any:
    torch.manual_seed(1)
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def sft_trainer(folder: Path, model: Any, steps: int, peft_config: Any = None) -> Any:
    trl = pytest.importorskip("trl", reason="TRL is not installed: it comes with the extra `slow`")
    import datasets

    write_rows(folder / "rows.jsonl")
    data = datasets.load_dataset(
        "json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder)
    )
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(output_dir=str(folder), max_steps=steps, bf16=False, **OPTIONS),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def federated(trainer: Any) -> list[float]:
    """Run the documented lines; the loss of each global model."""
    losses = []
    fl.patch(trainer)
    while fl.is_running():
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.train()
    return losses


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "whole"])
def test_rounds_of_trls_trainer_are_one_unbroken_training(
    whole: bool, run: Future[RunResult], tmp_path: Path
) -> None:
    unbroken = sft_trainer(tmp_path / "one", llama(), 5 * ROUNDS, None if whole else lora())
    unbroken.train()
    trainer = sft_trainer(tmp_path / "hf", llama(), 5, None if whole else lora())
    losses = federated(trainer)
    assert run.result(200).ok
    assert losses[-1] < losses[0] - 0.1, "it learns"
    expected = unbroken.model.state_dict()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    versions = json.loads((tmp_path / "runs/t/summary.json").read_text())["versions"]
    assert [v["participants"].get("a") for v in versions[1:]] == [5 * 16] * ROUNDS
    final = load_file(
        tmp_path / "runs/t/final" / ("model.safetensors" if whole else "adapter_model.safetensors")
    )
    assert all(("lora_" in name) is not whole for name in final)
    if not whole:
        opened = PeftModel.from_pretrained(llama(), tmp_path / "runs/t/final")
        again = sft_trainer(tmp_path / "again", opened, 1).evaluate()["eval_loss"]
        assert again == pytest.approx(losses[-1], rel=1e-5)


def quantised(folder: Path) -> Any:
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: it comes with the extra `slow`"
    )
    if not folder.exists():
        llama().save_pretrained(folder)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": "cpu"}, quantization_config=config
    )


def test_an_adapter_over_a_quantised_base_travels_alone_and_opens_over_it_again(
    run: Future[RunResult], tmp_path: Path
) -> None:
    rows = [(start + torch.arange(16)) % 64 for start in range(16)]
    data: Any = [{"input_ids": row, "labels": row} for row in rows]

    def make_trainer(model: Any) -> Any:
        arguments = TrainingArguments(output_dir=str(tmp_path / "hf"), max_steps=5, **OPTIONS)
        return Trainer(model, arguments, train_dataset=data, eval_dataset=data)

    model = quantised(tmp_path / "base")
    packed = model.model.layers[0].mlp.up_proj.weight
    assert packed.dtype == torch.uint8, "four bits a value, two in a byte"
    before = packed.detach().clone()
    model = get_peft_model(prepare_model_for_kbit_training(model), lora())
    losses = federated(make_trainer(model))
    assert run.result(200).ok
    assert losses[-1] < losses[0] - 0.1, "it learns"
    assert torch.equal(packed, before)
    for version in range(ROUNDS + 1):
        sent = load_file(tmp_path / f"runs/t/models/round-{version:04d}.safetensors")
        assert len(sent) == 8
        assert all("lora_" in name for name in sent)
    opened = PeftModel.from_pretrained(quantised(tmp_path / "base"), tmp_path / "runs/t/final")
    assert make_trainer(opened).evaluate()["eval_loss"] == pytest.approx(losses[-1], rel=1e-5)
