"""Federated training with ``transformers.Trainer``::

    import fedcore.client.hf as fl

    fl.patch(trainer)
    while fl.is_running():
        print(fl.system_info())
        trainer.evaluate()      # scores the global model: the server selects on it
        trainer.train()         # trains from the global model, sends the update

Each ``train()`` runs for the trainer's own budget (``max_steps`` or ``num_train_epochs``) and goes on where the
last one stopped: in the data, with steps and epochs, optimiser and learning-rate schedule. With
``data="per_round"`` it begins the data anew, with ``lr_schedule="per_round"`` the schedule. Once the run is over,
the trainer works as if it had not been patched.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any, Literal

from fedcore.errors import ClosedError, ConfigError

from .casting import kept_dtypes
from .choice import choose
from .counting import Examples
from .current import intend
from .hf_counting import StepCounter
from .hf_rounds import Options, Rounds
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
    data: Literal["all_rounds", "per_round"] = "all_rounds",
    examples: Examples = None,
    keep_state: bool | None = None,
    include: Iterable[str] | str = (),
    exclude: Iterable[str] | str = (),
    run: str | None = None,
) -> None:
    """Make a ``transformers.Trainer`` (or a subclass) take part in the run.

    Args:
        trainer: evaluates and trains as before; what it evaluates and trains *from* is the global model.
        lr_schedule: ``"all_rounds"``: the schedule is laid out over ``rounds`` times the trainer's steps;
            ``"per_round"``: it begins anew in each round.
        data: ``"all_rounds"``: a round goes on in the data where the last one stopped; ``"per_round"``: it begins
            the data anew, shuffled by another seed where they are shuffled.
        examples: how the update's weight is counted; see `fedcore.client.counting.ExampleCounter`.
        keep_state: whether optimiser and schedule are kept in the site's work folder, so that a process that is
            started again goes on with them; None: where the optimiser's state takes at most 1 GiB.
        include, exclude: which of the tensors travel, by name; see `fedcore.client.choice`.
        run: name (or id) of the run that this script is for; a server that serves another one refuses it.

    Raises:
        ClosedError: this trainer or another one of this process is patched already.
        ConfigError: this is no ``transformers.Trainer``, ``lr_schedule`` or ``data`` is unknown, it trains with
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
    if data not in ("all_rounds", "per_round"):
        raise ConfigError(f"data={data!r}: expected 'all_rounds' or 'per_round'")
    counter = StepCounter(trainer, examples)
    intend(run)
    options = Options(lr_schedule == "all_rounds", data == "all_rounds", keep_state)
    site = current_site()
    site.claim(trainer)
    choose(include, exclude)
    site.look_beside(trainer, trainer.model)
    site.tokenizer = tokenizer_of(trainer.processing_class)
    trainer._fedcore = _Patch(trainer, site, counter, options)


class _Patch:
    """The wrappers around one trainer's methods."""

    def __init__(
        self, trainer: Any, site: TorchSite, counter: StepCounter, options: Options
    ) -> None:
        self._trainer = trainer
        self._site = site
        self._counter = counter
        counter.attach()
        self._rounds = Rounds(trainer, counter, options, self.begin_attempt, site.say)
        self._rounds.attach()
        self._first_attempt = True
        self._training = self._trained = self._begins = False
        self._scored = 0
        self._measured: dict[str, int] = {}
        self._scoring = False
        self._train, self._evaluate = trainer.train, trainer.evaluate
        self._step, self._loop = trainer.training_step, trainer.evaluation_loop
        trainer.train = self.train
        trainer.evaluate = self.evaluate
        trainer.evaluation_loop = self.evaluation_loop
        trainer.training_step = self.training_step

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Score the global model; inside `train` and after it, evaluate the local one as ever."""
        # Of several sets of rows, `evaluate` calls itself for each: they are one score.
        if self._training or self._scoring or self._site.over:
            return self._evaluate(*args, **kwargs)
        with self._site.reporting():
            self._shard()
            task = self._site.receive(self._trainer.model)
            if task is not None and task.trains:
                self._rounds.recall(task.round, self._site.kept_folder())
            self._scoring, self._scored = True, 0
            self._measured.clear()
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
                self._site.score(numbers(found), self._scored, self._measured)
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
        rows = output.num_samples or 0
        self._scored += rows
        self._measured.update(dict.fromkeys(map(str, output.metrics or {}), rows))
        return output

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train from the global model and send the update; in an evaluation task, end that."""
        from transformers.trainer_utils import TrainOutput

        if self._site.over:
            return self._train(*args, **kwargs)
        with self._site.reporting():
            if (args and args[0]) or kwargs.get("resume_from_checkpoint"):
                raise ConfigError(
                    "resume_from_checkpoint: train() trains from the global model and not from a checkpoint, so "
                    "leave it out; a site that is started again goes on with the round under way"
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
            self._rounds.recall(task.round, self._site.kept_folder())
            others = dict(zip(("trial", "ignore_keys_for_eval"), args[1:], strict=False))
            others |= {k: v for k, v in kwargs.items() if k != "resume_from_checkpoint"}
            self._training = self._trained = True
            try:
                output = self._rounds.train(
                    task.round, task.rounds, functools.partial(self._train, **others)
                )
            finally:
                self._training = False
                self._counter.end()
            self._site.submit(
                self._trainer.model, self._counter.counted, numbers(output.metrics or {})
            )
            self._rounds.settle()
        return output

    def begin_attempt(self, *, first: bool) -> None:
        """Note that the next training step begins the round, or begins it again after it ran out of memory.

        The trainer would go on with what an attempt has made of the model, which is no part of the round.
        """
        self._begins, self._first_attempt = True, first

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
            self._site.hold(self._trainer.model, warn=self._first_attempt)
        return self._step(model, inputs, *args, **kwargs)
