"""How many examples a trainer has trained on: an update's weight.

One place for all adapters. An example counts where the loss was computed on it:

- a row of a batch, of any structure: a tensor, a mapping, a tuple of columns, a list of rows;
- in a row that holds several sequences (``position_ids``, ``cu_seq_lens_q``, ``seq_idx``), each sequence;
- a row or sequence whose labels are all -100 takes no part in the loss, and counts nothing;
- a row that a distributed sampler repeats to fill the last batch counts once.

Where a batch does not say how many examples it holds, counting is refused: the script states it.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import torch

from fedcore.errors import ConfigError, WeightError

__all__ = [
    "ExampleCounter",
    "Examples",
    "Fresh",
    "count_examples",
    "count_tokens",
    "fresh_rows",
    "fullest",
]

Examples = int | Literal["rows", "tokens"] | Callable[[Any], Any] | None
"""How a script has its examples counted; see `ExampleCounter`."""

_IGNORED: Final = -100
_ROW_KEYS: Final = ("input_ids", "labels", "label", "inputs_embeds", "prompt_ids", "completion_ids")
"""What has one entry a row in any batch that has it; images and their tables may have more."""
_BOUNDARIES: Final = ("cu_seq_lens_q", "cu_seq_lens", "cu_seqlens")
_ADVICE: Final = (
    "state it: fl.patch(trainer, examples=...) takes the number of examples of a round, or a function of the "
    "batch that returns how many it holds"
)


@dataclasses.dataclass(frozen=True)
class Fresh:
    """The first ``rows`` of a batch's ``of`` rows are its own; a sampler has repeated the others."""

    rows: int
    of: int


class ExampleCounter:
    """Adds up the examples of a round, batch after batch.

    Args:
        examples: None or ``"rows"``: what the batches hold is counted. ``"tokens"``: the tokens that the loss was
            computed on. A number: the examples of each round at this site, all its processes together. A function:
            is given each batch as the loader gave it, and returns the number of examples in it.
        rows_per_example: how many rows of a batch make one example, such as 2 for pairs of answers.
        shifted: whether the model compares labels with the position before, so that the first label is not used.

    Raises:
        ConfigError: ``examples`` is none of these.
    """

    def __init__(
        self, examples: Examples = None, *, rows_per_example: int = 1, shifted: bool = False
    ) -> None:
        self._examples = _check(examples)
        self._rows_per_example = rows_per_example
        self._shifted = shifted
        self._packed = False
        self._choices: defaultdict[int, Choice] = defaultdict(dict)  # of each loader
        self._total: Any = 0

    @property
    def stated_for_site(self) -> bool:
        """Whether the total is that of all processes of the site."""
        return isinstance(self._examples, int)

    @property
    def stated(self) -> bool:
        """Whether the script says how many examples there are, for a round or for a batch."""
        return isinstance(self._examples, int) or callable(self._examples)

    @property
    def chosen(self) -> bool:
        """Whether the script has said how examples are counted, in any way."""
        return self._examples is not None

    @property
    def function(self) -> Callable[[Any], Any] | None:
        """What the script has given to count a batch with; None if nothing."""
        return self._examples if callable(self._examples) else None

    def add_stated(self, found: Any, fresh: Fresh | None = None) -> None:
        """Count what the script's function has returned for a batch, less the share of repeated rows.

        Raises:
            WeightError: it is no number of examples.
        """
        self._total = self._total + _share(_stated(found), fresh)

    @property
    def how(self) -> str:
        """What was counted, for the log."""
        if isinstance(self._examples, int):
            return "stated by the script"
        if callable(self._examples):
            return "stated by the script for each batch"
        if self._examples == "tokens":
            return "tokens that the loss was computed on"
        return "sequences in packed rows" if self._packed else "rows of the batches"

    def clear(self) -> None:
        """Begin a round, or an attempt at one, anew."""
        self._total = 0

    def add(
        self,
        batch: Any,
        *,
        computed: Any = None,
        expected: int | None = None,
        fresh: Fresh | None = None,
        source: int = 0,
    ) -> None:
        """Count one batch that was trained on.

        Args:
            batch: as the loader gave it.
            computed: what the loss was computed from, where the trainer has made that out of the batch.
            expected: the rows of the loader's fullest batch; decides where a structure has two readings.
            fresh: which rows are no repetitions; None: all.
            source: number of the loader that the batch is from, where there are several.

        Raises:
            WeightError: the batch does not say how many examples it holds, or the script's function returned
                something else than a number of examples.
        """
        if isinstance(self._examples, int):
            self._total = self._examples
            return
        if callable(self._examples):
            self.add_stated(self._examples(batch), fresh)
            return
        seen = batch if computed is None else computed
        if self._examples == "tokens":
            self._total = self._total + count_tokens(seen, shifted=self._shifted, fresh=fresh)
            return
        choice = self._choices[source]
        found, packed = count_examples(seen, expected=expected, choice=choice, fresh=fresh)
        self._packed = self._packed or packed
        self._total = self._total + found

    def mark(self) -> Any:
        """Return what `go_back` returns to."""
        return self._total

    def go_back(self, mark: Any) -> None:
        """Forget what was added since `mark`."""
        self._total = mark

    def total(self) -> int:
        """Return the number of examples since `clear`."""
        if isinstance(self._examples, int):
            return self._examples if self._total else 0
        rows = int(self._total)
        return rows if self._examples is not None and self._examples != "rows" else (
            -(-rows // self._rows_per_example)
        )  # fmt: skip


def _check(examples: Any) -> Examples:
    number = _integer(examples)
    if number is not None and number >= 1:
        return number
    if examples is None or examples in ("rows", "tokens") or callable(examples):
        found: Examples = examples
        return found
    raise ConfigError(
        f"examples={examples!r}: expected the number of examples of a round (1 or more), a function of the batch, "
        "'rows' or 'tokens'"
    )


def _integer(value: Any) -> int | None:
    """Return an integer of any kind as Python's; None for anything else, truth values included."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return int(value)


def _stated(found: Any) -> Any:
    if isinstance(found, torch.Tensor) and found.numel() == 1 and not found.is_floating_point():
        return found.reshape(())
    number = _integer(found)
    if number is not None and number >= 0:
        return number
    raise WeightError(
        f"the function given as examples= returned {found!r}: expected the number of examples in the batch, an "
        "integer of 0 or more"
    )


# --- rows ------------------------------------------------------------------------------------------

Choice = dict[str, Any]
"""Which of several readings of a structure was right once; kept from batch to batch."""


def count_examples(
    batch: Any,
    *,
    expected: int | None = None,
    choice: Choice | None = None,
    fresh: Fresh | None = None,
) -> tuple[Any, bool]:
    """Return the examples of a batch that the loss was computed on, and whether they lie packed in its rows.

    The number may be a tensor on the batch's device, so that counting does not wait for that.

    Raises:
        WeightError: the batch does not say it.
    """
    choice = {} if choice is None else choice
    if isinstance(batch, Mapping):
        segments = _segments(batch)
        if segments is not None:
            return _count_segments(segments, _active(batch, segments.shape), fresh), True
        rows = _rows(batch, expected, choice)
        labels = _token_labels(batch)
        if labels is not None and labels.shape[:1] == (rows,):
            used = (labels != _IGNORED).reshape(rows, -1).any(1) if rows else labels
            if fresh is not None and fresh.of == rows:
                return used[: fresh.rows].sum(), False
            return _share(used.sum(), fresh), False
        return _share(rows, fresh), False
    return _share(_rows(batch, expected, choice), fresh), False


def _rows(batch: Any, expected: int | None, choice: Choice) -> int:
    rows = _size(batch, expected, choice)
    if rows is None:
        raise WeightError(
            f"can't tell how many examples a batch holds that is {_describe(batch)}; {_ADVICE}"
        )
    return rows


def _size(value: Any, expected: int | None = None, choice: Choice | None = None) -> int | None:
    """Return how many rows a value holds; None if it does not say."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return int(shape[0]) if len(shape) else 1
    if isinstance(value, str | bytes):
        return None
    if isinstance(value, Mapping):
        return _mapping_size(value, expected, choice)
    if isinstance(value, list | tuple):
        return _sequence_size(value, expected, choice)
    graphs = getattr(value, "num_graphs", None)
    if isinstance(graphs, int):
        return graphs
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return _mapping_size(fields, expected, choice)
    return None


def _mapping_size(
    value: Mapping[Any, Any], expected: int | None, choice: Choice | None
) -> int | None:
    sizes = {key: size for key, part in value.items() if (size := _column_size(part)) is not None}
    if len(set(sizes.values())) == 1:
        return next(iter(sizes.values()))
    for key in (*_ROW_KEYS, *(k for k in sizes if str(k).endswith("_input_ids"))):
        if key in sizes:
            return sizes[key]
    if choice is not None and choice.get("key") in sizes:
        return sizes[choice["key"]]
    fits = [key for key, size in sizes.items() if size == expected]
    if fits:
        if choice is not None:
            choice["key"] = fits[0]
        return sizes[fits[0]]
    return None


def _column_size(part: Any) -> int | None:
    """Return the rows of one of a batch's columns; a single number or text is none."""
    if getattr(part, "shape", None) is not None and not len(part.shape):
        return None
    return _size(part)


def _sequence_size(value: Sequence[Any], expected: int | None, choice: Choice | None) -> int | None:
    """A list of rows has as many examples as entries; a tuple of columns, as each column has rows."""
    if not value:
        return 0
    sizes = {size for part in value if (size := _column_size(part)) is not None}
    if all(isinstance(part, list | tuple) for part in value):  # columns that could not be stacked
        sizes = {len(part) for part in value}
    columns = next(iter(sizes)) if len(sizes) == 1 else None
    rows = len(value) if len({_kind(part) for part in value}) == 1 else None
    if rows is None or columns is None:
        return columns if rows is None else rows
    if any(map(_is_one_row, value)):
        return rows
    if choice is not None and "rows" in choice:
        return rows if choice["rows"] else columns
    if rows == columns:
        if choice is not None:
            choice["either"] = rows
        return rows
    if (
        choice is not None and "either" in choice
    ):  # as many columns as before, or another number of rows
        choice["rows"] = rows != choice["either"]
        return rows if choice["rows"] else columns
    if expected in (rows, columns):
        if choice is not None:
            choice["rows"] = rows == expected
        return expected
    first = value[0]
    are_rows = isinstance(first, Mapping) or (isinstance(value, list) and isinstance(first, tuple))
    return rows if are_rows else columns


def _is_one_row(part: Any) -> bool:
    """Whether an entry of a list is a row: it has values both of 0 dimensions and of more."""
    values = list(part.values()) if isinstance(part, Mapping) else part
    if not isinstance(values, list | tuple):
        return False
    dimensions = {len(v.shape) for v in values if getattr(v, "shape", None) is not None}
    return 0 in dimensions and len(dimensions) > 1


def _kind(part: Any) -> tuple[Any, ...]:
    """Return what rows of one list have in common."""
    shape = getattr(part, "shape", None)
    if shape is not None:
        return ("array", len(shape), str(part.dtype), tuple(shape[1:]))
    if isinstance(part, Mapping):
        return ("mapping", *sorted(map(str, part)))
    if isinstance(part, list | tuple):
        return (type(part).__name__,)
    return ("number",) if isinstance(part, numbers.Number) else (type(part).__name__,)


def _describe(batch: Any, depth: int = 0) -> str:
    """Name a structure without its values."""
    shape = getattr(batch, "shape", None)
    if shape is not None:
        return f"{type(batch).__name__} {tuple(shape)}"
    if isinstance(batch, Mapping) and depth < 2:
        parts = [f"{key}: {_describe(part, depth + 1)}" for key, part in list(batch.items())[:6]]
        return f"{type(batch).__name__} of {', '.join(parts)}"
    if isinstance(batch, list | tuple) and depth < 2:
        parts = [_describe(part, depth + 1) for part in batch[:4]]
        return f"{type(batch).__name__} of {', '.join(parts)}"
    return type(batch).__name__


def _share(count: Any, fresh: Fresh | None) -> Any:
    """Return the part of a count that falls on rows that are not repeated."""
    if fresh is None or fresh.rows >= fresh.of:
        return count
    return (count * fresh.rows + fresh.of // 2) // fresh.of


# --- sequences in packed rows ------------------------------------------------------------------------


def _token_labels(batch: Mapping[Any, Any]) -> torch.Tensor | None:
    for key in ("labels", "shift_labels"):
        found = batch.get(key)
        if isinstance(found, torch.Tensor) and found.ndim and not found.is_floating_point():
            return found if found.dtype != torch.bool else None
    return None


def _segments(batch: Mapping[Any, Any]) -> torch.Tensor | None:
    """Return the number of the sequence that each token belongs to, rows x tokens; None: one a row."""
    tokens = batch.get("input_ids", batch.get("labels"))
    if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or not tokens.numel():
        return None
    index = batch.get("seq_idx")
    if isinstance(index, torch.Tensor) and index.shape == tokens.shape:
        return _number(index[:, 1:] != index[:, :-1])
    for key in _BOUNDARIES:
        ends = batch.get(key)
        if isinstance(ends, torch.Tensor) and ends.ndim == 1 and ends.numel() > 1:
            places = torch.arange(tokens.numel(), device=ends.device, dtype=ends.dtype)
            return torch.searchsorted(ends[1:], places, right=True).reshape(tokens.shape)
    position = batch.get("position_ids")
    if isinstance(position, torch.Tensor) and position.shape == tokens.shape:
        return _number(position[:, 1:] <= position[:, :-1])
    return None


def _number(starts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(starts.long(), (1, 0)).cumsum(1)


def _active(batch: Mapping[Any, Any], shape: Any) -> torch.Tensor | None:
    """Return which tokens count: those with a label, else those that are no padding."""
    labels = _token_labels(batch)
    if labels is not None and labels.shape == shape:
        return labels != _IGNORED
    for key in ("completion_mask", "attention_mask"):
        mask = batch.get(key)
        if isinstance(mask, torch.Tensor) and mask.shape == shape:
            return mask != 0
    return None


def _count_segments(
    segments: torch.Tensor, active: torch.Tensor | None, fresh: Fresh | None
) -> Any:
    rows, length = segments.shape
    exact = fresh is not None and fresh.of == rows
    if exact and fresh is not None:
        segments = segments[: fresh.rows]
        active = None if active is None else active[: fresh.rows]
        rows = fresh.rows
    place = segments + torch.arange(rows, device=segments.device)[:, None] * (length + 1)
    hit = torch.zeros(rows * (length + 1), dtype=torch.int64, device=segments.device)
    used = torch.ones_like(place) if active is None else active.to(place.device).long()
    hit.scatter_reduce_(0, place.reshape(-1), used.reshape(-1), "amax")
    if exact or fresh is None:
        return hit.sum()
    share = _share(hit.sum(), fresh)
    if rows > 1 or fresh.rows >= fresh.of:
        return share
    whole = (
        segments[0, -1] + 1 == fresh.of
    )  # one row that was made of the batch's rows, in their order
    return torch.where(whole, hit[: fresh.rows].sum(), share)


# --- tokens ------------------------------------------------------------------------------------------


def count_tokens(batch: Any, *, shifted: bool = False, fresh: Fresh | None = None) -> Any:
    """Return the number of tokens that the loss was computed on.

    Raises:
        WeightError: the batch holds neither labels nor masks nor tokens.
    """
    if isinstance(batch, Mapping):
        labels = _token_labels(batch)
        if labels is not None and labels.ndim > 1:
            cut = labels[..., 1:] if shifted and "labels" in batch else labels
            return _count_true(cut != _IGNORED, fresh)
        for key in ("completion_mask", "attention_mask"):
            if isinstance(batch.get(key), torch.Tensor):
                return _count_true(batch[key] != 0, fresh)
        if isinstance(batch.get("input_ids"), torch.Tensor):
            return _share(batch["input_ids"].numel(), fresh)
    raise WeightError(
        f"examples='tokens': a batch that is {_describe(batch)} has no labels, masks or input_ids; {_ADVICE}"
    )


def _count_true(found: torch.Tensor, fresh: Fresh | None) -> Any:
    if fresh is not None and found.shape[:1] == (fresh.of,):
        return found[: fresh.rows].sum()
    return _share(found.sum(), fresh)


# --- rows that a distributed sampler repeats ---------------------------------------------------------


def fresh_rows(
    rows: int, batch: int, ranks: int, rank: int, index: int, *, interleaved: bool = False
) -> Fresh:
    """Return which rows of a rank's batch are no repetitions, where a sampler fills up the last batches.

    Args:
        rows: what the sampler draws from, over all ranks.
        batch: rows of one rank's full batch.
        ranks, rank: how many processes share the rows, and which one this is.
        index: number of the batch in this rank's pass over the data, from 0.
        interleaved: the ranks take row after row in turn (torch's ``DistributedSampler``), not batch after batch.
    """
    if interleaved:
        own = -(-(rows - rank) // ranks) - index * batch
        held = min(-(-rows // ranks) - index * batch, batch)
    else:
        own = rows - (index * ranks + rank) * batch
        held = batch if ranks > 1 else own
    return Fresh(min(max(own, 0), batch), min(max(held, 0), batch))


# --- the fullest batch of a loader ------------------------------------------------------------------------


def fullest(size: int | None, loader: Any) -> int | None:
    """Return the rows of a loader's fullest batch: ``size``, or all that its sampler draws if that is less."""
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):  # as accelerate's
        batches = batches.batch_sampler
    try:
        rows = len(batches.sampler)
    except (AttributeError, TypeError):  # a stream, or a sampler of the script's own
        return size
    return size if size is None or not rows else min(size, rows)
