"""Where a Lightning trainer goes on in its data: each round where the last one stopped, as one training would.

A round that a number of steps or a limit of time ends stops within an epoch. `DataPlace` keeps the iterator of the
loader then, and puts it back in the next round, with the trainer's counters as they were: the epoch goes on with
the next batch. Another loader than the last round's is brought to the same place: with the random numbers that
the epoch began with, it leaves out as many batches.

A round that ends with an epoch leaves two things to the next one. Persistent workers go on where the loader is the
same; a new loader's are started without the random number that one training would not draw. A generator that the
script has made anew, with the seed it had before, goes on where the last one stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .randomness import generators, put_back, take

__all__ = ["DataPlace"]


class _Held(NamedTuple):
    """A loader in the middle of an epoch; ``workers`` are the iterators that its parts own themselves."""

    loader: Any
    fetcher: Any
    workers: list[Any]


class DataPlace:
    """Wraps a trainer's loops, so that the calls of ``fit`` between `begin` and `end` are one training's data.

    Args:
        trainer: a Lightning trainer.
        goes_on: a round goes on where the last one stopped; else it begins its data anew.
        say: logs a line.
    """

    def __init__(self, trainer: Any, goes_on: bool, say: Callable[[str], None]) -> None:
        self._trainer, self._goes_on, self._say = trainer, goes_on, say
        self._loop = trainer.fit_loop
        self._setup, self._reset = self._loop.setup_data, self._loop.epoch_loop.reset
        self._loop.setup_data = self.setup_data
        self._loop.epoch_loop.reset = self.reset
        self._held: _Held | None = None
        self._source: Any = None
        self._batches = 0
        self._pending = self._continuing = self._limited = self._begun = False
        self._random: dict[str, Any] | None = None
        self._first_pass = True  # of the loader that the epoch began with
        self._reloaded: float = 0
        self._after: list[list[torch.Tensor]] | None = (
            None  # loaders' generators, after the last round
        )

    @property
    def behind(self) -> int:
        """How many epochs the trainer's count is set back already for an epoch that goes on: 0 or 1."""
        return int(self._continuing)

    def begin(self) -> None:
        """Have the next ``fit`` begin where the last round stopped."""
        self._pending = True
        self._continuing = False

    def end(self) -> None:
        """Note where the round stopped, and keep the loader for the next one, before the trainer drops it."""
        self._pending = False
        self.release()
        loop = self._loop
        self._tell_limit()
        self._batches = 0
        if loop._data_fetcher is None:
            return
        loader = loop._combined_loader
        self._source = loop._data_source.instance
        self._after = _take(loader)["loaders"]
        workers = _workers(loader)
        if not loop.epoch_loop._num_ready_batches_reached():
            self._batches = loop.epoch_loop.batch_progress.current.completed
            self._reloaded = loop._last_train_dl_reload_epoch
        elif not any(workers):
            return
        if self._goes_on:
            self._held = _Held(loader, loop._data_fetcher, workers)
            loop._data_fetcher = None

    def release(self) -> None:
        """Drop the loader that was kept."""
        held, self._held = self._held, None
        if held is not None:
            held.fetcher.teardown()

    # --- what the trainer's loops call ---------------------------------------------------------------

    def setup_data(self) -> None:
        """Make the loader of a round, or take up the last one's; later calls in a round are Lightning's alone."""
        if not self._pending:
            self._setup()
            return
        self._pending = False
        self._begun = True
        if self._batches and self._goes_on and self._go_on():
            epoch = self._trainer.current_epoch
            self._say(f"the data go on in epoch {epoch}, after batch {self._batches} of it")
            return
        reloads = self._trainer.current_epoch > 0 and self._loop._should_reload_train_dl
        goes_on = self._goes_on and not self._batches and not reloads
        if goes_on and self._take_up_workers():
            self._begun = False
            return
        self.release()
        if self._batches:
            self._say("the data begin anew")
        self._first_pass = True
        self._make_first_iterator(goes_on and self._after is not None)
        if reloads:  # one training makes two iterators then, and goes through the second
            self._begun = False
            return
        # The loader's iterator is made: the loop would make another one, which a stream would notice.
        self._loop._resuming_from_checkpoint = True

    def _take_up_workers(self) -> bool:
        """Go on with the loader whose persistent workers the last round has left; False if there are none."""
        held, loop = self._held, self._loop
        if held is None or not self._unchanged(held):
            return False
        self._held = None
        loop._combined_loader, loop._data_fetcher = held.loader, held.fetcher
        self._setup()
        return True

    def _unchanged(self, held: _Held) -> bool:
        """Whether the script gives the loader that was kept, and has not gone through it since."""
        same = _same(self._loop._data_source.instance, self._source)
        return same and _workers(held.loader) == held.workers

    def _make_first_iterator(self, goes_on: bool) -> None:
        """Set up a loader; noted are the random states right before its first iterator draws from them."""
        loop, load = self._loop, self._loop._load_combined_loader_states

        def note() -> None:
            load()
            # The loop does so after this, when workers have asked the sampler for their first batches.
            _set_epoch(loop._combined_loader, self._trainer.current_epoch)
            if goes_on:
                _go_on_drawing(loop._combined_loader, self._after or [])
                self._first_pass = not _start_workers(loop._combined_loader)
            self._random = _take(loop._combined_loader)

        loop._load_combined_loader_states = note
        try:
            self._setup()
        finally:
            loop._load_combined_loader_states = load

    def reset(self) -> None:
        """Let an epoch that goes on keep its count of batches."""
        if not self._continuing:
            self._reset()
            if not self._begun:  # an epoch begins here, with a new iterator
                self._random = _take(self._loop._combined_loader)
                self._first_pass = False
            self._begun = False
            return
        self._continuing = self._begun = False
        self._loop._restarting = False
        done = self._loop.epoch_loop.batch_progress
        done.reset_on_restart()
        self._loop._data_fetcher.fetched -= done.current.ready  # the loop adds it again

    def _go_on(self) -> bool:
        """Take up the epoch that the last round left; False if its rest can't be told from what was seen."""
        loop = self._loop
        held, self._held = self._held, None
        if held is not None and self._unchanged(held):
            self._return_to_epoch(1)
            loop._combined_loader, loop._data_fetcher = held.loader, held.fetcher
            self._setup()
            return True
        if held is not None:
            held.fetcher.teardown()
        now = take()
        self._setup()
        drawn = any(_draws(loader) for loader in loop._combined_loader.flattened)
        if drawn and self._random is None:
            return False
        self._return_to_epoch(1)
        loop._last_train_dl_reload_epoch = self._reloaded
        if self._first_pass:  # persistent workers draw another number when they are started
            loop._combined_loader.reset()
        if self._random is not None:  # the epoch has the order with which it began
            _put_back(self._random, loop._combined_loader)
        found = self._leave_out(self._batches)
        put_back(now)
        if not found:
            self._return_to_epoch(-1)
            iter(loop._data_fetcher)
        return found

    def kept(self) -> dict[str, Any]:
        """Return the place, for another process."""
        return {
            "batches": self._batches, "epoch_random": self._random, "first_pass": self._first_pass,
            "reloaded": self._reloaded, "after": self._after,
        }  # fmt: skip

    def recall(self, kept: dict[str, Any]) -> None:
        """Go on where another process stopped."""
        self._batches, self._random = int(kept["batches"]), kept["epoch_random"]
        self._first_pass = kept.get("first_pass", True)
        self._reloaded = kept.get("reloaded", 0)
        self._after = kept.get("after")

    def _return_to_epoch(self, by: int) -> None:
        """Count the epoch that the last round ended in as under way; with -1, as done again."""
        for counts in (self._loop.epoch_progress.total, self._loop.epoch_progress.current):
            counts.processed -= by
            counts.completed -= by
        # As the loops are where they resume within an epoch.
        self._continuing = self._loop._restarting = self._loop._resuming_from_checkpoint = by > 0

    def _leave_out(self, batches: int) -> bool:
        """Read over so many batches; False if the loader does not hold more than that."""
        fetcher = self._loop._data_fetcher
        _set_epoch(self._loop._combined_loader, self._trainer.current_epoch)
        iter(fetcher)
        for _ in range(batches):
            if fetcher.done:
                return False
            try:
                next(getattr(fetcher, "iterator_wrapper", fetcher))
            except StopIteration:
                return False
        return not fetcher.done

    def _tell_limit(self) -> None:
        if self._limited or self._loop._combined_loader is None:
            return
        for loader in self._loop._combined_loader.flattened:
            length = _length(loader)
            if self._trainer.num_training_batches < length:
                self._limited = True
                first = self._trainer.num_training_batches
                self._say(
                    f"limit_train_batches: each epoch takes the first {first} batches of its loader, as in any "
                    "training; to go on through the data from round to round, set max_steps instead"
                )
                return


def _take(loader: Any) -> dict[str, Any]:
    """Return the random states that decide a pass over the data, those of the loader's own generators included."""
    return {**take(), "loaders": [take(part)["loader"] for part in loader.flattened]}


def _put_back(states: dict[str, Any], loader: Any) -> None:
    for part, own in zip(loader.flattened, states["loaders"], strict=False):
        put_back({**states, "loader": own}, part)
    put_back(states)


def _set_epoch(loader: Any, epoch: int) -> None:
    """Have samplers whose order is that of an epoch's number draw that epoch."""
    for part in loader.flattened:
        batches = getattr(part, "batch_sampler", None)
        for sampler in (getattr(part, "sampler", None), getattr(batches, "sampler", None), batches):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(epoch)


def _go_on_drawing(loader: Any, after: list[list[torch.Tensor]]) -> None:
    """Bring generators that are as new to where those of the same seeds stopped."""
    for part, states in zip(loader.flattened, after, strict=False):
        for generator, state in zip(generators(part), states, strict=False):
            seed = generator.initial_seed()
            new = torch.Generator(generator.device).manual_seed(seed)
            last = torch.Generator(generator.device)
            last.set_state(state)
            if last.initial_seed() == seed and torch.equal(new.get_state(), generator.get_state()):
                generator.set_state(state)


def _start_workers(loader: Any) -> bool:
    """Start persistent workers, and draw nothing for that; False if there are none."""
    persistent = [part for part in loader.flattened if getattr(part, "persistent_workers", False)]
    if persistent:
        states = _take(loader)
        for part in persistent:
            iter(part)
        _put_back(states, loader)
    return bool(persistent)


def _length(loader: Any) -> float:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return float("inf")


def _workers(loader: Any) -> list[Any]:
    """Return the iterators that loaders with persistent workers share among all their passes."""
    return [getattr(part, "_iterator", None) for part in loader.flattened]


def _same(one: Any, other: Any) -> bool:
    """Whether two collections hold the same loaders."""
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and type(one) is type(other):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one is other


def _draws(loader: Any) -> bool:
    """Whether a loader draws another order in each pass, so that its first batches are none that were seen."""
    sampler = getattr(loader, "sampler", None)
    return any(cls.__name__ == "RandomSampler" for cls in type(sampler).__mro__) and (
        getattr(sampler, "generator", None) is None
    )
