"""What a Lightning trainer carries from round to round: optimisers and learning-rate schedules, with their groups.

Lightning makes new ones in each ``fit``. Two kinds of callbacks change them during training: `BaseFinetuning` adds
groups of parameters, and `StochasticWeightAveraging` puts its own schedule in the place of the script's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["Carried", "callbacks_of"]

logger = logging.getLogger("fedcore.client")


def callbacks_of(callbacks: Iterable[Any], name: str) -> Iterator[Any]:
    """Yield the callbacks of Lightning's class of that name, or of one derived from it."""
    for callback in callbacks:
        if any(cls.__name__ == name for cls in type(callback).__mro__):
            yield callback


class Carried:
    """The state of one trainer's optimisers and schedules at the end of the last round."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._optimizers: list[tuple[Any, Any]] | None = None
        self._schedulers: list[Any] = []
        self._own: list[Any] = []
        self._options: list[list[dict[str, Any]]] = []
        self._starts: dict[Any, int | float] = {}

    # --- optimisers and schedules --------------------------------------------------------------------

    def restore(self, *, load: bool) -> None:
        """Put the last round's state into what this ``fit`` has made; with ``load`` False, only look at that."""
        if load and self._optimizers is not None:
            self._load(self._optimizers)
        self._own = list(self._trainer.lr_scheduler_configs)
        self._options = []

    def _load(self, kept: list[tuple[Any, Any]]) -> None:
        optimizers, configs = self._trainer.optimizers, self._trainer.lr_scheduler_configs
        if len(kept) != len(optimizers) or len(self._schedulers) != len(configs):
            logger.warning(
                "configure_optimizers returned %d optimisers and %d schedules, and %d and %d in the last round: "
                "they begin anew", len(optimizers), len(configs), len(kept), len(self._schedulers),
            )  # fmt: skip
            return
        for optimizer, (state, names) in zip(optimizers, kept, strict=True):
            if self._names(optimizer) != names and not self._regroup(optimizer, state, names):
                logger.warning(
                    "an optimiser trains other parameters than in the last round: it begins anew, as do schedules"
                )
                return
            optimizer.load_state_dict(state)
        for config, state in zip(configs, self._schedulers, strict=True):
            config.scheduler.load_state_dict(state)

    def keep(self) -> None:
        """Keep the state of this round's optimisers and schedules."""
        configs = self._trainer.lr_scheduler_configs
        averaging = any(a._initialized for a in self._averaging())
        self._optimizers = []
        for optimizer in self._trainer.optimizers:
            state = optimizer.state_dict()
            if (
                averaging and self._options
            ):  # the rates are the average's; the next round begins with the script's
                groups = zip(state["param_groups"], self._options.pop(0), strict=False)
                state["param_groups"] = [
                    {**options, "params": g["params"]} for g, options in groups
                ]
            self._optimizers.append((state, self._names(optimizer)))
        self._schedulers = [c.scheduler.state_dict() for c in (self._own if averaging else configs)]

    def kept(self) -> dict[str, Any]:
        """Return what `keep` kept, for another process."""
        return {"optimizers": self._optimizers, "schedulers": self._schedulers}

    def recall(self, kept: dict[str, Any]) -> None:
        """Take what another process kept in place of this one's."""
        self._optimizers, self._schedulers = kept["optimizers"], kept["schedulers"]

    def _names(self, optimizer: Any) -> list[list[str]]:
        names = {id(p): name for name, p in self._trainer.lightning_module.named_parameters()}
        return [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]

    def _regroup(self, optimizer: Any, state: Any, names: list[list[str]]) -> bool:
        """Give an optimiser the last round's groups of parameters; False if they lack one of its own."""
        mine = {name for group in self._names(optimizer) for name in group}
        theirs = {name for group in names for name in group}
        parameters = dict(self._trainer.lightning_module.named_parameters())
        if not mine <= theirs <= parameters.keys():
            return False
        for name in theirs - mine:  # a process that was started again has frozen them
            parameters[name].requires_grad_(True)
        optimizer.param_groups[:] = [
            {**options, "params": [parameters[name] for name in group]}
            for options, group in zip(state["param_groups"], names, strict=True)
        ]
        return True

    # --- callbacks -----------------------------------------------------------------------------------

    def _averaging(self) -> Iterator[Any]:
        return callbacks_of(self._trainer.callbacks, "StochasticWeightAveraging")

    def begin_averages(self, epoch: int) -> None:
        """Have stochastic weight averaging begin within this round, whose first epoch is ``epoch``."""
        epochs = self._trainer.fit_loop.max_epochs
        for average in self._averaging():
            start = self._starts.setdefault(average, average._swa_epoch_start)
            if isinstance(start, float):
                if epochs < 0:
                    continue  # which Lightning refuses
                start = int((epochs - epoch) * start)
            average._swa_epoch_start = epoch + max(start, 1)
            average._initialized = False
            average.n_averaged = average._swa_scheduler = average._scheduler_state = None
            average._init_n_averaged, average._latest_update_epoch = 0, -1

    def begin_epoch(self) -> None:
        """Note the rates before an average's schedule takes over."""
        averages = list(self._averaging())
        if averages and not any(average._initialized for average in averages):
            self._options = [
                [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
                for optimizer in self._trainer.optimizers
            ]

    def end_averages(self) -> None:
        """Have an average that has not begun leave the trained weights alone."""
        for average in self._averaging():
            if not average._initialized:
                average._average_model = None

    def stay_unfrozen(self) -> None:
        """Have what is trained by now be trained in later rounds: each ``fit`` would freeze it again."""
        for callback in callbacks_of(self._trainer.callbacks, "BaseFinetuning"):
            callback.freeze_before_training = _leave

    def set_free(self) -> None:
        """Have the callbacks work as they did before."""
        for callback in callbacks_of(self._trainer.callbacks, "BaseFinetuning"):
            vars(callback).pop("freeze_before_training", None)
        for average, start in self._starts.items():
            average._swa_epoch_start = start


def _leave(_: Any) -> None:
    """Freeze nothing."""
