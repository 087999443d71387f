"""What the Lightning and the Hugging Face adapters share: one torch model's part in each task."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from torch import nn

from fedcore import protocol
from fedcore.errors import ClosedError, ConfigError, LayoutError, RunEndedError
from fedcore.layout import compare_layouts
from fedcore.model_file import Reader
from fedcore.site.error_text import error_text
from fedcore.site.session import GlobalModel, Outcome, Session, changed_layout

from .by_method import model_parameters
from .choice import beside, forget_choice
from .counting import ExampleCounter
from .current import loop_goes_on
from .extras import hidden_parameters, refuse_beside
from .factors import Held
from .guard import Aside, Guard, Probe, shown
from .parameters import Joined, ModelParameters
from .personal import Kept
from .ranks import Gathered, RankedSession, forget_session, site_session
from .still import Still
from .tokenizer import tokenizer_fingerprint

__all__ = [
    "TorchSite",
    "check_trainer",
    "current_site",
    "error_text",
    "forget_site",
    "is_running",
    "log",
    "numbers",
    "outcome",
    "system_info",
]

logger = logging.getLogger("fedcore.client")


class TorchSite:
    """Moves one model through the tasks of this process's session.

    Parameters are looked up afresh for each task, since a trainer may have moved the model to another device.
    Where a site trains in several processes, each has a `TorchSite`; but for `reporting`, calls are collective.

    Attributes:
        owner: the patched trainer.
        tokenizer: what all sites must have alike; None: nothing is compared.
    """

    def __init__(self, session: Session | RankedSession) -> None:
        self._session = session
        self._ranks = session.ranks if isinstance(session, RankedSession) else None
        self._loaded: GlobalModel | None = None
        self._joined: Joined | None = None
        self._guard: Guard | None = None
        self._scored: ModelParameters | None = None
        self._probe: Probe | None = None
        self._aside: Aside | None = None
        self._asked = self._ended = False
        self._beside: Mapping[str, nn.Parameter] = {}
        self._still: Still | None = None
        self._held = Held()
        self._own_factors: Kept = {}
        self.owner: object = None
        self.tokenizer: Any = None

    @property
    def over(self) -> bool:
        """Whether the run is over, so that a trainer works on its own again."""
        return self._session.over

    @property
    def ranks(self) -> int:
        """How many processes train at this site."""
        return 1 if self._ranks is None else self._ranks.size

    def is_running(self) -> bool:
        """Wait for the next task; False when the run is over."""
        self._ended = False
        self._asked = loop_goes_on(self._session)
        return self._asked

    def receive(self, model: nn.Module) -> GlobalModel | None:
        """Load the current task's global model into ``model`` once; None if the task has ended already.

        Raises:
            ClosedError: `is_running` was not called before.
        """
        if self._ended:
            return None
        if not self._asked:
            raise ClosedError(
                "the trainer was called before fl.is_running(): validate, evaluate, fit and train belong inside "
                "`while fl.is_running():`"
            )
        parameters = self._parameters(model)
        read = self._reader(parameters)
        if self._session.bound:
            task = self._session.begin(parameters.specs, {}, read)
        else:
            prints, frozen = self._fingerprints(), parameters.frozen()
            task = self._session.begin(
                parameters.specs,
                parameters.files,
                read,
                prints,
                frozen,
                roles=parameters.roles,
                pairs=parameters.pairs(self._session.lora),
            )
        if task is not self._loaded:
            self._joined = self._joined or parameters.joined()
            parameters.begin(task, self.kept_folder())
            parameters.load(list(task.specs), task.tensors)
            self._restore(parameters)
            parameters.hold(self._held, self._session.fixed)
            self._loaded, self._guard = task, Guard(parameters)
        return task

    def _parameters(self, model: nn.Module) -> ModelParameters:
        """Return what travels of ``model``: what did when the site joined, also where it is frozen by now."""
        session = self._session
        run = session.lora, session.max_rank
        return model_parameters(model, self._joined, run, self._own_factors)

    def _restore(self, parameters: ModelParameters) -> None:
        """Have what is frozen be as it was before the first round, and say what training has changed."""
        if self._still is None:
            self._still = Still(parameters.frozen_tensors)
            return
        if text := self._still.settle(parameters.frozen_tensors()):
            logger.warning("%s: %s", self._session.system_info()["site"], text)
            self._session.problem(text)

    def look_beside(self, owner: object, model: nn.Module) -> None:
        """Note what ``owner`` may train beside the model, so that ``exclude`` may name it."""
        self._beside = hidden_parameters(owner, model)
        beside(self._beside)

    def check_optimizers(self, model: nn.Module, optimizers: Iterable[Any]) -> None:
        """Refuse what is trained beside the model and would never travel; to be called before the first step.

        Raises:
            LayoutError: the parameters by name.
        """
        refuse_beside(model, optimizers, self._beside)

    def hold(self, model: nn.Module, *, warn: bool = True) -> None:
        """Have ``model`` hold the current task's global model, whatever was put into it since.

        To be called right before the first step of training.
        """
        self._hold(self._parameters(model), "was about to be trained from" if warn else None)

    def before_scoring(self, model: nn.Module) -> None:
        """Have ``model`` hold the current task's global model; to be called right before each scored batch.

        Other weights are kept aside, for `after_scoring`. From the second batch on only one tensor is looked at.

        Raises:
            ClosedError: in one of several processes, the weights changed between two batches.
        """
        first = self._scored is None
        if self._scored is None:
            self._scored = self._parameters(model)
        elif self._probe is None or not self._probe.differs():
            return
        if self._ranks is not None and not first:
            raise ClosedError(
                "the weights changed between two batches of the global model's validation; where a site trains in "
                "several processes, a callback or hook may do so only before the first and after the last batch"
            )
        self._hold(self._scored, "was about to be scored", aside=True)
        self._probe = Probe(self._scored)

    def after_scoring(self) -> None:
        """Put back what lay in the model when the first batch came: a callback or hook may want it back."""
        if self._aside is not None and self._scored is not None:
            self._aside.put_back(self._scored)
        self._aside = self._scored = self._probe = None

    def _hold(self, parameters: ModelParameters, what: str | None, *, aside: bool = False) -> None:
        if self._loaded is None or self._guard is None:
            return
        changed = self._guard.changed(parameters)
        if self._ranks is not None:  # all load, or none does
            changed = next((found for found in self._ranks.gather(changed) if found), [])
        if not changed:
            return
        if aside and self._aside is None:
            self._aside = Aside(parameters)
        parameters.begin(self._loaded, self.kept_folder())
        parameters.load(list(self._loaded.specs), self._loaded.tensors)
        if what is not None:
            logger.warning(
                "something else than the global model %s: a callback or a hook had changed %s; the global model "
                "was put back", what, shown(changed),
            )  # fmt: skip

    def _fingerprints(self) -> dict[str, str]:
        return (
            {} if self.tokenizer is None else {"tokenizer": tokenizer_fingerprint(self.tokenizer)}
        )

    def _reader(self, parameters: ModelParameters) -> Reader:
        return Gathered(parameters.read) if parameters.sharded else parameters.read

    def score(
        self, metrics: Mapping[str, float], examples: int, rows: Mapping[str, int] | None = None
    ) -> None:
        """Report the global model's validation metrics; see `Session.score`."""
        self._session.score(metrics, examples, rows)

    def score_parts(
        self, metrics: Mapping[str, float], examples: int, rows: Mapping[str, int] | None = None
    ) -> None:
        """Report the weighted mean of what each rank measured on ``examples`` of its own part of the data."""
        if self._ranks is None:
            self._session.score(metrics, examples, rows)
            return
        parts = self._ranks.gather((dict(metrics), examples, dict(rows or {})))
        total = {
            name: sum(part[2].get(name, 0) for part in parts) for part in parts for name in part[2]
        }
        self._session.score(_weighted_mean(parts), sum(int(n) for _, n, _ in parts), total)

    def submit(
        self, model: nn.Module, counted: ExampleCounter, metrics: Mapping[str, float]
    ) -> None:
        """Publish the trained values; what was counted, summed over the ranks, is the update's weight.

        Raises:
            ClosedError: not one example was trained on, so the update has no weight.
            LayoutError: other tensors are trained now than travel.
        """
        examples = counted.total()
        if self._ranks is not None:
            parts = self._ranks.gather(examples)
            examples = max(parts) if counted.stated_for_site else sum(parts)
        if examples < 1:
            raise ClosedError(
                "this round trained on no example: check that the training data is not empty and that the "
                "trainer's budget (epochs or steps) is positive"
            )
        parameters = self._parameters(model)
        now, before = "the model now", "the model before"
        if self._loaded is not None and (
            changed := compare_layouts(parameters.model_specs, self._loaded.specs, now, before)
        ):
            raise LayoutError(changed_layout(changed))
        if self._loaded is not None:
            parameters.keep(self._loaded, self.kept_folder())
        self._ended = True
        self._loaded = self._guard = None
        weight = min(examples, protocol.MAX_WEIGHT)
        self._log_weight(weight, counted.how)
        self._session.submit(self._reader(parameters), weight, metrics)
        self._held.remove()

    def _log_weight(self, weight: int, how: str) -> None:
        round_ = self._session.system_info()["round"]
        self.say(f"round {round_}: the update's weight is {weight}: {how}")

    def say(self, text: str) -> None:
        """Log a line."""
        logger.info("%s: %s", self._session.system_info()["site"], text)

    def kept_folder(self) -> Path | None:
        """Return a folder of this run that outlives the process, or None: nothing is kept, as on several ranks."""
        return self._session.kept_folder() if isinstance(self._session, Session) else None

    def end(self) -> None:
        """End an evaluation task."""
        self._ended = True
        self._loaded = self._guard = None
        self._session.end_task()

    def claim(self, trainer: object) -> None:
        """Make ``trainer`` the one that takes part.

        Raises:
            ClosedError: it does already, or another trainer of this process does.
        """
        if self.owner is trainer:
            raise ClosedError(
                "this trainer is patched already: call fl.patch(trainer) once, before the loop"
            )
        if self.owner is not None:
            raise ClosedError(
                "another trainer of this process is patched already; one process is one site, so patch one trainer"
            )
        self.owner = trainer

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell the server about an error that ends the block, without local paths, and let it pass."""
        try:
            yield
        except RunEndedError:
            raise
        except Exception as error:
            self._session.problem(error_text(error))
            raise


_site: TorchSite | None = None


def current_site() -> TorchSite:
    """Return this process's part, made on first use.

    Raises:
        ClosedError: this is one of several training processes, which are not connected yet.
    """
    global _site  # noqa: PLW0603 - one session per process is the contract
    if _site is None:
        _site = TorchSite(site_session())
    return _site


def forget_site() -> None:
    """Leave the run and forget the trainer; for scripts that take part in several runs in turn."""
    global _site  # noqa: PLW0603
    _site = None
    forget_choice()
    forget_session()


_ADAPTERS: Final = {
    "lightning": "fedcore.client.lightning",
    "pytorch_lightning": "fedcore.client.lightning",
    "transformers": "fedcore.client.hf",
}


def check_trainer(given: object, adapter: str) -> str:
    """Return the package, such as ``pytorch_lightning``, whose ``Trainer`` this is.

    Args:
        given: what a script passed to ``patch``.
        adapter: the module whose ``patch`` that was.

    Raises:
        ConfigError: it is no trainer of this adapter; the text says what it is and which module to import.
    """
    packages = [
        root
        for cls in type(given).__mro__
        if cls.__name__ == "Trainer" and (root := cls.__module__.partition(".")[0]) in _ADAPTERS
    ]
    if packages and _ADAPTERS[packages[-1]] == adapter:
        return packages[-1]
    found = type(given)
    what = f"{found.__module__}.{found.__qualname__}"
    if isinstance(given, type):
        what, advice = f"{given.__module__}.{given.__qualname__}, a class", "pass an instance"
    elif packages:
        advice = f"for such a trainer, import {_ADAPTERS[packages[-1]]} as fl"
    elif isinstance(given, nn.Module):
        advice = "pass the Trainer, not the model that it trains"
    else:
        advice = "pass a Trainer, or import fedcore.client as fl for a loop of your own"
    raise ConfigError(f"{adapter}.patch() was given {what}: {advice}")


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values that are single numbers, as floats, up to the number that a message may hold."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, bool | int | float) or getattr(value, "numel", lambda: 0)() == 1:
            found[str(name)[:128]] = float(value)
    return dict(list(found.items())[: protocol.MAX_METRICS])


def _weighted_mean(
    parts: Sequence[tuple[Mapping[str, float], int, Mapping[str, int]]],
) -> dict[str, float]:
    """Return the mean of each metric over those that have it; one that all have alike is left as it is."""
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for metrics, *_ in parts for name in metrics):
        values = [(m[name], max(rows.get(name, n), 0)) for m, n, rows in parts if name in m]
        total = sum(n for _, n in values)
        alike = all(value == values[0][0] for value, _ in values)
        found[name] = values[0][0] if alike or not total else sum(v * n for v, n in values) / total
    return found


def is_running() -> bool:
    """Wait for the next task; False when the run is complete or was stopped: `outcome` tells.

    Raises:
        RunFailedError: the run was given up; a script that does not catch it ends with status 1.
        TransferTimeout, RefusedError, ClosedError: see `Session.is_running`.
    """
    return current_site().is_running()


def outcome() -> Outcome | None:
    """Return how the run ended; None while it goes on.

    ``"complete"``; ``"stopped"``: by an operator, before its last round; ``"failed"``: it was given up;
    ``"unknown"``: the server was gone before it said so.
    """
    return site_session().outcome


def log(metrics: Mapping[str, float], step: int | None = None) -> None:
    """Show training metrics at the server while a round is under way."""
    site_session().log(metrics, step)


def system_info() -> dict[str, str | int]:
    """Return ``run``, ``site``, ``server``, ``round``, ``rounds`` and ``version``."""
    return site_session().system_info()
