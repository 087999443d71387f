"""What a `transformers.Trainer` or one of TRL's trained on is what its update weighs."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import fedcore.client.hf as fl
from fedcore.client.hf_counting import StepCounter
from fedcore.errors import ConfigError
from fedcore.server.outcome import RunResult

from ..support.ranks import start_two
from .tiny_llama import llama, tokenizer

OPTIONS: Any = {
    "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "num_train_epochs": 1,
}  # fmt: skip


class Model(torch.nn.Module):
    """Takes one tensor of four numbers a row, however the batch is built."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(4, 1)

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.net(rows).square().mean()}


class Listed(Trainer):
    """Trains on lists of rows, as TRL's online trainers do."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return model(torch.stack([row["rows"] for row in inputs]))["loss"]


class InParts(Listed):
    """Computes a loss from two rows at a time, as trainers do that cache gradients."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        parts = [inputs[i : i + 2] for i in range(0, len(inputs), 2)]
        losses = [super(Listed, self).training_step(model, part) for part in parts]
        return torch.stack(losses).mean()


class Twice(Listed):
    """Computes a second loss from the same rows, as sharpness-aware minimisation does."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        super().training_step(model, inputs, *args, **kwargs)
        return super().training_step(model, list(inputs), *args, **kwargs)


def plain(folder: Path, rows: int = 21, kind: Any = Listed, **options: Any) -> Any:
    data: Any = [{"rows": torch.full((4,), float(i)), "name": str(i), "n": i} for i in range(rows)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        remove_unused_columns=False,
        **{"per_device_train_batch_size": 8, **OPTIONS, **options},
    )
    return kind(Model(), arguments, train_dataset=data, data_collator=lambda rows: rows)


def weights(folder: Path) -> list[int]:
    versions = json.loads((folder / "runs/t/summary.json").read_text())["versions"]
    return [version["participants"]["a"] for version in versions[1:]]


def counted(trainer: Any, examples: Any = None) -> int:
    """Train alone; what would be the weight."""
    counter = StepCounter(trainer, examples)
    counter.attach()
    counter.begin()
    trainer.train()
    counter.end()
    return counter.counted.total()


def test_lists_of_rows_weigh_as_many_as_they_are(tmp_path: Path) -> None:
    assert counted(plain(tmp_path)) == 21
    assert counted(plain(tmp_path, gradient_accumulation_steps=2)) == 21
    assert counted(plain(tmp_path), len) == 21
    assert counted(plain(tmp_path), lambda batch: 10 * len(batch)) == 210
    assert counted(plain(tmp_path), 1000) == 1000


@pytest.mark.parametrize("kind", [InParts, Twice])
def test_a_step_of_several_losses_counts_each_row_of_its_batch_once(
    kind: Any, tmp_path: Path
) -> None:
    assert counted(plain(tmp_path, kind=kind)) == 21
    assert counted(plain(tmp_path, kind=kind), lambda batch: 10 * len(batch)) == 210


@pytest.mark.parametrize("kind", [InParts, Twice])
def test_the_scripts_function_is_called_once_a_step_however_many_losses_it_has(
    kind: Any, tmp_path: Path
) -> None:
    given: list[int] = []
    assert counted(plain(tmp_path, kind=kind), lambda b: given.append(len(b)) or len(b)) == 21
    assert given == [8, 8, 5]


def test_the_only_batch_of_a_round_counts_its_rows_though_it_is_not_full(tmp_path: Path) -> None:
    class Tensors(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(torch.stack(inputs))["loss"]

    trainer = plain(tmp_path, rows=3, kind=Tensors)
    trainer.data_collator = lambda rows: [row["rows"] for row in rows]
    assert counted(trainer) == 3


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_rows_that_fill_the_last_batches_of_ranks_count_once(
    split: bool, even: bool, tmp_path: Path
) -> None:
    total = 0
    for rank in range(2):
        trainer = plain(tmp_path)
        loader = torch.utils.data.DataLoader(
            trainer.train_dataset, batch_size=8, collate_fn=lambda rows: rows
        )
        mine = prepare_data_loader(
            loader, num_processes=2, process_index=rank, split_batches=split, even_batches=even
        )
        trainer.get_train_dataloader = lambda loader=mine: loader
        total += counted(trainer)
    assert total == 21


@pytest.mark.parametrize("split", [False, True])
def test_rows_of_a_stream_that_fill_the_last_batches_of_ranks_count_once(
    split: bool, tmp_path: Path
) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter([{"rows": torch.full((4,), float(i))} for i in range(21)])

    total = 0
    for rank in range(2):
        trainer = plain(tmp_path, max_steps=6)  # in a pass: two of each rank, or three
        loader = torch.utils.data.DataLoader(Stream(), batch_size=8, collate_fn=lambda rows: rows)
        mine = prepare_data_loader(
            loader, num_processes=2, process_index=rank, split_batches=split, dispatch_batches=False
        )
        trainer.get_train_dataloader = lambda loader=mine: loader
        total += counted(trainer)
    assert total == 21 * (2 if split else 3)


def test_repeated_rows_of_a_stream_that_workers_read_are_named_with_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter([{"rows": torch.full((4,), float(i))} for i in range(21)])

    def warned(workers: int, examples: Any = None) -> bool:
        caplog.clear()
        trainer = plain(tmp_path)
        loader = torch.utils.data.DataLoader(Stream(), batch_size=8, num_workers=workers)
        mine = prepare_data_loader(loader, num_processes=2, process_index=0, dispatch_batches=False)
        trainer.get_train_dataloader = lambda: mine
        counter = StepCounter(trainer, examples)
        counter.attach()
        trainer.get_train_dataloader()
        trainer.get_train_dataloader()
        return sum("count twice" in text for text in caplog.messages) == 1

    assert (warned(1), warned(0), warned(1, 21)) == (True, False, False)


def test_attempts_that_ran_out_of_memory_are_no_part_of_a_round(
    run: Future[RunResult], tmp_path: Path
) -> None:
    class Small(Listed):
        """Has memory for four rows, which the second batch of a round shows."""

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if len(inputs) > 4 and self.state.global_step % 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    folder = tmp_path / "hf"
    options: Any = {"learning_rate": 0.1, "lr_scheduler_type": "linear"}
    trainer = plain(folder, 16, Small, auto_find_batch_size=True, **options)
    alone = plain(folder, 16, per_device_train_batch_size=4, **{**options, "num_train_epochs": 3})
    alone.train()
    fl.patch(trainer)
    while fl.is_running():
        trainer.train()
    assert run.result(200).ok
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, alone.model.state_dict()[name], rtol=0, atol=1e-6)
    assert weights(tmp_path) == [16] * 3


def test_the_log_says_what_was_counted(
    run: Future[RunResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = plain(tmp_path / "hf")
    fl.patch(trainer, examples=77)
    with caplog.at_level("INFO", logger="fedcore.client"):
        while fl.is_running():
            trainer.train()
    assert run.result(200).ok
    assert weights(tmp_path) == [77] * 3
    assert "a: round 1: the update's weight is 77: stated by the script" in caplog.text


def flattened(folder: Path, **options: Any) -> Any:
    data: Any = [{"input_ids": list(range(2, 4 + i % 7))} for i in range(20)]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, **{**OPTIONS, **options}
    )
    return Trainer(
        llama(), arguments, train_dataset=data, data_collator=DataCollatorWithFlattening()
    )


def test_sequences_that_a_collator_flattens_into_one_row_are_counted(tmp_path: Path) -> None:
    assert counted(flattened(tmp_path)) == 20
    labels = sum(1 + i % 7 for i in range(20))
    assert counted(flattened(tmp_path), "tokens") == labels


@pytest.mark.slow
def test_two_processes_count_each_row_once(tmp_path: Path) -> None:
    processes = start_two("hf_counts.py", tmp_path)
    said = "".join(process.said for process in processes)
    assert all(process.returncode == 0 for process in processes), said[-6000:]
    assert "rows: 21" in said
    assert "stream: 21" in said


# --- TRL -------------------------------------------------------------------------------------------


def rewards(completions: Any, **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def trl_trainer(kind: str, folder: Path, columns: Any, **options: Any) -> Any:
    trl = pytest.importorskip("trl", reason="TRL is not installed: it comes with the extra `slow`")
    import datasets

    arguments = {**OPTIONS, "per_device_train_batch_size": 4, **options}
    if kind in ("GRPO", "RLOO"):
        arguments = {"num_generations": 2, "max_completion_length": 2, **arguments}
    words = tokenizer()
    words.padding_side = "left" if kind in ("GRPO", "RLOO") else "right"
    model = llama()
    if kind in ("RLOO", "DPO", "KTO"):
        model.save_pretrained(folder / "base")
        words.save_pretrained(folder / "base")
        model = type(model).from_pretrained(folder / "base")
    if kind == "Reward":
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(LlamaConfig(**model.config.to_dict(), num_labels=1))
    given = [rewards] if kind in ("GRPO", "RLOO") else []
    return getattr(trl, f"{kind}Trainer")(
        model,
        *given,
        args=getattr(trl, f"{kind}Config")(output_dir=str(folder), bf16=False, **arguments),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=words,
    )


PROMPTS = {"prompt": ["the cat sat"] * 12, "level": [1] * 12, "source": ["x"] * 12}
TEXTS = {"text": [" ".join(["the", "cat", "sat"] * (1 + i % 3)) for i in range(24)]}
CHOICES = {"prompt": ["the cat"] * 12, "chosen": [" sat on"] * 12, "rejected": [" ran to the"] * 12}
JUDGED = {"prompt": ["the cat"] * 12, "completion": [" sat on"] * 12, "label": [True, False] * 6}
ANSWERED = {
    "prompt": ["the cat" if i % 2 else "the dog ran" for i in range(12)],
    "completion": [" sat on" * (1 + i % 3) for i in range(12)],
}


@pytest.mark.parametrize(
    ("kind", "columns", "options", "expected"),
    [
        ("GRPO", PROMPTS, {}, 24),
        ("GRPO", PROMPTS, {"gradient_accumulation_steps": 2}, 24),
        ("GRPO", {"prompt": PROMPTS["prompt"]}, {"steps_per_generation": 3}, 24),
        ("RLOO", PROMPTS, {"gradient_accumulation_steps": 3}, 24),
        ("SFT", TEXTS, {}, 24),
        ("SFT", TEXTS, {"packing": True, "max_length": 32}, 24),
        ("SFT", TEXTS, {"packing": True, "max_length": 32, "per_device_train_batch_size": 1}, 24),
        ("SFT", TEXTS, {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16}, 24),
        ("SFT", ANSWERED, {"completion_only_loss": True}, 12),
        ("SFT", ANSWERED, {"completion_only_loss": True, "packing": True, "max_length": 32}, 12),
        ("SFT", ANSWERED, {"padding_free": True, "max_length": None}, 12),
        ("DPO", CHOICES, {}, 12),
        ("Reward", {name: CHOICES[name] for name in ("chosen", "rejected")}, {}, 12),
        ("KTO", JUDGED, {}, 12),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.slow
def test_trls_trainers_weigh_the_examples_that_they_trained_on(
    kind: str, columns: Any, options: Any, expected: int, tmp_path: Path
) -> None:
    assert counted(trl_trainer(kind, tmp_path, columns, **options)) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"packing": True, "max_length": 32}, {"padding_free": True, "max_length": None}]
)
def test_tokens_of_completions_count_alone_however_rows_are_packed(
    options: dict[str, Any], tmp_path: Path
) -> None:
    completions = [len(text.split()) + 1 for text in ANSWERED["completion"]]  # and the end of text
    trainer = trl_trainer("SFT", tmp_path, ANSWERED, completion_only_loss=True, **options)
    assert counted(trainer, "tokens") == sum(completions)


@pytest.mark.slow
def test_cut_examples_have_to_be_stated(tmp_path: Path) -> None:
    def make() -> Any:
        options = {"packing": True, "packing_strategy": "wrapped", "max_length": 16}
        return trl_trainer("SFT", tmp_path, TEXTS, **options)

    with pytest.raises(ConfigError, match=r"wrapped.*fl\.patch\(trainer, examples="):
        fl.patch(make())
    assert counted(make(), "rows") == len(make().train_dataset)
    short, long = (counted(make(), "tokens") for _ in range(2))
    assert short == long > 24
