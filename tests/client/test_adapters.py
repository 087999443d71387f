"""Adapters are switched by one line, and what comes out of a run opens with PEFT and scores as it did."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import fedcore.client.hf as fl
from fedcore.errors import ConfigError
from fedcore.server.outcome import RunResult

KIND: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **KIND),
    "ia3": IA3Config(
        target_modules=["c_attn", "c_fc"], feedforward_modules=["c_fc"], fan_in_fan_out=True, **KIND
    ),
    "prompt": PromptTuningConfig(num_virtual_tokens=4, **KIND),
    "p-tuning": PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, **KIND),
}
ROWS = [(start + torch.arange(8)) % 32 for start in range(16)]
DATA: Any = [{"input_ids": row, "labels": row} for row in ROWS]


def base() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )  # fmt: skip


def make_trainer(model: Any, folder: Path, **options: Any) -> Any:
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=16, report_to=[], disable_tqdm=True,
        use_cpu=True, **{"learning_rate": 3e-2, "max_steps": 5, "save_strategy": "no", **options},
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_final_adapter_opens_with_peft_and_scores_as_it_did(
    adapter: str, run: Future[RunResult], tmp_path: Path
) -> None:
    trainer = make_trainer(get_peft_model(base(), ADAPTERS[adapter]), tmp_path / "hf")
    fl.patch(trainer)
    losses = []
    while fl.is_running():
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.train()
    assert run.result(200).ok
    assert losses[-1] < losses[0], "it learns"
    versions = json.loads((tmp_path / "runs/t/summary.json").read_text())["versions"]
    assert versions[-1]["metrics_by_site"]["a"]["eval_loss"] == pytest.approx(losses[-1])
    opened = PeftModel.from_pretrained(base(), tmp_path / "runs/t/final")
    again = make_trainer(opened, tmp_path / "again").evaluate()["eval_loss"]
    assert again == pytest.approx(losses[-1], rel=1e-5)


def test_the_best_checkpoint_of_each_round_is_its_update(
    run: Future[RunResult], tmp_path: Path
) -> None:
    model = get_peft_model(base(), ADAPTERS["lora"])
    trainer = make_trainer(
        model, tmp_path / "hf", load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps",
        eval_steps=1, save_steps=1, learning_rate=0.6, lr_scheduler_type="constant", max_steps=8,
    )  # fmt: skip
    fl.patch(trainer)
    starts, bests, lasts = [], [], []
    while fl.is_running():
        starts.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        if len(starts) <= 3:
            bests.append(trainer.state.best_metric)
            log = [
                entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
            ]
            lasts.append(log[-1])
    assert run.result(200).ok
    assert starts[1:] == pytest.approx(bests, rel=1e-5)
    assert any(best < last for best, last in zip(bests, lasts, strict=True)), "not just the last"


def test_a_computed_prompt_and_load_best_model_at_end_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(get_peft_model(base(), ADAPTERS["p-tuning"]), tmp_path / "hf")
    trainer.args.load_best_model_at_end = True
    with pytest.raises(ConfigError, match="load_best_model_at_end"):
        fl.patch(trainer)
