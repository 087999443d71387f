"""What a Lightning trainer's batches count."""

from __future__ import annotations

import importlib
from concurrent.futures import Future
from itertools import zip_longest
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

import fedcore.client.lightning as fl
from fedcore.client.counting import ExampleCounter
from fedcore.client.lightning_counting import count_batch, count_scored
from fedcore.errors import WeightError
from fedcore.server.outcome import RunResult


def rows(number: int) -> Any:
    return TensorDataset(torch.arange(float(number)).reshape(number, 1))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_row_that_a_distributed_sampler_repeats_counts_once(shuffle: bool, own: bool) -> None:
    total = []
    for rank in range(4):
        sampler = DistributedSampler(rows(21), num_replicas=4, rank=rank, shuffle=shuffle)
        batches = BatchSampler(sampler, 4, drop_last=False)
        options: Any = {"batch_sampler": batches} if own else {"batch_size": 4, "sampler": sampler}
        loader = DataLoader(rows(21), **options)
        counter = ExampleCounter()
        for index, batch in enumerate(loader):
            count_batch(counter, loader, batch, index)
        total.append(counter.total())
    assert total == [6, 5, 5, 5]


@pytest.mark.parametrize("scored", [False, True])
def test_what_a_function_counts_leaves_out_repeated_rows_too(scored: bool) -> None:
    unclear = (torch.zeros(5), torch.zeros(4, 2))
    total = []
    for rank in range(4):
        sampler = DistributedSampler(rows(21), num_replicas=4, rank=rank)
        loader = DataLoader(rows(21), 4, sampler=sampler, collate_fn=lambda _: unclear)
        counter, stated = ExampleCounter(), ExampleCounter(lambda _: 4)
        for index, batch in enumerate(loader):
            if scored:
                count_scored(counter, stated, loader, batch, index)
            else:
                count_batch(stated, loader, batch, index, whole=True, weighs=True)
        total.append((counter if scored else stated).total())
    assert total == [8, 6, 6, 6]  # the second batch has two rows; of ranks 1 to 3, one is repeated


class Reversed(BatchSampler):
    """Makes batches in an order of its own."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__())[::-1])


@pytest.mark.parametrize("examples", [None, "rows", 40, lambda batch: len(batch[0])])
def test_repeated_rows_in_unknown_batches_are_refused_unless_the_script_counts(
    examples: Any,
) -> None:
    sampler = DistributedSampler(rows(21), num_replicas=4, rank=1)
    loader = DataLoader(rows(21), batch_sampler=Reversed(sampler, 4, False))
    batch = next(iter(loader))
    trained, scored = ExampleCounter(examples), ExampleCounter()
    if examples is None:
        for count in (
            lambda: count_batch(trained, [loader], [batch], 0, weighs=True),
            lambda: count_scored(scored, trained, loader, batch, 0),
        ):
            with pytest.raises(WeightError, match="Reversed .* repeats 3 of 21 rows for 4 proc"):
                count()
        sampler.drop_last = True
    count_batch(trained, loader, batch, 0, whole=trained.stated, weighs=True)
    count_scored(scored, trained, loader, batch, 0)
    assert (trained.total(), scored.total()) == (40 if examples == 40 else 2, 2)


@pytest.mark.parametrize(("drop_last", "rows_a_pass"), [(False, 21), (True, 16)])
def test_a_loader_that_begins_again_within_an_epoch_counts_as_in_its_first_pass(
    drop_last: bool, rows_a_pass: int
) -> None:
    total = 0
    for rank in range(4):
        sampler = DistributedSampler(rows(21), num_replicas=4, rank=rank)
        loader = DataLoader(rows(21), 4, sampler=sampler, drop_last=drop_last)
        counter = ExampleCounter()
        for index, batch in enumerate([*loader, *loader, *loader]):
            count_batch(counter, loader, batch, index)
        total += counter.total()
    assert total == 3 * rows_a_pass


def test_the_batches_of_several_loaders_count_together() -> None:
    loaders = {"a": DataLoader(rows(3), 3), "b": [DataLoader(rows(5), 5), DataLoader(rows(2), 2)]}
    batch = {"a": next(iter(loaders["a"])), "b": [next(iter(loaders["b"][0])), None]}
    counter = ExampleCounter()
    count_batch(counter, loaders, batch, 0)
    assert counter.total() == 8


@pytest.mark.parametrize(("columns", "size"), [((2, 3), 2), ((4, 2), 4), ((4, 3), 4)])
def test_what_a_batch_of_one_loader_is_says_nothing_of_another_loaders(
    columns: tuple[int, int], size: int
) -> None:
    """The first one's batches have as many rows as columns, so they alone do not say which is which."""
    sets = [TensorDataset(*[torch.zeros(n, 5)] * k) for n, k in zip((10, 40), columns, strict=True)]
    loaders = [DataLoader(sets[0], size), DataLoader(sets[1], 8)]
    counter = ExampleCounter()
    for index, batch in enumerate(zip_longest(*loaders)):
        count_batch(counter, loaders, list(batch), index)
    assert counter.total() == 50


def test_a_batch_that_a_hook_has_rearranged_counts_as_it_is() -> None:
    counter = ExampleCounter()
    count_batch(counter, {"a": DataLoader(rows(3), 3)}, torch.zeros(7, 2), 0)
    assert counter.total() == 7


def shared(number: int, rank: int, size: int = 4, kind: type[BatchSampler] = BatchSampler) -> Any:
    """Return a loader of one of four processes, whose batches are of so many rows."""
    sampler = DistributedSampler(rows(number), num_replicas=4, rank=rank, shuffle=False)
    return DataLoader(rows(number), batch_sampler=kind(sampler, size, False))


@pytest.mark.parametrize("examples", [None, len])
def test_rows_that_joined_loaders_repeat_alike_count_once(
    examples: Any,
) -> None:
    total = []
    for rank in range(4):
        loaders = {"a": shared(21, rank), "b": shared(21, rank)}
        trained, scored = ExampleCounter(examples), ExampleCounter()
        for index, (one, two) in enumerate(zip(*loaders.values(), strict=True)):
            joined = torch.cat([one[0], two[0]])
            count_batch(trained, loaders, joined, index, whole=trained.stated, weighs=True)
            count_scored(scored, trained, loaders, joined, index)
        total.append((trained.total(), scored.total()))
    assert total == [(12, 12), (10, 10), (10, 10), (10, 10)]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (shared(24, 1), "repeats 3 of 21 rows for 4 processes of one of them"),
        (shared(22, 1), "repeats 3 of 21 rows for 4 processes of one of them"),
        (shared(21, 1, size=3), "repeats 3 of 21 rows for 4 processes of one of them"),
        (DataLoader(rows(6), 4), "repeats 3 of 21 rows for 4 processes of one of them"),
        (shared(22, 1, kind=Reversed), "Reversed .* repeats 2 of 22 rows for 4 processes"),
    ],
)
def test_rows_that_joined_loaders_repeat_in_other_ways_are_refused(second: Any, said: str) -> None:
    loaders = [shared(21, 1), [second]]
    for count in (
        lambda counter: count_batch(counter, loaders, torch.zeros(8, 1), 0, weighs=True),
        lambda counter: count_scored(ExampleCounter(), counter, loaders, torch.zeros(8, 1), 0),
    ):
        with pytest.raises(WeightError, match=said):
            count(ExampleCounter())
        count(ExampleCounter("rows"))


@pytest.mark.parametrize("label", [1, torch.tensor(1)])
def test_a_single_row_of_a_loader_without_batches_is_not_taken_for_a_batch(label: Any) -> None:
    counter, stated = ExampleCounter(), ExampleCounter(lambda batch: 1)
    loader = DataLoader([(torch.zeros(4), label)], batch_size=None)
    row = next(iter(loader))
    with pytest.raises(WeightError, match="batch_size=None.*state how many"):
        count_batch(counter, loader, row, 0, weighs=True)
    count_batch(stated, loader, row, 0, whole=stated.stated, weighs=True)
    assert stated.total() == 1
    batches = DataLoader([(torch.zeros(4, 2), torch.zeros(4))], batch_size=None)
    count_batch(counter, batches, next(iter(batches)), 0, weighs=True)
    assert counter.total() == 4


def test_a_scored_batch_that_does_not_say_its_examples_is_counted_by_the_scripts_function() -> None:
    batch = (torch.zeros(5), torch.zeros(4, 2))
    counter = ExampleCounter()
    for stated in (None, 1000):
        with pytest.raises(
            WeightError, match="validation: .* Here the function of the batch helps"
        ):
            count_scored(counter, ExampleCounter(stated), None, batch, 0)
    count_scored(counter, ExampleCounter(lambda found: len(found[0])), None, batch, 0)
    count_scored(counter, ExampleCounter(lambda _: 1000), None, torch.zeros(3, 2), 1)
    assert counter.total() == 5 + 3


def test_a_scored_batch_of_several_loaders_counts_once_where_one_part_does_not_say_its_own() -> (
    None
):
    loaders, batch = [None, None], [torch.zeros(3, 2), (torch.zeros(5), torch.zeros(4, 2))]
    counter = ExampleCounter()
    count_scored(counter, ExampleCounter(lambda parts: len(parts[0])), loaders, batch, 0)
    assert counter.total() == 3


@pytest.mark.parametrize("row", [torch.zeros(5), (torch.zeros(5), torch.zeros(5))])
def test_the_only_batch_of_a_round_counts_its_rows_though_it_is_not_full(row: Any) -> None:
    counter = ExampleCounter()
    loader = DataLoader([row] * 3, 8, collate_fn=list)
    for index, batch in enumerate(loader):
        count_batch(counter, loader, batch, index)
    assert counter.total() == 3


def test_a_function_of_the_script_is_given_the_whole_batch() -> None:
    given: list[Any] = []
    counter = ExampleCounter(lambda batch: given.append(batch) or 4)
    batch = {"a": [torch.zeros(3, 1)], "b": [torch.zeros(5, 1)]}
    count_batch(counter, {"a": 0, "b": 0}, batch, 0, whole=counter.stated)
    assert given == [batch]
    assert counter.total() == 4


def test_lists_of_rows_count_rows_and_steps_without_a_loss_count_nothing(
    run: Future[RunResult],
) -> None:
    package = importlib.import_module("lightning.pytorch")

    class Net(package.LightningModule):
        """Leaves out every second batch."""

        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(1, 1)

        def training_step(self, batch: Any, index: int) -> Any:
            texts = torch.tensor([[float(len(row["text"]))] for row in batch])
            return self.net(texts).square().mean() if index % 2 == 0 else None

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = [{"text": "ab" * n, "label": n, "id": str(n)} for n in range(16)]
    loader = DataLoader(data, batch_size=4, collate_fn=lambda batch: batch)
    trainer = package.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, max_epochs=1,
    )  # fmt: skip
    model, counted = Net(), []
    fl.patch(trainer)
    while fl.is_running():
        trainer.fit(model, loader)
        counted.append(trainer._fedcore.counted.total())
    assert run.result(200).ok
    assert counted[:3] == [8, 8, 8]
