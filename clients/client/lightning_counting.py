"""How many examples a batch of a Lightning trainer holds.

A batch of several loaders holds those of each. A row that a sampler repeats, so that all processes get as many,
counts once. The loaders know both, so a batch is counted along with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch

from fedcore.errors import WeightError

from .counting import ExampleCounter, Fresh, fresh_rows, fullest

__all__ = ["count_batch", "count_scored"]

_REMEDY: Final = (
    "give the sampler drop_last=True or a number of rows that is a multiple of the processes, or state how many "
    'examples there are, fl.patch(trainer, examples=...); examples="rows" counts repeated rows, too'
)


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
    if parts is None:
        counter.add(batch, fresh=_fresh_of_all(loader, batch, index))
        return
    for source, (one, part) in enumerate(parts):
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
    parts = _parts(loader, batch)
    used = _flat(loader) if parts is None else [one for one, part in parts if part is not None]
    found = {_fresh(one, index) for one in used}
    return found.pop() if len(found) == 1 else None


def _flat(loader: Any) -> list[Any]:
    """Return each of a collection of loaders, whatever their batches look like."""
    if isinstance(loader, Mapping):
        return [one for part in loader.values() for one in _flat(part)]
    if isinstance(loader, list | tuple):
        return [one for part in loader for one in _flat(part)]
    return [loader]


def _may_repeat(sampler: Any) -> bool:
    names = {cls.__name__ for cls in type(sampler).__mro__}
    return "DistributedSampler" in names and not sampler.drop_last


def _refuse_lost_repeats(loader: Any, batch: Any) -> None:
    """Refuse repeated rows of which nobody knows the batch, or the place in it.

    So it is with a batch sampler of the script's own, whose distributed sampler repeats rows: any batch may hold
    them. And with several loaders that do not repeat alike, once a hook has put their rows together.

    Raises:
        WeightError: one of the loaders has such a sampler, or they do not repeat alike.
    """
    loaders = _flat(loader)
    for one in loaders:
        batches: Any = getattr(one, "batch_sampler", None)
        if type(batches) is torch.utils.data.BatchSampler:
            continue
        for sampler in (batches, getattr(batches, "sampler", None)):
            if _repeated(sampler):
                raise WeightError(
                    f"{type(batches).__name__} makes batches in an order of its own, and {_say(sampler)}, so that "
                    f"any batch may hold them: {_REMEDY}"
                )
    if len(loaders) == 1 or _parts(loader, batch) is not None:
        return
    samplers: list[Any] = [
        getattr(getattr(one, "batch_sampler", None), "sampler", None) for one in loaders
    ]
    alike = {
        (len(sampler.dataset), sampler.num_replicas, _batch_size(one)) if _repeated(sampler) else ()
        for one, sampler in zip(loaders, samplers, strict=True)
    }
    if len(alike) > 1:
        repeating = next(sampler for sampler in samplers if _repeated(sampler))
        raise WeightError(
            f"a hook puts the rows of several loaders together, and {_say(repeating)} of one of them, so that "
            f"nobody knows where they are: {_REMEDY}"
        )


def _repeated(sampler: Any) -> int:
    """Return how many rows a sampler repeats over all processes."""
    return -len(sampler.dataset) % sampler.num_replicas if _may_repeat(sampler) else 0


def _say(sampler: Any) -> str:
    return (
        f"{type(sampler).__name__} repeats {_repeated(sampler)} of {len(sampler.dataset)} rows for "
        f"{sampler.num_replicas} processes"
    )
