"""An update's weight: the examples that the loss was computed on, whatever the structure of a batch."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fedcore.client.counting import ExampleCounter, Fresh, count_examples, count_tokens, fresh_rows
from fedcore.errors import ConfigError, WeightError

Pair = namedtuple("Pair", "x y")


@dataclass
class Made:
    x: torch.Tensor
    name: str


def t(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape)


def ids(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.long)


def count(batch: Any, **options: Any) -> int:
    return int(count_examples(batch, **options)[0])


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        (t(5, 3), 5),
        (torch.tensor(1.0), 1),
        ([t(5, 3), t(5)], 5),
        ((t(5, 3), t(5, 3)), 5),
        (Pair(t(5, 3), t(5)), 5),
        (Made(t(5, 3), "name"), 5),
        ((t(5, 3), "a name", 3, None), 5),
        ([[t(5, 3), t(5)], t(5)], 5),
        ([{"a": t(5, 3)}, t(5)], 5),
        ({"x": t(5, 3), "n": 4, "flag": True, "scale": torch.tensor(2.0)}, 5),
        (UserDict({"input_ids": ids(5, 3), "pixel_values": t(9, 3, 2, 2)}), 5),
        ({"pixel_values": t(80, 12), "image_grid_thw": t(7, 3), "input_ids": ids(5, 3)}, 5),
        ({"anchor_input_ids": ids(5, 3), "positive_input_ids": ids(5, 4)}, 5),
        ({"prompt": ["a", "b"], "answer": [1, 2]}, 2),
        ({"a": [t(5, 2), t(5)], "b": [t(5, 2), t(5)]}, 5),
        ({"pixel_values": [t(3, 4, 4), t(3, 5, 5)], "labels": [{"boxes": t(1, 4)}, {"boxes": t(3, 4)}]}, 2),
        ([{"prompt": "a", "answer": 1, "id": 4, "level": 2}] * 3, 3),
        ([{"input_ids": ids(4), "labels": ids(4)}] * 3, 3),
        ([(t(4), 1), (t(4), 0), (t(4), 1)], 3),
        ([t(4), t(6), t(5)], 3),
        ([torch.tensor(1), torch.tensor(2)], 2),
        (["some", "texts", "here"], 3),
        ([], 0),
    ],
)  # fmt: skip
def test_rows_are_counted_in_a_batch_of_any_structure(batch: Any, rows: int) -> None:
    assert count(batch) == rows


def test_the_loaders_batch_size_decides_between_rows_and_columns() -> None:
    counter = ExampleCounter()
    for rows in (8, 8, 3):  # the last batch is not full
        counter.add([t(4)] * rows, expected=8)
    assert counter.total() == 19
    counter = ExampleCounter()
    for rows in (8, 8, 3):
        counter.add({"x": t(rows, 4), "weights": t(5)}, expected=8)
    assert counter.total() == 19
    assert count([t(8, 4), t(8, 4)], expected=8) == 8
    counter = ExampleCounter()
    for rows in (4, 4, 1):  # images and boxes of torchvision's detectors: tuple(zip(*rows))
        counter.add(((t(3, 8, 8),) * rows, ({"boxes": t(2, 4)},) * rows), expected=4)
    assert counter.total() == 9


@pytest.mark.parametrize(
    "row",
    [
        {"x": t(4), "label": torch.tensor(1)},
        (t(4), torch.tensor(1)),
        {"input_ids": ids(4), "labels": ids(4)},
        (torch.tensor(1), torch.tensor(1), torch.tensor(1), torch.tensor(1)),
        t(4),
    ],
)
def test_rows_as_long_as_a_batch_is_large_count_in_a_last_batch_too(row: Any) -> None:
    counter = ExampleCounter()
    for rows in (4, 4, 2):
        counter.add([row] * rows, expected=4)
    assert counter.total() == 10


def test_as_many_columns_as_a_batch_has_rows_are_columns_in_a_last_batch_too() -> None:
    counter = ExampleCounter()
    for rows in (2, 2, 1):
        counter.add([{"input_ids": ids(rows, 7)}, {"input_ids": ids(rows, 7)}], expected=2)
    assert counter.total() == 5
    counter = ExampleCounter()
    for rows in (2, 2, 1):  # tuple(zip(*rows)): pictures, and a label each
        counter.add(((t(3, 8, 8),) * rows, (torch.tensor(1),) * rows), expected=2)
    assert counter.total() == 5


@pytest.mark.parametrize(
    "batch", [None, 7, "text", object(), {"x": t(5), "y": t(4)}, (t(5), t(4, 2)), {"flag": True}]
)
def test_a_batch_that_does_not_say_its_examples_is_refused_with_what_to_do(batch: Any) -> None:
    with pytest.raises(WeightError, match=r"how many examples.*fl\.patch\(trainer, examples="):
        count(batch)


def packed(lengths: list[list[int]], labelled: Any = None) -> dict[str, torch.Tensor]:
    """Rows of sequences, as collators flatten or pad them; ``labelled`` says of which the loss is computed."""
    width = max(map(sum, lengths))
    position = ids(len(lengths), width)
    labels = torch.full((len(lengths), width), -100)
    number = 0
    for row, parts in enumerate(lengths):
        at = 0
        for length in parts:
            position[row, at : at + length] = torch.arange(length)
            if labelled is None or labelled[number]:
                labels[row, at + 1 : at + length] = 7
            at += length
            number += 1
    return {"input_ids": ids(len(lengths), width), "position_ids": position, "labels": labels}


def test_each_sequence_of_a_packed_row_is_an_example_and_padding_is_none() -> None:
    batch = packed([[3, 5, 2], [4, 4], [9]])
    assert count_examples(batch)[1]
    assert count(batch) == 6
    assert count(packed([[3, 5, 2], [4, 4], [9]], [1, 0, 1, 0, 0, 1])) == 3
    flat = {"input_ids": ids(1, 12), "cu_seq_lens_q": torch.tensor([0, 3, 8, 10, 11, 12])}
    assert count(flat) == 5
    flat["labels"] = torch.tensor([[-100, 1, 1, -100, 1, 1, 1, 1, -100, 1, -100, -100]])
    assert count(flat) == 3
    numbered = {"input_ids": ids(1, 6), "seq_idx": torch.tensor([[0, 0, 1, 1, 1, 2]])}
    assert count(numbered) == 3


def test_repeated_rows_that_are_flattened_into_one_count_nothing_whatever_their_labels() -> None:
    used = [True, False, False, True, True, True]  # two of the first three have no label
    batch = {
        "input_ids": torch.ones(1, 12, dtype=torch.long),
        "position_ids": torch.arange(12)[None] % 2,
        "labels": torch.tensor([[1 if one else -100] * 2 for one in used]).reshape(1, 12),
    }
    assert count_examples(batch, fresh=Fresh(3, 6)) == (1, True)
    assert count_examples(batch, fresh=Fresh(0, 6)) == (0, True)
    assert count_examples(batch, fresh=Fresh(6, 6)) == (4, True)


def test_position_ids_of_one_sequence_a_row_count_rows() -> None:
    position = torch.tensor([[1, 1, 0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": ids(3, 5), "position_ids": position, "attention_mask": mask}
    assert count(batch) == 3


def test_a_row_without_a_label_counts_nothing() -> None:
    labels = torch.full((4, 3), -100)
    labels[1, 2] = labels[3, 0] = 5
    assert count({"input_ids": ids(4, 3), "labels": labels}) == 2
    assert count({"x": t(4, 3), "labels": torch.full((4, 1), -100.0)}) == 4, "regression"
    assert count({"x": t(0, 3), "labels": ids(0, 3)}) == 0


def test_tokens_are_those_that_the_loss_is_computed_on() -> None:
    labels = torch.tensor([[1, 1, -100], [-100, 1, 1]])
    assert count_tokens({"input_ids": ids(2, 3), "labels": labels}) == 4
    assert count_tokens({"input_ids": ids(2, 3), "labels": labels}, shifted=True) == 3
    assert count_tokens({"input_ids": ids(2, 3), "attention_mask": torch.ones(2, 3)}) == 6
    with pytest.raises(WeightError, match="tokens"):
        count_tokens((t(3), t(3)))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("rows", "batch", "ranks"), [(21, 4, 2), (21, 6, 3), (1, 4, 2), (24, 4, 2), (7, 8, 1)]
)
def test_repeated_rows_count_once_over_all_ranks(
    interleaved: bool, rows: int, batch: int, ranks: int
) -> None:
    held = -(-rows // ranks) if interleaved or ranks == 1 else -(-rows // (ranks * batch)) * batch
    total = 0
    for rank in range(ranks):
        counter = ExampleCounter()
        for index, at in enumerate(range(0, held, batch)):
            size = min(batch, held - at)
            fresh = fresh_rows(rows, batch, ranks, rank, index, interleaved=interleaved)
            counter.add({"input_ids": ids(size, 3), "labels": ids(size, 3)}, fresh=fresh)
        total += counter.total()
    assert total == rows


def test_a_script_states_its_examples() -> None:
    counter = ExampleCounter(120)
    assert (counter.total(), counter.stated_for_site) == (0, True)
    counter.add(object())
    counter.add(object())
    assert counter.total() == 120
    counter = ExampleCounter(lambda batch: batch["n"])
    counter.add({"n": 4}, computed={"x": t(1)})
    counter.add({"n": torch.tensor([6])})
    assert (counter.total(), counter.stated_for_site) == (10, False)
    with pytest.raises(WeightError, match="examples= returned 1.5"):
        counter.add({"n": 1.5})
    counter.clear()
    assert counter.total() == 0


def test_several_rows_may_make_one_example() -> None:
    counter = ExampleCounter(rows_per_example=2)
    counter.add({"input_ids": ids(8, 3)}, fresh=Fresh(3, 4))
    assert counter.total() == 3


@pytest.mark.parametrize("examples", [0, -3, True, 2.5, "epochs", [3]])
def test_what_is_no_way_of_counting_is_refused(examples: Any) -> None:
    with pytest.raises(ConfigError, match="examples="):
        ExampleCounter(examples)
