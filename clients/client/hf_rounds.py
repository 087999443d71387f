"""The rounds of a ``transformers.Trainer`` as one training: each goes on where the last one stopped.

A round is what the trainer does when it resumes from a checkpoint: it takes up its state (steps, epoch, log),
leaves out the batches of this epoch that it has seen, and goes on with optimiser, schedule and random numbers.
Only the weights are others, those of the global model.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from .hf_counting import StepCounter
from .hf_kept import KeptRounds, Place
from .randomness import put_back, take

__all__ = ["Options", "Rounds"]

_PERSISTENT: Final = "dataloader_persistent_workers"


@dataclass(frozen=True)
class Options:
    """What a script chooses.

    Attributes:
        spans: the learning-rate schedule is laid out over all rounds; else over each.
        goes_on: a round goes on in the data where the last one stopped; else it begins the data anew.
        keep: whether optimiser and schedule are kept on disk; None: where they are small.
    """

    spans: bool = True
    goes_on: bool = True
    keep: bool | None = None


@dataclass
class _Round:
    """One round, while it trains."""

    number: int
    rounds: int
    fresh_optimizer: bool
    schedule: dict[str, Any] | None
    random: dict[str, Any]
    attempts: int = 0
    stepped: bool = False
    began: bool = False
    epoch: int = 0
    batches: int = 0


class Rounds:
    """Wraps a trainer's methods, so that its calls of ``train`` within `train` are one training.

    Args:
        trainer: a ``transformers.Trainer`` or a subclass.
        counter: counts its batches and knows its loader.
        options: see there.
        begins: is told that training begins, and whether it is the first attempt of the round.
        say: logs a line.
    """

    def __init__(
        self,
        trainer: Any,
        counter: StepCounter,
        options: Options,
        begins: Callable[..., None],
        say: Callable[[str], None],
    ) -> None:
        self._trainer = trainer
        self._counter = counter
        self._options = options
        self._begins, self._say = begins, say
        self._budget: tuple[int, float] = trainer.args.max_steps, trainer.args.num_train_epochs
        self._seed: int | None = None
        self._epoch_random: dict[str, Any] | None = None
        self._kept = KeptRounds(trainer, options.keep, None)
        self._round: _Round | None = None
        self._recalled = self._restarted = False
        self._place: Place | None = None
        self._state: Any = None
        self._schedule: Any = None
        self._created = False
        self._calls: dict[str, Any] = {}

    def attach(self) -> None:
        """Wrap the trainer's methods, once, and have it call back before its other callbacks."""
        names = ("create_scheduler", "_init_training_state", "_load_from_checkpoint",
                 "_load_optimizer_and_scheduler", "_load_rng_state")  # fmt: skip
        for name in names:
            if hasattr(self._trainer, name):
                self._calls[name] = getattr(self._trainer, name)
                setattr(self._trainer, name, getattr(self, name))
        handler = self._trainer.callback_handler
        self._trainer.add_callback(_make_callback(self))
        handler.callbacks.insert(0, handler.callbacks.pop())

    # --- from round to round ------------------------------------------------------------------------

    def recall(self, round_: int, folder: Path | None) -> None:
        """Take up what an earlier process of this site left; the first call counts.

        Args:
            round_: the round that comes.
            folder: where it may lie; None: nothing is kept from process to process, and the round's number tells
                where the site stands.
        """
        if self._recalled:
            return
        self._recalled = True
        self._kept = KeptRounds(self._trainer, self._options.keep, folder)
        found = self._kept.find(round_)
        if found is not None:
            self._place, self._state = found
            self._seed, self._epoch_random = self._place.seed, self._place.epoch_random
        elif folder is None and round_ > 1:
            self._place, self._state = self._derive(round_ - 1)
        else:
            return
        self._restarted = True
        self._trainer.state.global_step = self._state.global_step
        self._trainer.state.epoch = self._state.epoch

    def _derive(self, rounds: int) -> tuple[Place, Any]:
        """Return where a site stands that has trained in each of ``rounds`` rounds."""
        from transformers import TrainerState

        trainer = self._trainer
        loader = trainer.get_train_dataloader()
        steps = rounds * self._steps(loader)
        updates = self._updates(loader)
        epoch, rest = divmod(steps, updates) if updates else (0, steps)
        size = trainer._train_batch_size
        batches = rest * trainer.args.gradient_accumulation_steps
        state = TrainerState(
            global_step=steps,
            epoch=epoch + rest / updates if updates else 0.0,
            train_batch_size=size,
        )
        return Place(steps, epoch, batches, size, self._base_seed()), state

    def train(self, round_: int, rounds: int, call: Callable[..., Any]) -> Any:
        """Train one round by ``call``, the trainer's own ``train``, and return its result."""
        optimizer = self._trainer.optimizer
        schedule = self._schedule or self._trainer.lr_scheduler
        self._round = _Round(
            round_,
            rounds,
            fresh_optimizer=optimizer is None or not optimizer.state,
            schedule=None if schedule is None else schedule.state_dict(),
            random=take(),
        )
        try:
            with self._arguments(rounds), tempfile.TemporaryDirectory() as folder:
                output = call(**self._resume(Path(folder)))
            self._note()
        finally:
            self._round = None
        self._restarted = False
        self._kept.save(round_, self._known_place())
        return output

    def settle(self) -> None:
        """Note that the update of the last round is recorded."""
        self._kept.settle()

    def _resume(self, folder: Path) -> dict[str, Any]:
        """Write the trainer's state where it looks for it; the bests of other rounds are not this round's."""
        if self._place is None:
            return {}
        state = self._state
        state.best_metric = state.best_model_checkpoint = None
        if hasattr(state, "best_global_step"):
            state.best_global_step = None
        state.save_to_json(str(folder / "trainer_state.json"))
        return {"resume_from_checkpoint": str(folder)}

    def _note(self) -> None:
        """Note where the round has stopped."""
        now, trainer = self._round, self._trainer
        assert now is not None
        length = _length(self._counter.loader)
        epoch, batches = now.epoch, now.batches
        if length is not None and batches >= length:
            epoch, batches = epoch + 1, 0
        self._place = Place(
            steps=trainer.state.global_step,
            epoch=epoch,
            batches=batches,
            batch_size=trainer._train_batch_size,
            seed=self._base_seed(),
            random=take(self._counter.loader),
            epoch_random=self._epoch_random if batches else None,
        )
        self._state = trainer.state
        if self._options.spans:
            self._schedule = trainer.lr_scheduler

    def _known_place(self) -> Place:
        assert self._place is not None
        return self._place

    # --- the trainer's budget -----------------------------------------------------------------------

    def _updates(self, loader: Any) -> int | None:
        """Return the optimiser steps of one pass over the data; None: nobody knows."""
        length = _length(loader)
        if length is None:
            return None
        accumulated: int = self._trainer.args.gradient_accumulation_steps
        return max(1, math.ceil(length / accumulated))

    def _steps(self, loader: Any) -> int:
        """Return the optimiser steps of one round: the trainer's own budget."""
        steps, epochs = self._budget
        return steps if steps > 0 else math.ceil(epochs * (self._updates(loader) or 1))

    def _base_seed(self) -> int:
        """Return the seed of the data's order, which one unbroken training would keep."""
        if self._seed is None:
            seed = self._trainer.args.data_seed
            self._seed = int(torch.random.initial_seed() if seed is None else seed)
        return self._seed

    @contextlib.contextmanager
    def _arguments(self, rounds: int) -> Iterator[None]:
        """Give the trainer the budget of the whole run; `begin` says where this round ends."""
        trainer, args, now = self._trainer, self._trainer.args, self._round
        assert now is not None
        names = ("max_steps", "num_train_epochs", "ignore_data_skip", _PERSISTENT)
        before = {name: getattr(args, name) for name in names}
        config, model_init = trainer.accelerator.dataloader_config, trainer.model_init
        self._budget = args.max_steps, args.num_train_epochs
        place = self._place
        if self._options.goes_on and getattr(args, _PERSISTENT):
            # The trainer makes a new loader in each round. New workers that outlive an epoch draw a random number
            # which those of one training do not, and an epoch that goes on would get another order.
            setattr(args, _PERSISTENT, False)
            if now.number == 1 or self._restarted:
                self._say(
                    f"{_PERSISTENT} is False in the rounds, so that each goes on in the data where the last one "
                    "stopped: the order is that of one training without it"
                )
        if args.max_steps > 0 or args.num_train_epochs % 1:
            steps = self._steps(None if args.max_steps > 0 else trainer.get_train_dataloader())
            args.max_steps = max(rounds * steps, (place.steps if place else 0) + steps)
        else:
            begun = place.epoch + (place.batches > 0) if place else 0
            args.num_train_epochs = max(rounds, math.ceil(begun / args.num_train_epochs) + 1)
            args.num_train_epochs *= self._budget[1]
        trainer.model_init = None  # it would put a new model in the place of the global one
        # What a script says of its own checkpoints is not meant for the rounds: they would all see the same rows.
        args.ignore_data_skip = not self._options.goes_on
        config.data_seed = self._base_seed()
        if not self._options.goes_on:
            config.data_seed += now.number - 1
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(args, name, value)
            trainer.model_init, config.data_seed = model_init, args.data_seed

    # --- what the trainer calls -----------------------------------------------------------------------

    def begin(self) -> None:
        """Begin the round's training; after an attempt that ran out of memory, begin it again.

        The trainer would go on with what the attempt has made of model, optimiser and schedule, which is no part
        of the round.
        """
        now, state = self._round, self._trainer.state
        if now is None:
            return
        self._counter.begin()
        steps = self._steps(self._counter.loader)
        state.compute_steps(self._trainer.args, steps)
        state.max_steps = state.global_step + steps
        if now.attempts:
            self._undo(now)
        elif self._place is not None:
            self._say_where(now)
        self._begins(first=not now.attempts)
        now.attempts += 1
        now.began = now.stepped = False

    def _say_where(self, now: _Round) -> None:
        if self._options.goes_on:
            where = f"goes on in the data at epoch {now.epoch}, batch {now.batches}"
        else:
            where = "begins the data anew"
        self._say(f"round {now.number}: step {self._trainer.state.global_step}; {where}")

    def _undo(self, now: _Round) -> None:
        put_back(now.random)
        trainer = self._trainer
        if not now.stepped:
            return
        if now.fresh_optimizer:
            trainer.optimizer.state.clear()
        elif not self._load_kept():
            self._say("the optimiser goes on from an attempt that ran out of memory")
        if now.schedule is not None and self._options.spans:
            trainer.lr_scheduler.load_state_dict(now.schedule)
            _set_rates(trainer.optimizer, trainer.lr_scheduler.get_last_lr())

    def begin_epoch(self) -> None:
        """Note what decides the order of an epoch's data; in one that is under way, put it back."""
        now = self._round
        if now is None:
            return
        if now.began:
            now.epoch, now.batches = now.epoch + 1, 0
        now_random = self._epoch_random if not now.began and now.batches else None
        if not now.began and now.batches:
            _set_epoch(self._counter.loader, now.epoch)
        now.began = True
        if now_random is not None:
            put_back(now_random, self._counter.loader)
        else:
            self._epoch_random = take(self._counter.loader)

    def end_batch(self, *, stepped: bool) -> None:
        """Count a batch."""
        if self._round is not None:
            self._round.batches += 1
            self._round.stepped = self._round.stepped or stepped

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Lay the schedule out over all rounds, and go on with it in later ones; or over one round."""
        call, now = self._calls["create_scheduler"], self._round
        if now is None:
            return call(num_training_steps, *args, **kwargs)
        steps = self._steps(self._counter.loader)
        if not self._options.spans:
            return call(steps, *args, **kwargs)
        if self._schedule is not None:
            self._trainer.lr_scheduler = self._schedule
            # The trainer drops a schedule of its own making when it trains again; after the run it must.
            self._trainer._created_lr_scheduler = self._created
            return self._schedule
        schedule = call(steps * now.rounds, *args, **kwargs)
        self._created = self._trainer._created_lr_scheduler
        return schedule

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        """Say where in the data the round begins."""
        found = self._calls["_init_training_state"](*args, **kwargs)
        now = self._round
        if now is None:
            return found
        now.epoch, now.batches = self._where()
        self._counter.skipped = now.batches
        return now.epoch, now.batches

    def _where(self) -> tuple[int, int]:
        place = self._place
        if place is None or not self._options.goes_on:
            return 0, 0
        epoch, batches, size = place.epoch, place.batches, self._trainer._train_batch_size
        if place.batch_size != size:  # an attempt with a smaller batch
            batches = batches * place.batch_size // size
        length = _length(self._counter.loader)
        while length and batches >= length:
            epoch, batches = epoch + 1, batches - length
        return epoch, batches

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Leave the weights alone: they are those of the global model."""
        if self._round is None:
            return self._calls["_load_from_checkpoint"](*args, **kwargs)
        return None

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        """Load what an earlier process kept; within a process, optimiser and schedule live on."""
        if self._round is None:
            self._calls["_load_optimizer_and_scheduler"](checkpoint)
        elif self._restarted and not self._load_kept() and self._options.spans:
            _wind(self._trainer.lr_scheduler, self._trainer.state.global_step)

    def _load_kept(self) -> bool:
        trainer = self._trainer
        schedule = trainer.lr_scheduler.state_dict()
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        found = self._kept.load_optimizer(self._calls["_load_optimizer_and_scheduler"])
        if found and not self._options.spans:
            trainer.lr_scheduler.load_state_dict(schedule)
            _set_rates(trainer.optimizer, rates)
        return found

    def _load_rng_state(self, checkpoint: Any) -> None:
        """Put the generators back to the end of the last round, now that the batches before it are left out."""
        now = self._round
        if now is None:
            self._calls["_load_rng_state"](checkpoint)
        elif self._place is not None and self._place.random is not None:
            put_back(self._place.random, None if now.batches else self._counter.loader)
            if not now.batches:
                self._epoch_random = take(self._counter.loader)


def _length(loader: Any) -> int | None:
    try:
        length: int = len(loader)
        return length
    except (TypeError, AttributeError):
        return None


def _set_epoch(loader: Any, epoch: int) -> None:
    """Have a sampler draw the order of an epoch: accelerate's loader for dispatched batches loses its number where
    batches are left out."""
    batches: Any = getattr(loader, "batch_sampler", None)
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    set_epoch = getattr(getattr(batches, "sampler", None), "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)


def _set_rates(optimizer: Any, rates: list[Any]) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _wind(schedule: Any, steps: int) -> None:
    """Bring a new schedule to where it is after ``steps`` steps; one that follows a metric begins anew."""
    if "metrics" in inspect.signature(schedule.step).parameters:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimiser has not stepped
        for _ in range(steps):
            schedule.step()


def _make_callback(rounds: Rounds) -> Any:
    from transformers import TrainerCallback

    class FedcoreCallback(TrainerCallback):
        """Tells how far the trainer is."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """Begin an attempt: with ``auto_find_batch_size`` there may be several in a round."""
            rounds.begin()

        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            """Note the order of the data."""
            rounds.begin_epoch()

        def on_substep_end(self, *_: Any, **__: Any) -> None:
            """Count."""
            rounds.end_batch(stepped=False)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """Count."""
            rounds.end_batch(stepped=True)

    return FedcoreCallback()
