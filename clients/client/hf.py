"""Federated training with ``transformers.Trainer``::

    import fedcore.client.hf as fl

    fl.patch(trainer)
    while fl.is_running():
        print(fl.system_info())
        trainer.evaluate()      # scores the global model: the server selects on it
        trainer.train()         # trains from the global model, sends the update

Each ``train()`` runs for the trainer's own budget (``max_steps`` or ``num_train_epochs``) and sees the data in
another order than the round before. The optimiser and its state live on from round to round, in memory; the
learning-rate schedule spans all rounds, or with ``lr_schedule="per_round"`` starts anew in each. Once the run is
over, the trainer works as if it had not been patched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, Literal

from fedcore.errors import ClosedError, ConfigError

from .casting import kept_dtypes
from .choice import choose
from .counting import Examples
from .hf_counting import StepCounter
from .intent import intend
from .prompts import computes_prompt
from .tokenizer import tokenizer_of
from .torch import (
    TorchSite,
    check_trainer,
    current_site,
    is_running,
    log,
    numbers,
    outcome,
    system_info,
)

__all__ = ["is_running", "log", "outcome", "patch", "system_info"]

_NOT_METRICS = ("_runtime", "_per_second", "_model_preparation_time")


def __dir__() -> list[str]:
    """List what a script may use, and not what this module imports."""
    return sorted(__all__)


def patch(
    trainer: Any,
    *,
    lr_schedule: Literal["all_rounds", "per_round"] = "all_rounds",
    examples: Examples = None,
    include: Iterable[str] | str = (),
    exclude: Iterable[str] | str = (),
    run: str | None = None,
) -> None:
    """Make a ``transformers.Trainer`` (or a subclass) take part in the run.

    Args:
        trainer: evaluates and trains as before; what it evaluates and trains *from* is the global model.
        lr_schedule: ``"all_rounds"``: the schedule is laid out over ``rounds`` times the trainer's steps;
            ``"per_round"``: it begins anew in each round.
        examples: how the update's weight is counted; see `fedcore.client.counting.ExampleCounter`.
        include, exclude: which of the tensors travel, by name; see `fedcore.client.choice`.
        run: name (or id) of the run that this script is for; a server that serves another one refuses it.

    Raises:
        ClosedError: this trainer or another one of this process is patched already.
        ConfigError: this is no ``transformers.Trainer``, the name of the schedule is unknown, it trains with
            DeepSpeed, the best model is to be loaded at the end of a round where it can't be, ``examples`` is no
            way of counting, or is needed and was not given.
    """
    check_trainer(trainer, __name__)
    if lr_schedule not in ("all_rounds", "per_round"):
        raise ConfigError(f"lr_schedule={lr_schedule!r}: expected 'all_rounds' or 'per_round'")
    if trainer.is_deepspeed_enabled:
        raise ConfigError(
            "DeepSpeed keeps copies of the weights that the global model would not reach; train with DDP or FSDP2"
        )
    if trainer.args.load_best_model_at_end and computes_prompt(trainer.model):
        raise ConfigError(
            "load_best_model_at_end=True can't put back a prompt that a network computes; set it to False"
        )
    counter = StepCounter(trainer, examples)
    intend(run)
    site = current_site()
    site.claim(trainer)
    choose(include, exclude)
    site.look_beside(trainer, trainer.model)
    site.tokenizer = tokenizer_of(trainer.processing_class)
    trainer._fedcore = _Patch(trainer, site, lr_schedule, counter)


class _Patch:
    """The wrappers around one trainer's methods."""

    def __init__(
        self, trainer: Any, site: TorchSite, lr_schedule: str, counter: StepCounter
    ) -> None:
        self._trainer = trainer
        self._site = site
        self._counter = counter
        self._attempts = 0
        counter.attach()
        trainer.add_callback(_make_callback(self))
        self._spans = lr_schedule == "all_rounds"
        self._training = self._trained = self._begins = False
        self._scored = 0
        self._scoring = False
        self._schedule: Any = None
        self._created = False
        self._rounds = 1
        self._train, self._evaluate = trainer.train, trainer.evaluate
        self._step, self._scheduler = trainer.training_step, trainer.create_scheduler
        self._loop = trainer.evaluation_loop
        trainer.train = self.train
        trainer.evaluate = self.evaluate
        trainer.evaluation_loop = self.evaluation_loop
        trainer.training_step = self.training_step
        trainer.create_scheduler = self.create_scheduler

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Score the global model; inside `train` and after it, evaluate the local one as ever."""
        # Of several sets of rows, `evaluate` calls itself for each: they are one score.
        if self._training or self._scoring or self._site.over:
            return self._evaluate(*args, **kwargs)
        with self._site.reporting():
            self._shard()
            task = self._site.receive(self._trainer.model)
            self._scoring, self._scored = True, 0
            try:
                metrics = self._evaluate(*args, **kwargs)
            finally:
                self._scoring = False
            self._unprepare()
            if task is not None:
                found = {
                    k: v
                    for k, v in metrics.items()
                    if k != "epoch" and not k.endswith(_NOT_METRICS)
                }
                self._site.score(numbers(found), self._scored)
        return metrics

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Count the examples that the global model is scored on, also those of a stream."""
        if self._scoring:
            self._site.before_scoring(self._trainer.model)
        options = self._trainer.args
        casts = (options.bf16_full_eval or options.fp16_full_eval) and not (
            self._training or self._site.over
        )
        try:
            with kept_dtypes(self._trainer.model) if casts else contextlib.nullcontext():
                output = self._loop(*args, **kwargs)
        finally:
            self._site.after_scoring()
        self._scored += output.num_samples or 0
        return output

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train from the global model and send the update; in an evaluation task, end that."""
        from transformers.trainer_utils import TrainOutput

        if self._site.over:
            self._trainer.accelerator.dataloader_config.data_seed = self._trainer.args.data_seed
            return self._train(*args, **kwargs)
        with self._site.reporting():
            if (args and args[0]) or kwargs.get("resume_from_checkpoint"):
                raise ConfigError(
                    "resume_from_checkpoint: train() trains from the global model and not from a checkpoint, so "
                    "leave it out; a site that is started again goes on with the round at hand"
                )
            self._shard()
            task = self._site.receive(self._trainer.model)
            if task is None:
                raise ClosedError(
                    "train() was called twice in one round; each pass of the loop trains once"
                )
            if not task.trains:
                self._site.end()
                return TrainOutput(self._trainer.state.global_step, 0.0, {})
            self._rounds = task.rounds
            self._reseed(task.round)
            self._training = self._trained = True
            self._attempts = 0
            try:
                output = self._train(*args, **kwargs)
            finally:
                self._training = False
                self._counter.end()
            if self._spans:
                self._schedule = self._trainer.lr_scheduler
            self._site.submit(
                self._trainer.model, self._counter.counted, numbers(output.metrics or {})
            )
        return output

    def begin_attempt(self) -> None:
        """Begin the round's training; after an attempt that ran out of memory, begin it again.

        The trainer would go on with what an attempt has made of the model, which is no part of the round.
        """
        if not self._training:
            return
        self._counter.begin()
        self._begins = True
        self._attempts += 1

    def _shard(self) -> None:
        """Shard the model by FSDP2 as `train` will, before its tensors are shown: sharding may change their dtype.

        `evaluate`, called before `train`, would try it without the optimiser, which accelerate refuses.
        """
        trainer = self._trainer
        if getattr(trainer.accelerator, "is_fsdp2", False) and not trainer.accelerator._models:
            trainer.create_optimizer()
            trainer.model, trainer.optimizer = trainer.accelerator.prepare(
                trainer.model, trainer.optimizer
            )
            trainer.model_wrapped = trainer.model

    def _unprepare(self) -> None:
        """Undo that `evaluate`, called before the first `train`, leaves the model marked as prepared.

        `train` would not wrap it in DistributedDataParallel then, and each rank would train for itself.
        """
        trainer = self._trainer
        if self._site.ranks > 1 and not self._trained and self._data_parallel:
            trainer.model._is_accelerate_prepared = False
            trainer.model_wrapped = trainer.model

    @property
    def _data_parallel(self) -> bool:
        return str(self._trainer.accelerator.distributed_type.value).startswith("MULTI_")

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Check that the ranks train together.

        Raises:
            ClosedError: the ranks' gradients are not averaged.
        """
        if self._site.ranks > 1 and model is self._trainer.model and self._data_parallel:
            raise ClosedError(
                "the trainer did not wrap the model in DistributedDataParallel, so each process would train for "
                "itself; leave the wrapping to the trainer, and evaluate through trainer.evaluate()"
            )
        if self._begins:
            self._begins = False
            self._site.check_optimizers(self._trainer.model, [self._trainer.optimizer])
            self._site.hold(self._trainer.model, warn=self._attempts < 2)
        return self._step(model, inputs, *args, **kwargs)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Lay the schedule out over all rounds, and go on with it in later ones."""
        if not self._spans or self._site.over:
            return self._scheduler(num_training_steps, *args, **kwargs)
        if self._schedule is not None:
            self._trainer.lr_scheduler = self._schedule
            # The trainer drops a schedule of its own making when it trains again; after the run it must.
            self._trainer._created_lr_scheduler = self._created
            return self._schedule
        schedule = self._scheduler(num_training_steps * self._rounds, *args, **kwargs)
        self._created = self._trainer._created_lr_scheduler
        return schedule

    def _reseed(self, round_: int) -> None:
        """Give the shuffling sampler another seed per round: it would repeat the first round's order."""
        args = self._trainer.args
        base = args.seed if args.data_seed is None else args.data_seed
        self._trainer.accelerator.dataloader_config.data_seed = base + round_ - 1


def _make_callback(patch_: _Patch) -> Any:
    from transformers import TrainerCallback

    class FedcoreCallback(TrainerCallback):
        """Tells when the trainer begins to train."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """Begin an attempt: with ``auto_find_batch_size`` there may be several in a round."""
            patch_.begin_attempt()

    return FedcoreCallback()
