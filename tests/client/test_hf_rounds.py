"""The rounds of a `transformers.Trainer` are one training: data, steps, schedules and state go on."""

from __future__ import annotations

import json
import random
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import fedcore.client.hf as fl
from fedcore.client.hf_counting import StepCounter
from fedcore.client.hf_rounds import Options, Rounds
from fedcore.errors import ConfigError
from fedcore.server.outcome import RunResult

ROUNDS = 4
ROWS = 22


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(1, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1)
        )

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.net(input_ids[:, :1].float() / ROWS).square().mean()}


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Rows in another order in each pass, of which nobody knows the number beforehand."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        data = rows()
        random.Random(self.epoch).shuffle(data)
        return iter(data)


class OwnSampler(torch.utils.data.Sampler):  # type: ignore[type-arg]
    """Draws from a generator of its own, as TRL's `RepeatSampler` does."""

    def __init__(self) -> None:
        self.drawn = torch.Generator().manual_seed(3)
        self.generator = self.drawn

    def __iter__(self) -> Any:
        yield from torch.randperm(ROWS, generator=self.generator).tolist()

    def __len__(self) -> int:
        return ROWS


class Rates(TrainerCallback):
    def __init__(self) -> None:
        self.rates: list[float] = []
        self.steps: list[int] = []

    def on_step_begin(self, _: Any, state: Any, __: Any, *, optimizer: Any, **___: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.steps.append(state.global_step)


class Seen(Trainer):
    """Notes the rows of each batch."""

    sampler: Any = None

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen = getattr(self, "seen", [])
        self.seen.append(inputs["input_ids"][:, 0].tolist())
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, *args: Any) -> Any:
        return self.sampler() if self.sampler else super()._get_train_sampler(*args)


def rows() -> Any:
    return [{"input_ids": [i] * (1 + i % 5)} for i in range(ROWS)]


def pad(batch: Any) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in batch)
    return {
        "input_ids": torch.tensor(
            [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch]
        )
    }


def make(folder: Path, rounds: int = 1, kind: str = "random", **options: Any) -> Any:
    options = {"max_steps": 3, **options}
    for budget in ("max_steps", "num_train_epochs"):
        if options.get(budget, -1) > 0:
            options[budget] *= rounds
    if kind in ("sequential", "group_by_length"):
        options["train_sampling_strategy"] = kind
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        **{"save_strategy": "no", "learning_rate": 0.1, **options},
    )  # fmt: skip
    data = Stream() if kind == "stream" else rows()
    trainer = Seen(
        Model(), arguments, train_dataset=data, data_collator=pad, callbacks=[rates := Rates()]
    )
    trainer.sampler = OwnSampler if kind == "own" else None
    trainer.rates = rates
    return trainer


def by_rounds(trainer: Any, **options: Any) -> Rounds:
    counter = StepCounter(trainer, None)
    rounds = Rounds(trainer, counter, Options(**options), lambda **_: None, lambda _: None)
    counter.attach()
    rounds.attach()
    return rounds


def disturb() -> None:
    """Draw from all generators, as an evaluation between two rounds may."""
    random.random()
    np.random.random()
    torch.rand(3)


def assert_same(trainer: Any, unbroken: Any) -> None:
    assert trainer.seen == unbroken.seen
    assert trainer.rates.rates == pytest.approx(unbroken.rates.rates, rel=1e-12)
    assert trainer.rates.steps == unbroken.rates.steps
    assert trainer.state.global_step == unbroken.state.global_step
    assert trainer.state.epoch == pytest.approx(unbroken.state.epoch)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, unbroken.model.state_dict()[name]), name


CASES = {
    "steps": ("random", {"max_steps": 2}, True),
    "more steps than an epoch": ("random", {"max_steps": 8}, False),
    "accumulation": ("random", {"max_steps": 2, "gradient_accumulation_steps": 2}, False),
    "epochs": ("random", {"max_steps": -1, "num_train_epochs": 2}, True),
    "half an epoch": ("random", {"max_steps": -1, "num_train_epochs": 0.5}, False),
    "a seed": ("random", {"max_steps": 3, "data_seed": 9}, False),
    "sequential": ("sequential", {"max_steps": 4}, False),
    "grouped by length": ("group_by_length", {"max_steps": 4}, False),
    "a stream": ("stream", {"max_steps": 2}, False),
    "more steps than a stream": ("stream", {"max_steps": 8}, True),
    "a generator of its own": ("own", {"max_steps": 4}, True),
    "dispatched batches": (
        "random",
        {"max_steps": 2, "accelerator_config": {"dispatch_batches": True}},
        True,
    ),
    "checkpoints that skip nothing": ("random", {"max_steps": 2, "ignore_data_skip": True}, True),
}


@pytest.mark.parametrize(
    ("kind", "options", "restarted"),
    [
        pytest.param(
            kind,
            options,
            restarted,
            id=f"{name}, {'started again' if restarted else 'in one process'}",
            marks=() if fast and restarted else pytest.mark.slow,
        )
        for name, (kind, options, fast) in CASES.items()
        for restarted in (False, True)
    ],
)
def test_rounds_go_on_in_the_data_as_one_training_would(
    kind: str, options: dict[str, Any], restarted: bool, tmp_path: Path
) -> None:
    unbroken = make(tmp_path / "one", ROUNDS, kind, **options)
    unbroken.train()

    trainer = make(tmp_path / "some", 1, kind, **options)
    rounds = by_rounds(trainer)
    for number in range(1, ROUNDS + 1):
        if restarted and number in (2, 4):
            before, disturbed = trainer, make(tmp_path / "some", 1, kind, **options)
            trainer = disturbed
            trainer.model.load_state_dict(before.model.state_dict())
            trainer.seen, trainer.rates.rates, trainer.rates.steps = (
                before.seen, before.rates.rates, before.rates.steps,
            )  # fmt: skip
            rounds = by_rounds(trainer)
        if number > 1:
            disturb()
        rounds.recall(number, tmp_path)
        rounds.train(number, ROUNDS, trainer.train)
        rounds.settle()
    assert_same(trainer, unbroken)
    assert len(list(tmp_path.glob("trainer-*"))) == 1, "what is kept is bounded"


def test_rounds_with_persistent_workers_are_one_training_without(tmp_path: Path) -> None:
    workers = {"max_steps": 8, "dataloader_num_workers": 1}
    unbroken = make(tmp_path / "one", 2, **workers)
    unbroken.train()
    trainer = make(tmp_path / "some", 1, **workers, dataloader_persistent_workers=True)
    said: list[str] = []
    counter = StepCounter(trainer, None)
    rounds = Rounds(trainer, counter, Options(), lambda **_: None, said.append)
    counter.attach()
    rounds.attach()
    for number in (1, 2):
        rounds.train(number, 2, trainer.train)
    assert_same(trainer, unbroken)
    assert trainer.args.dataloader_persistent_workers, "the script's own setting is put back"
    assert len([line for line in said if "dataloader_persistent_workers is False" in line]) == 1


def test_a_round_that_is_trained_again_begins_where_it_began(tmp_path: Path) -> None:
    unbroken = make(tmp_path / "one", 2)
    unbroken.train()
    trainer = make(tmp_path / "some")
    rounds = by_rounds(trainer)
    rounds.recall(1, tmp_path)
    rounds.train(1, 2, trainer.train)
    rounds.settle()
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    rounds.train(2, 2, trainer.train)  # killed before its update was recorded

    again = make(tmp_path / "some")
    again.model.load_state_dict(weights)
    rounds = by_rounds(again)
    rounds.recall(2, tmp_path)
    rounds.train(2, 2, again.train)
    assert again.seen == unbroken.seen[3:]
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, unbroken.model.state_dict()[name]), name


def test_without_a_kept_state_the_rounds_number_says_where_a_site_stands(tmp_path: Path) -> None:
    unbroken = make(tmp_path / "one", ROUNDS)
    unbroken.train()
    trainer = make(tmp_path / "some")
    rounds = by_rounds(trainer)
    rounds.recall(3, None)
    rounds.train(3, ROUNDS, trainer.train)
    assert trainer.seen == unbroken.seen[6:9]
    assert trainer.rates.rates == pytest.approx(unbroken.rates.rates[6:9])
    assert trainer.state.global_step == 9


@pytest.mark.parametrize("kind", ["random", "stream", "sequential"])
def test_a_round_begins_the_data_anew_by_choice(kind: str, tmp_path: Path) -> None:
    trainer = make(tmp_path / "some", 1, kind)
    rounds = by_rounds(trainer, goes_on=False)
    seen = []
    for number in (1, 2, 3):
        trainer.seen = []
        rounds.train(number, 3, trainer.train)
        seen.append(trainer.seen)
    if kind == "random":
        assert seen[0] != seen[1] != seen[2]
    else:
        assert seen[0] == seen[1] == seen[2]
    assert trainer.rates.steps == list(range(9))


def test_a_schedule_per_round_begins_anew_after_a_restart_too(tmp_path: Path) -> None:
    alone = make(tmp_path / "one")
    alone.train()
    for number in (1, 2):
        trainer = make(tmp_path / "some")
        rounds = by_rounds(trainer, spans=False)
        rounds.recall(number, tmp_path)
        rounds.train(number, 2, trainer.train)
        assert trainer.rates.rates == pytest.approx(alone.rates.rates)
        assert len(trainer.optimizer.state) == 4
    assert trainer.optimizer.state[next(trainer.model.parameters())]["step"] == 6


def test_checkpoints_of_rounds_do_not_overwrite_each_other(tmp_path: Path) -> None:
    trainer = make(tmp_path / "some", save_strategy="steps", save_steps=2, logging_steps=1)
    rounds = by_rounds(trainer)
    for number in (1, 2):
        rounds.train(number, 2, trainer.train)
    found = sorted(path.name for path in (tmp_path / "some").glob("checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-6"]
    logged = [entry["step"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [1, 2, 3, 4, 5, 6]


def test_an_optimiser_is_kept_by_choice_or_where_it_is_small(tmp_path: Path) -> None:
    for keep in (None, False):
        trainer = make(tmp_path / "some")
        rounds = by_rounds(trainer, keep=keep)
        rounds.recall(1, tmp_path)
        rounds.train(1, 2, trainer.train)
        assert (tmp_path / "trainer-00000001/optimizer.pt").exists() is (keep is None)
        assert (tmp_path / "trainer-00000001/place.state").exists()


def test_damaged_state_is_named_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path / "some")
    rounds = by_rounds(trainer)
    rounds.recall(1, tmp_path)
    rounds.train(1, 2, trainer.train)
    (tmp_path / "trainer-00000001/place.state").write_bytes(b"torn")
    again = make(tmp_path / "some")
    rounds = by_rounds(again)
    rounds.recall(2, tmp_path)
    assert "trainer-00000001 is not used" in caplog.text
    rounds.train(2, 2, again.train)
    assert again.state.global_step == 3


def test_a_run_goes_on_in_the_data_and_says_so(
    run: Future[RunResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unbroken = make(tmp_path / "one", 3, "stream")
    unbroken.train()
    trainer = make(tmp_path / "hf", 1, "stream")
    fl.patch(trainer)
    with caplog.at_level("INFO", logger="fedcore.client"):
        while fl.is_running():
            trainer.train()
    assert run.result(200).ok
    assert trainer.seen == unbroken.seen
    assert trainer.state.global_step == 9
    assert "a: round 2: step 3; goes on in the data at epoch 0, batch 3" in caplog.text
    assert trainer.args.max_steps == 3
    versions = json.loads((tmp_path / "runs/t/summary.json").read_text())["versions"]
    assert [v["participants"]["a"] for v in versions[1:]] == [12, 10, 12]


def test_an_unknown_choice_of_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data='once'"):
        fl.patch(make(tmp_path), data="once")  # type: ignore[arg-type]
