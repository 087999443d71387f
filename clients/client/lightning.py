"""Federated training with PyTorch Lightning (the ``lightning`` or the ``pytorch_lightning`` package)::

    import fedcore.client.lightning as fl

    fl.patch(trainer)
    while fl.is_running():
        print(fl.system_info())
        trainer.validate(model, data)      # scores the global model: the server selects on it
        trainer.fit(model, data)           # trains from the global model, sends the update

Each ``fit`` runs for the trainer's own budget (``max_epochs``, ``max_steps``, ``max_time``), counted from where
the round before stopped, in the data too. Lightning makes new optimisers for each ``fit``; their state and that of
the learning-rate schedules is carried over, also to a process that is started again, unless
``patch(trainer, keep_optimizer=False)`` asks for fresh ones. While they are made, ``trainer.max_epochs``,
``trainer.max_steps`` and ``trainer.estimated_stepping_batches`` are those of the whole run, so that a schedule
laid out with them spans all rounds; for fresh ones, those of one round. Sanity checks and validation inside
``fit`` never score the global model. Once the run is over, the trainer works as if it had not been patched.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Literal

import torch
import torch.distributed as dist

from fedcore.errors import ClosedError, ConfigError

from .choice import choose
from .counting import ExampleCounter, Examples
from .current import intend
from .lightning_counting import count_batch, count_scored
from .lightning_data import DataPlace
from .lightning_kept import KeptState
from .lightning_state import Carried, callbacks_of
from .randomness import put_back, take
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

_CONVERTING: Final = ("HalfPrecision", "DoublePrecision")
"""Lightning's precision plugins that change the dtype of a module's own weights."""


logger = logging.getLogger("fedcore.client")


def __dir__() -> list[str]:
    """List what a script may use, and not what this module imports."""
    return sorted(__all__)


def patch(
    trainer: Any,
    *,
    keep_optimizer: bool = True,
    data: Literal["all_rounds", "per_round"] = "all_rounds",
    examples: Examples = None,
    keep_state: bool | None = None,
    tokenizer: Any = None,
    include: Iterable[str] | str = (),
    exclude: Iterable[str] | str = (),
    run: str | None = None,
) -> None:
    """Make a Lightning ``Trainer`` take part in the run.

    A trainer of several processes starts them here: each runs the script from its beginning.

    Args:
        trainer: validates and fits as before; what it validates and fits *from* is the global model.
        keep_optimizer: carry the state of optimisers and schedules over from round to round, and lay schedules
            out over all rounds.
        data: ``"all_rounds"``: a round that begins within an epoch goes on with the batch after the last one;
            ``"per_round"``: it begins its data anew.
        examples: how the update's weight is counted; see `fedcore.client.counting.ExampleCounter`.
        keep_state: whether optimisers and schedules are kept in the site's work folder, so that a process that is
            started again goes on with them; None: where their state takes at most 1 GiB.
        tokenizer: the server refuses sites whose tokenizers differ.
        include, exclude: which of the tensors travel, by name; see `fedcore.client.choice`.
        run: name (or id) of the run that this script is for; a server that serves another one refuses it.

    Raises:
        ClosedError: this trainer or another one of this process is patched already.
        ConfigError: this is no Lightning trainer, or its strategy ends its processes after each call or keeps
            copies of the weights; or ``examples`` or ``data`` is unknown.
    """
    package = check_trainer(trainer, __name__)
    if data not in ("all_rounds", "per_round"):
        raise ConfigError(f"data={data!r}: expected 'all_rounds' or 'per_round'")
    _refuse_strategy(trainer.strategy)
    if trainer.world_size > 1:
        _start_ranks(trainer)
    counted = ExampleCounter(examples)
    intend(run)
    site = current_site()
    site.claim(trainer)
    choose(include, exclude)
    site.tokenizer = tokenizer
    place = DataPlace(trainer, data == "all_rounds", site.say)
    kept = KeptState(keep_state)
    trainer._fedcore = _Patch(
        trainer, site, counted, keep_optimizer=keep_optimizer, place=place, kept=kept
    )
    name = "lightning.pytorch" if package == "lightning" else "pytorch_lightning"
    base = importlib.import_module(name).Callback
    trainer.callbacks.insert(0, _make_callback(base, trainer._fedcore))


def _refuse_strategy(strategy: Any) -> None:
    """FSDP1 and DeepSpeed keep copies of the weights that the global model would not reach."""
    names = {cls.__name__ for cls in type(strategy).__mro__}
    for name in sorted(names & {"FSDPStrategy", "DeepSpeedStrategy"}):
        raise ConfigError(
            f"the trainer's strategy is {name}, which keeps copies of the weights that the global model would not "
            "reach; use strategy='ddp', or FSDP2 by ModelParallelStrategy"
        )


def _start_ranks(trainer: Any) -> None:
    """Start the trainer's other processes now, and connect them; `fit` would do it after the loop has begun."""
    launcher = trainer.strategy.launcher
    if launcher is None:  # another launcher, such as torchrun, has started them
        _connect(trainer.strategy)
        return
    if not hasattr(launcher, "procs") or hasattr(launcher, "_start_method"):
        raise ConfigError(
            f"the trainer's strategy starts new processes in each call of fit ({type(launcher).__name__}), and so "
            "keeps nothing from round to round; use strategy='ddp', or start the script with torchrun"
        )
    launcher.launch(_connect, trainer.strategy, trainer=trainer)


def _connect(strategy: Any) -> None:
    """Connect the processes.

    `ModelParallelStrategy` would ask for the model, which comes with `fit` only; here it gets the same connection.
    """
    if not any(cls.__name__ == "ModelParallelStrategy" for cls in type(strategy).__mro__):
        strategy.setup_environment()
    elif not dist.is_initialized():
        cluster, device = strategy.cluster_environment, strategy.root_device
        os.environ["MASTER_ADDR"] = cluster.main_address
        os.environ["MASTER_PORT"] = str(cluster.main_port)
        dist.init_process_group(
            strategy.process_group_backend or dist.get_default_backend_for_device(device),
            rank=cluster.global_rank(),
            world_size=cluster.world_size(),
            timeout=strategy._timeout,
            device_id=device if device.type != "cpu" else None,
        )


class _Patch:
    """The wrappers around one trainer's methods, and what is carried from round to round."""

    def __init__(
        self,
        trainer: Any,
        site: TorchSite,
        counted: ExampleCounter,
        *,
        keep_optimizer: bool,
        place: DataPlace,
        kept: KeptState,
    ) -> None:
        self._trainer = trainer
        self._site = site
        self._place, self._kept = place, kept
        self._recalled = False
        self._keep = keep_optimizer
        self._epochs, self._steps = trainer.max_epochs, trainer.max_steps
        self._accumulated = trainer.accumulate_grad_batches
        self._carried = Carried(trainer)
        self._resumed: tuple[int, int] | None = None
        self._round = 0
        self.scoring = False
        self.counted, self.scored = counted, ExampleCounter()
        self.scored_by_loader: dict[int, ExampleCounter] = {}
        self._stated = counted.stated
        self._trained = False
        self._fit, self._validate = trainer.fit, trainer.validate
        self._validation_step = trainer.strategy.validation_step
        self._select = trainer._checkpoint_connector._select_ckpt_path
        trainer.fit = self.fit
        trainer.validate = self.validate
        trainer.strategy.validation_step = self.validation_step
        trainer._checkpoint_connector._select_ckpt_path = self.select_checkpoint

    def validate(self, model: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Score the global model; after `fit`, validate the local one as ever."""
        if self._site.over:
            return self._validate(model, *args, **kwargs)
        if len(args) > 1 or kwargs.get("ckpt_path") is not None:
            raise ConfigError(
                "validate scores the global model, and ckpt_path would put another in its place: leave it out"
            )
        with self._site.reporting():
            task = self._site.receive(self._module(model))
            self.scoring = True
            self.scored.clear()
            self.scored_by_loader.clear()
            try:
                # The order in which training draws its data is that of one training without scores.
                random = take()
                with _averages_hidden(self._trainer.callbacks):
                    results = self._validate(model, *args, **kwargs)
                put_back(random)
            finally:
                self.scoring = False
                self._site.after_scoring()
            if task is not None:
                metrics = numbers(self._trainer.callback_metrics)
                self._site.score_parts(metrics, self.scored.total(), self._rows(metrics))
        return results

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Score the global model, whatever callbacks and hooks have put in its place."""
        if self.scoring:
            self._site.before_scoring(self._trainer.lightning_module)
        return self._validation_step(*args, **kwargs)

    def count_scored(self, batch: Any, index: int, number: int) -> None:
        """Count a batch on which the global model was scored, of the loader of that number."""
        loop = self._trainer.validate_loop
        loader = loop._combined_loader
        source = loader.flattened[number] if loop._is_sequential else loader.iterables
        for counter in (self.scored, self.scored_by_loader.setdefault(number, ExampleCounter())):
            count_scored(counter, self.counted, source, batch, index)

    def _rows(self, metrics: Iterable[str]) -> dict[str, int]:
        """Return the number of examples of each metric that Lightning has named after one of several loaders."""
        found = {}
        for name in metrics:
            _, mark, number = name.rpartition("/dataloader_idx_")
            if mark and number.isdecimal() and int(number) in self.scored_by_loader:
                found[name] = self.scored_by_loader[int(number)].total()
        return found

    def count(self, output: Any, batch: Any, index: int) -> None:
        """Count a batch that was trained on.

        Not so one that ``training_step`` left out by returning nothing, nor those of a pass without training.
        """
        loop = self._trainer.fit_loop
        automatic = self._trainer.lightning_module.automatic_optimization
        if loop._skip_backward or (automatic and not output):
            return
        source = loop._combined_loader.iterables
        count_batch(self.counted, source, batch, index, whole=self._stated, weighs=True)

    def end_scoring(self) -> None:
        """Put back what callbacks had put in the global model's place; they may want it back now."""
        if self.scoring:
            self._site.after_scoring()

    def select_checkpoint(self, fn: Any, ckpt_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the checkpoint that a call takes its state from: one at most, in the first `fit` of a process.

        Lightning looks for one by itself where a cluster started the job again, or where an exception ended `fit`.
        """
        if self._site.over or fn not in ("fit", "validate"):
            return self._select(fn, ckpt_path, *args, **kwargs)
        if fn == "validate" or self._trained:
            if ckpt_path is not None:
                logger.warning(
                    "ckpt_path is left out of account: a site takes optimisers, schedules and counters from a "
                    "checkpoint in the first fit of its process only, and in later rounds goes on with its own"
                )
            return None
        found = self._select(fn, ckpt_path, *args, **kwargs)
        if found is not None and ckpt_path is None and (self._round == 1 or self._recalled):
            why = "the run is in its first round"
            if self._recalled:
                why = "the state that was kept at the end of the last round is used"
            logger.info("%s is left out of account: %s", found, why)
            return None
        return found

    def fit(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        """Train from the global model and send the update; in an evaluation task, end that."""
        if self._site.over:
            self._place.release()
            self._carried.set_free()
            self._fit(model, *args, **kwargs)
            return
        with self._site.reporting():
            module = self._module(model)
            task = self._site.receive(module)
            if task is None:
                raise ClosedError(
                    "fit() was called twice in one round; each pass of the loop fits once"
                )
            if not task.trains:
                self._site.end()
                return
            self._set_budget(task.rounds if self._keep else 1)
            self._trainer.should_stop = False
            self._forget_early_stops()
            self._reset_timers()
            if any(callbacks_of(self._trainer.callbacks, "GradientAccumulationScheduler")):
                self._trainer.accumulate_grad_batches = self._accumulated
            self.counted.clear()
            self._resumed, self._round = None, task.round
            if not self._trained:
                self._recall()
            self._place.begin()
            self._fit(module, *args, **kwargs)
            self._trained = True
            if getattr(self._trainer, "interrupted", False):
                raise KeyboardInterrupt
            self._site.submit(module, self.counted, numbers(self._trainer.callback_metrics))
            self._kept.settle(self._site.kept_folder())

    def _forget_early_stops(self) -> None:
        """Have early stopping compare within this round: the global model it starts from is another one."""
        for callback in self._trainer.early_stopping_callbacks:
            callback.wait_count = callback.stopped_epoch = 0
            callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)

    def _reset_timers(self) -> None:
        """Have a limit of time (`max_time`) count within this round; a timer would go on with its first `fit`."""
        for timer in callbacks_of(self._trainer.callbacks, "Timer"):
            for times in (timer._start_time, timer._end_time):
                times.update(dict.fromkeys(times))
            timer._offset = 0

    def _module(self, model: Any) -> Any:
        module = model if model is not None else self._trainer.lightning_module
        if module is None:
            raise ConfigError(
                "pass the model: trainer.validate(model, data), trainer.fit(model, data)"
            )
        precision = self._trainer.precision_plugin
        if type(precision).__name__ in _CONVERTING:  # as fit will, before the tensors are shown
            precision.convert_module(module)
        self._site.look_beside(module, module)
        return module

    def _set_budget(self, rounds: int, epochs: int = 0, steps: int = 0) -> None:
        """Let the loops run for so many times the trainer's own budget, from ``epochs`` and ``steps`` on."""
        loop = self._trainer.fit_loop
        if self._epochs is not None and self._epochs >= 0:
            loop.max_epochs = epochs + rounds * self._epochs
        if self._steps >= 0:
            loop.epoch_loop.max_steps = steps + rounds * self._steps

    def limit(self) -> None:
        """End the training with this round, now that the optimisers and schedules are made."""
        if self._site.over:
            return
        if self._resumed is not None:
            # A timer's state came with the checkpoint, and may have stopped the training by now.
            self._reset_timers()
            self._trainer.should_stop = False
        begun = self._trainer.current_epoch + self._place.behind
        epoch, step = self._resumed or (begun, self._trainer.global_step)
        self._set_budget(1, epoch, step)
        self._carried.begin_averages(epoch)

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Count this round's budget from where the checkpoint given to `fit` stopped.

        The weights are the global model's, for callbacks that keep a copy too. An epoch that was cut short begins
        anew where the budget counts epochs: what was trained of it is lost with the weights.
        """
        if not self._site.over and self._trainer.training:
            module = self._trainer.lightning_module
            self._recalled = False
            self._place.recall({"batches": 0, "epoch_random": None})
            self._site.hold(module, warn=False)
            checkpoint["state_dict"] = module.state_dict()
            checkpoint.pop("current_model_state", None)
            for name, state in checkpoint.get("callbacks", {}).items():
                if name.startswith("StochasticWeightAveraging") and state.get("scheduler_state"):
                    checkpoint[
                        "lr_schedulers"
                    ] = []  # the average's, which begins anew in the round
            if self._steps < 0:
                _begin_epoch_anew(checkpoint)
            loops = checkpoint.get("loops", {}).get("fit_loop", {})
            epochs = loops.get("epoch_progress", {}).get("current", {}).get("processed")
            epoch = int(checkpoint["epoch"] if epochs is None else epochs)
            self._resumed = epoch, int(checkpoint["global_step"])
            self.limit()

    def restore(self) -> None:
        """Put the state of the last round's optimisers and schedules into the new ones.

        What `fit` took from a checkpoint stands, but for the weights: the round starts from the global model.
        """
        if self._site.over:
            return
        module = self._trainer.lightning_module
        self._site.check_optimizers(module, self._trainer.optimizers)
        self._site.hold(module, warn=self._resumed is None)
        if self._resumed is not None:
            self._forget_early_stops()
        self._carried.restore(load=self._keep and self._resumed is None)

    def _recall(self) -> None:
        """Go on where an earlier process of this site stopped."""
        state = self._kept.find(self._site.kept_folder(), self._round)
        if state is None:
            return
        self._recalled = True
        loop = self._trainer.fit_loop
        loop.load_state_dict(state["loops"])
        _rest(loop)
        self._place.recall(state["place"])
        if state["carried"] is not None:
            self._carried.recall(state["carried"])
        put_back(state["random"])
        how = "go on" if state["carried"] else "begin anew"
        epoch = loop.epoch_progress.current.completed
        self._site.say(f"optimisers and schedules {how}; steps and epochs go on with epoch {epoch}")

    def keep(self) -> None:
        """Keep the state of this round's optimisers and schedules, and the place in the data."""
        if self._site.over:
            return
        self._place.end()
        self._carried.keep()
        state = {"place": self._place.kept(), "random": take(), "carried": None}
        state["loops"] = self._trainer.fit_loop.state_dict()
        if self._keep and self._kept.keeps(self._trainer.optimizers):
            state["carried"] = self._carried.kept()
        self._kept.save(self._site.kept_folder(), self._round, state)
        self._carried.end_averages()
        self._carried.stay_unfrozen()

    def begin_epoch(self) -> None:
        """Note what callbacks are about to change."""
        if not self._site.over:
            self._carried.begin_epoch()


@contextlib.contextmanager
def _averages_hidden(callbacks: Iterable[Any]) -> Iterator[None]:
    """Keep Lightning's callbacks for weight averages from swapping the average of the last round in."""
    averaging = list(callbacks_of(callbacks, "WeightAveraging"))
    averages = [callback._average_model for callback in averaging]
    for callback in averaging:
        callback._average_model = None
    try:
        yield
    finally:
        for callback, average in zip(averaging, averages, strict=True):
            callback._average_model = average


def _rest(loop: Any) -> None:
    """Have loops that have loaded their counters begin a ``fit`` as those do that have counted themselves."""
    loop._restarting = loop._loaded_from_state_dict = loop._resuming_from_checkpoint = False
    for inner in vars(loop).values():
        if hasattr(inner, "_loaded_from_state_dict"):
            _rest(inner)


def _begin_epoch_anew(checkpoint: Mapping[str, Any]) -> None:
    """Set the loops of a checkpoint that was written within an epoch to the beginning of that epoch."""
    loops = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs, batches = loops.get("epoch_progress"), loops.get("epoch_loop.batch_progress")
    if epochs is None or batches is None:
        return
    done = epochs["current"]["processed"]
    if epochs["current"]["started"] == done:  # at the end of an epoch
        return
    for counts in epochs.values():
        counts.update(dict.fromkeys(counts, counts["processed"]))
    batches["current"].update(dict.fromkeys(batches["current"], 0))
    batches["is_last_batch"] = False


def _make_callback(base: Any, patch_: _Patch) -> Any:
    """Return a callback of the trainer's own package that counts examples and carries states.

    It goes before the others: they see the limits of the round, and get back what they had put into the model.
    """

    class FedcoreCallback(base):  # type: ignore[misc]
        """Counts the examples of a round, ends it, and carries the optimisers' state."""

        def on_validation_batch_end(self, *args: Any, **_: Any) -> None:
            """Count, while the global model is scored."""
            if patch_.scoring:
                patch_.count_scored(args[3], args[4], args[5] if len(args) > 5 else 0)

        def on_validation_epoch_end(self, *_: Any) -> None:
            """End scoring."""
            patch_.end_scoring()

        def on_train_batch_end(self, *args: Any, **_: Any) -> None:
            """Count."""
            patch_.count(args[2], args[3], args[4])

        def on_fit_start(self, *_: Any) -> None:
            """Limit: after the optimisers are made, and before the loop looks whether it is done."""
            patch_.limit()

        def on_load_checkpoint(self, *args: Any) -> None:
            """Resume."""
            patch_.resume(args[2])

        def on_train_start(self, *_: Any) -> None:
            """Restore."""
            patch_.restore()

        def on_train_epoch_start(self, *_: Any) -> None:
            """Note."""
            patch_.begin_epoch()

        def on_train_end(self, *_: Any) -> None:
            """Keep."""
            patch_.keep()

    return FedcoreCallback()
