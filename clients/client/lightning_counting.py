"""How many examples a batch of a Lightning trainer holds.

A batch of several loaders holds those of each. A row that a sampler repeats, so that all processes get as many,
counts once. The loaders know both, so a batch is counted along with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fedcore.errors import WeightError

from .counting import ExampleCounter, Fresh, fresh_rows, fullest

__all__ = ["count_batch", "count_scored"]


def count_batch(
    counter: ExampleCounter,
    loader: Any,
    batch: Any,
    index: int,
    *,
    whole: bool = False,
    weighs: bool = False,
) -> None:
    """Count one batch.

    Args:
        counter: adds it up.
        loader: a loader, or a collection of loaders whose batches make up this one.
        batch: what came out of it.
        index: number of the batch in this pass over the data, from 0.
        whole: the script states how many examples there are, so the batch is not taken apart.
        weighs: the number becomes an update's weight, so that what may be one row is not taken for a batch.

    Raises:
        WeightError: the batch does not say how many examples it holds.
    """
    if weighs and not counter.chosen:
        _refuse_lost_repeats(loader, batch)
    if whole:
        counter.add(batch, fresh=_fresh_of_all(loader, batch, index))
        return
    parts = _parts(loader, batch)
    for source, (one, part) in enumerate([(None, batch)] if parts is None else parts):
        if weighs and _is_one_row(one, part):
            raise WeightError(
                "a loader with batch_size=None gives rows or batches as the dataset has them, and this one has a "
                "number beside a tensor, as a single row has: state how many examples there are, "
                "fl.patch(trainer, examples=...), or give the loader a batch_size"
            )
        if part is not None:  # a loader that is used up gives none where the others go on
            expected, fresh = fullest(_batch_size(one), one), _fresh(one, index)
            counter.add(part, expected=expected, fresh=fresh, source=source)


def count_scored(
    counter: ExampleCounter, trained: ExampleCounter, loader: Any, batch: Any, index: int
) -> None:
    """Count one batch that was scored; where it does not say its examples, by the script's function for training.

    Args:
        counter: adds it up.
        trained: counts what is trained on.
        loader, batch, index: as in `count_batch`.

    Raises:
        WeightError: the batch does not say how many examples it holds, and the script has given no function.
    """
    if not trained.chosen:
        _refuse_lost_repeats(loader, batch)
    before = counter.mark()
    try:
        count_batch(counter, loader, batch, index)
    except WeightError as error:
        counter.go_back(before)  # the batches of other loaders may be counted by now
        if trained.function is None:
            raise WeightError(
                f"validation: {error}. Here the function of the batch helps, and not the number of a round"
            ) from None
        counter.add_stated(trained.function(batch), _fresh_of_all(loader, batch, index))


def _parts(loader: Any, batch: Any) -> list[tuple[Any, Any]] | None:
    """Return each loader with its own batch; None if a hook has given the batch another structure."""
    try:
        return list(_pairs(loader, batch))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return None


def _pairs(loader: Any, batch: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(loader, Mapping):
        if batch.keys() != loader.keys():
            raise ValueError("another structure")
        for key, one in loader.items():
            yield from _pairs(one, batch[key])
    elif isinstance(loader, list | tuple):
        for one, part in zip(loader, batch, strict=True):
            yield from _pairs(one, part)
    else:
        yield loader, batch


def _is_one_row(loader: Any, part: Any) -> bool:
    """Return whether a loader that makes no batches gives what looks like a row: a tensor and a plain number."""
    makes_batches = (
        not isinstance(loader, torch.utils.data.DataLoader)
        or loader.batch_size is not None
        or loader.batch_sampler is not None
    )
    if makes_batches or not isinstance(part, Mapping | list | tuple):
        return False
    values = list(part.values() if isinstance(part, Mapping) else part)
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    numbers = [value for value in values if isinstance(value, int | float)]
    alone = [value for value in tensors if value.ndim == 0]
    return len(tensors) > len(alone) and bool(numbers or alone)


def _batch_size(loader: Any) -> int | None:
    size = getattr(loader, "batch_size", None)
    if size is None:
        size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def _fresh(loader: Any, index: int) -> Fresh | None:
    """Return which rows torch's ``DistributedSampler`` has not repeated; None: all, or nobody knows."""
    batches = getattr(loader, "batch_sampler", None)
    if type(batches) is not torch.utils.data.BatchSampler:  # another one may take rows in any order
        return None
    sampler: Any = batches.sampler
    size = _batch_size(loader)
    if size is None or not _may_repeat(sampler):
        return None
    index %= max(len(batches), 1)  # a short loader begins again within an epoch
    rows, ranks = len(sampler.dataset), sampler.num_replicas
    return fresh_rows(rows, size, ranks, sampler.rank, index, interleaved=True)


def _fresh_of_all(loader: Any, batch: Any, index: int) -> Fresh | None:
    """Return which rows of a whole batch are not repeated, where it is the same for each of its loaders."""
    found = {_fresh(one, index) for one, part in _parts(loader, batch) or () if part is not None}
    return found.pop() if len(found) == 1 else None


def _may_repeat(sampler: Any) -> bool:
    names = {cls.__name__ for cls in type(sampler).__mro__}
    return "DistributedSampler" in names and not sampler.drop_last


def _refuse_lost_repeats(loader: Any, batch: Any) -> None:
    """Refuse a batch sampler of the script's own whose distributed sampler repeats rows: any batch may hold them.

    Raises:
        WeightError: one of the loaders has such a sampler.
    """
    for one, _ in _parts(loader, batch) or ():
        batches: Any = getattr(one, "batch_sampler", None)
        if type(batches) is torch.utils.data.BatchSampler:
            continue
        samplers: list[Any] = [batches, getattr(batches, "sampler", None)]
        for sampler in samplers:
            if not _may_repeat(sampler):
                continue
            rows, ranks = len(sampler.dataset), sampler.num_replicas
            if rows % ranks:
                raise WeightError(
                    f"{type(batches).__name__} makes batches in an order of its own, and {type(sampler).__name__} "
                    f"repeats {-rows % ranks} of {rows} rows for {ranks} processes, so that any batch may hold "
                    "them: give the sampler drop_last=True or a number of rows that is a multiple of the "
                    "processes, or state how many examples there are, fl.patch(trainer, examples=...); "
                    'examples="rows" counts repeated rows, too'
                )
