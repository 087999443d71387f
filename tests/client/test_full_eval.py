"""``bf16_full_eval``: the model is scored as it is asked for, and trained and sent as it was."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

import fedcore.client.hf as fl
from fedcore.server.outcome import RunResult

from .tiny_models import ROWS, llama, loss


def test_an_evaluation_in_bfloat16_leaves_the_model_in_its_own_dtype(
    run: Future[RunResult], tmp_path: Path
) -> None:
    model = get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    base = model.base_model.model.model.embed_tokens.weight.detach().clone()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "hf"), max_steps=1, learning_rate=1e-2, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="no", bf16_full_eval=True,
    )  # fmt: skip
    rows: Any = [{"input_ids": row, "labels": row} for row in ROWS]
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    fl.patch(trainer)
    scored: list[tuple[float, float]] = []
    while fl.is_running():
        found = trainer.evaluate()["eval_loss"]
        scored.append((found, loss(model)))
        trainer.predict(rows)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {b.dtype for b in model.buffers() if b.is_floating_point()} == {torch.float32}
        trainer.train()
    assert run.result(200).ok
    assert torch.equal(model.base_model.model.model.embed_tokens.weight, base), (
        "nothing was rounded"
    )
    assert all(rounded != exact for rounded, exact in scored), "scores are those of bfloat16"
    final = load_file(tmp_path / "runs/t/final/adapter_model.safetensors")
    assert {tensor.dtype for tensor in final.values()} == {torch.float32}
