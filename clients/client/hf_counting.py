"""The examples that a ``transformers.Trainer`` trains on, counted from what its loss is computed on."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Final

from fedcore.errors import ConfigError

from .counting import ExampleCounter, Examples, Fresh, fresh_rows, fullest

__all__ = ["StepCounter"]

logger = logging.getLogger("fedcore.client")

_PAIRS: Final = {
    "DataCollatorForPreference": 2,
    "DataCollatorForVisionPreference": 2,
    "DataCollatorForTriplePreference": 3,
}
"""TRL's collators that make several rows of one example: the chosen answers, then the rejected ones."""


class StepCounter:
    """Counts each of a trainer's training steps between `begin` and `end`.

    Args:
        trainer: a ``transformers.Trainer`` or a subclass.
        examples: how; see `ExampleCounter`.

    Attributes:
        counted: the examples since `begin`.
        loader: of the training data, as the trainer made it last.
        skipped: batches that the next pass over the data leaves out at its beginning.

    Raises:
        ConfigError: the trainer has cut its examples into rows that do not show where one ends.
    """

    def __init__(self, trainer: Any, examples: Examples) -> None:
        self._trainer = trainer
        self.counted = ExampleCounter(
            examples,
            rows_per_example=max(
                _PAIRS.get(cls.__name__, 1) for cls in type(trainer.data_collator).__mro__
            ),
            shifted=bool(getattr(trainer, "_loss_shifts_labels", False)),
        )
        if examples is None:
            _refuse_cut_examples(trainer.args)
        self.skipped = 0
        self._active = False
        self.loader: Any = None
        self._iterator: Any = None
        self._index = 0
        self._fresh: deque[Fresh | None] = deque()
        self._batch: tuple[Any, Fresh | None] | None = None
        self._losses = 0  # of the training step that is under way
        self._mark: Any = None
        self._said = False
        names = ("training_step", "compute_loss", "get_train_dataloader", "get_batch_samples")
        self._calls = {name: getattr(trainer, name) for name in names if hasattr(trainer, name)}

    def attach(self) -> None:
        """Wrap the trainer's methods, once."""
        for name in self._calls:
            setattr(self._trainer, name, getattr(self, name))

    def begin(self) -> None:
        """Count anew: a round begins, or another attempt at it with smaller batches."""
        self.counted.clear()
        self._fresh.clear()
        self._iterator, self._batch = None, None
        self._active = True

    def end(self) -> None:
        """Count no longer."""
        self._active = False

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Count the batch: what the trainer computes a loss from, or the batch itself where it never says."""
        if not self._active:
            return self._calls["training_step"](model, inputs, *args, **kwargs)
        fresh = self._fresh.popleft() if self._fresh else None
        batch = dict(inputs) if isinstance(inputs, Mapping) else inputs  # steps take values out
        self._batch = (batch, fresh)
        self._losses, self._mark = 0, self.counted.mark()
        try:
            loss = self._calls["training_step"](model, inputs, *args, **kwargs)
            if not self._losses:
                self._count(None)
        finally:
            self._batch = None
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Count what the loss of a training step is computed from; the trainer may have made that itself.

        A step with several losses computes them from parts of its batch, or from the same rows again: the batch
        itself counts.
        """
        if self._batch is not None:
            self._losses += 1
            if self._losses == 1:
                self._count(inputs)
            elif (
                self._losses == 2 and not self.counted.stated
            ):  # what is stated is of the whole batch
                self.counted.go_back(self._mark)
                self._count(None)
        return self._calls["compute_loss"](model, inputs, *args, **kwargs)

    def _count(self, computed: Any) -> None:
        assert self._batch is not None
        batch, fresh = self._batch
        size = fullest(self._trainer._train_batch_size, self.loader)
        self.counted.add(batch, computed=computed, expected=size, fresh=fresh)

    def get_train_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Remember the loader, which knows the rows that it repeats."""
        self.loader = self._calls["get_train_dataloader"](*args, **kwargs)
        shard: Any = getattr(self.loader, "dataset", None)
        if type(shard).__name__ != "IterableDatasetShard":
            return self.loader
        if self.loader.num_workers:
            self._say_repeats(shard)
        elif not isinstance(shard.dataset, _Stream):
            shard.dataset = _Stream(shard.dataset)
        return self.loader

    def _say_repeats(self, shard: Any) -> None:
        """Say once that rows of a stream may count twice: its workers alone know where it ends."""
        repeats = shard.num_processes > 1 and not shard.drop_last
        if repeats and not self.counted.stated_for_site and not self._said:
            self._said = True
            logger.warning(
                "rows of a stream that fill the last batches of the processes count twice where its loader has "
                "workers: set dataloader_num_workers=0, dispatch_batches=True (accelerator_config), "
                "dataloader_drop_last=True, or examples=... to the number of examples of a round"
            )

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        """Note of each batch which of its rows are repeated."""
        if not self._active:
            return self._calls["get_batch_samples"](epoch_iterator, *args, **kwargs)
        if epoch_iterator is not self._iterator:
            self._iterator = epoch_iterator
            self._index, self.skipped = self.skipped, 0
        watched = self._watch(epoch_iterator)
        return self._calls["get_batch_samples"](watched, *args, **kwargs)

    def _watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self._fresh.append(self._fresh_rows())
            self._index += 1
            yield batch

    def _fresh_rows(self) -> Fresh | None:
        """Return what accelerate knows of the batch that it has just given; None: nothing is repeated."""
        sampler: Any = getattr(self.loader, "batch_sampler", None)
        if type(sampler).__name__ == "BatchSamplerShard":
            ranks = sampler.num_processes
            inner = getattr(sampler.batch_sampler, "sampler", None)
            repeats = ranks > 1 and sampler.even_batches and not sampler.drop_last
            if not repeats or inner is None or sampler.batch_size is None:
                return None
            size = sampler.batch_size // (ranks if sampler.split_batches else 1)
            return fresh_rows(len(inner), size, ranks, sampler.process_index, self._index)
        shard: Any = getattr(self.loader, "dataset", None)
        if isinstance(getattr(shard, "dataset", None), _Stream):
            if shard.drop_last:
                return None
            ranks = shard.num_processes
            size = shard.batch_size // (ranks if getattr(shard, "split_batches", False) else 1)
            return fresh_rows(shard.dataset.read, size, ranks, shard.process_index, self._index)
        state = self._trainer.accelerator.gradient_state
        if type(self.loader).__name__ == "DataLoaderDispatcher" and state.end_of_dataloader:
            ranks, rank = self._trainer.args.world_size, self._trainer.args.process_index
            return fresh_rows(state.remainder, -(-state.remainder // ranks), ranks, rank, 0)
        return None


class _Stream:
    """A stream that each rank reads whole; counts the rows that were read in a pass.

    accelerate fills the last batches of the ranks with rows of the first ones.
    """

    def __init__(self, rows: Any) -> None:
        self._rows = rows
        self.read = 0

    def __iter__(self) -> Iterator[Any]:
        self.read = 0
        for row in self._rows:
            self.read += 1
            yield row

    def __len__(self) -> int:
        return len(self._rows)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_rows":  # as a copy that is not made yet
            raise AttributeError(name)
        return getattr(self._rows, name)


def _refuse_cut_examples(args: Any) -> None:
    if getattr(args, "packing", False) and getattr(args, "packing_strategy", "") == "wrapped":
        raise ConfigError(
            "packing_strategy='wrapped' cuts examples at the ends of the packed rows, and nothing tells where one "
            "ends, so their number is not known. Take packing_strategy='bfd', or say what counts: "
            "fl.patch(trainer, examples=...) takes 'tokens', 'rows' (the packed ones), the number of examples of "
            "a round, or a function of the batch that returns how many it holds"
        )
