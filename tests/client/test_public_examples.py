"""Models and scripts that Lightning and TRL ship take part with the documented lines, and no other change."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from fedcore.config import load_run_file
from fedcore.simulation.processes import simulate

from .tiny_llama import llama, tokenizer, write_rows

pytestmark = pytest.mark.slow
RUN = """
[run]
name = "example"
rounds = 2
[participants]
sites = ["north", "south"]
round_deadline = "240s"
[selection]
metric = "eval_loss"
mode = "min"
[simulate]
script = "train.py"
"""
LIGHTNING = """
import lightning
from lightning.pytorch.demos.{module} import {model}{more}

import fedcore.client.lightning as fl

lightning.seed_everything(0)
model = {made}
trainer = lightning.Trainer(
    accelerator="cpu", max_epochs=1, limit_train_batches=8, logger=False, enable_checkpointing=False
)

fl.patch(trainer)
while fl.is_running():
    print(fl.system_info())
    {validate}
    trainer.fit({given})
"""
TEXT = "the cat sat on the mat and the dog ran to the house \n" * 500


def simulated(folder: Path, script: str, *arguments: str, rounds: int = 2) -> dict[str, Any]:
    """Run a script at two sites; the run's summary."""
    (folder / "train.py").write_text(script)
    (folder / "run.toml").write_text(f"{RUN}args = {json.dumps(list(arguments))}\n")
    config = load_run_file(folder / "run.toml")
    result = simulate(folder / "run.toml", config)
    assert result.status == 0, result.message
    summary: dict[str, Any] = json.loads((result.folder / "summary.json").read_text())
    assert summary["ok"]
    assert [v["version"] for v in summary["versions"]] == list(range(rounds + 1))
    for version in summary["versions"][1:]:
        assert version["participants"].keys() == {"north", "south"}
    return summary


@pytest.mark.parametrize(
    ("model", "data", "examples"),
    [
        ("BoringModel", "BoringDataModule", 8),
        ("ManualOptimBoringModel", "BoringDataModuleNoLen", 8),
        ("BoringModel", None, 8),
    ],
)
def test_lightnings_smallest_models(
    model: str, data: str | None, examples: int, tmp_path: Path
) -> None:
    given = f"model, {data}()" if data else "model"
    script = LIGHTNING.format(
        module="boring_classes", model=model, more=f", {data}" if data else "", made=f"{model}()",
        validate=f"trainer.validate({given})", given=given,
    )  # fmt: skip
    versions = simulated(tmp_path, script)["versions"]
    assert versions[1]["participants"] == {"north": examples, "south": examples}


@pytest.mark.parametrize(
    ("module", "model", "examples"),
    [("transformer", "LightningTransformer", 8), ("lstm", "LightningLSTM", 8 * 20)],
)
def test_lightnings_language_models_that_have_no_validation(
    module: str, model: str, examples: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("requests", reason="requests comes with the extra `slow`")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/wikitext-2.txt").write_text(
        TEXT
    )  # where the example looks before it downloads
    script = LIGHTNING.format(
        module=module, model=model, more=", WikiText2", made=f"{model}(WikiText2().vocab_size)",
         validate="", given="model",
    )  # fmt: skip
    versions = simulated(tmp_path, script)["versions"]
    assert versions[1]["participants"] == {"north": examples, "south": examples}


@pytest.mark.parametrize("options", [[], ["--load_in_4bit"]], ids=["lora", "qlora"])
def test_trls_own_script_for_fine_tuning(options: list[str], tmp_path: Path) -> None:
    reason = "it comes with the extra `slow`"
    sft: Any = pytest.importorskip("trl.scripts.sft", reason=f"TRL is not installed: {reason}")
    if options:
        pytest.importorskip("bitsandbytes", reason=f"bitsandbytes is not installed: {reason}")
    script = inspect.getsource(sft)
    trained = "    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)\n"
    assert script.count(trained) == 1, "the script is another one now"
    script = script.replace(
        trained,
        "    import fedcore.client.hf as fl\n"
        "    fl.patch(trainer)\n"
        "    while fl.is_running():\n"
        "        trainer.evaluate()\n"
        "        trainer.train()\n",
    )
    save_model_and_rows(tmp_path)
    summary = simulated(
        tmp_path, script,
        f"--model_name_or_path={tmp_path / 'base'}", f"--dataset_name={tmp_path / 'rows'}", "--use_cpu",
        f"--output_dir={tmp_path / 'out'}", "--eval_strategy=steps", "--max_steps=5", "--report_to=none",
        "--per_device_train_batch_size=8", "--learning_rate=3e-2", "--bf16=False", "--dtype=float32",
        "--use_peft", "--lora_r=4", "--lora_target_modules", "q_proj", "v_proj", *options,
    )  # fmt: skip
    losses = [version["metrics"]["eval_loss"] for version in summary["versions"]]
    assert losses[2] < losses[0] - 0.05, "it learns"
    assert all(set(v["metrics_by_site"]) == {"north", "south"} for v in summary["versions"])
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    opened = PeftModel.from_pretrained(base, tmp_path / "runs/example/best")
    assert any(p.abs().sum() > 0 for n, p in opened.named_parameters() if "lora_B" in n)


def save_model_and_rows(folder: Path) -> None:
    """Write a model with its tokenizer, and rows to train and to test on, where the script takes them by path."""
    llama().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    for split in ("train", "test"):
        write_rows(folder / "rows" / f"{split}.jsonl")
