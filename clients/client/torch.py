"""What the Lightning and the Hugging Face adapters share: one torch model's part in each task."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import nn

from fedcore import protocol
from fedcore.errors import ClosedError, ConfigError

from .choice import forget_choice
from .error_text import error_text
from .parameters import ModelParameters
from .session import GlobalModel, Session, get_session, reset_session

__all__ = [
    "TorchSite",
    "batch_size",
    "check_trainer",
    "current_site",
    "error_text",
    "forget_site",
    "is_running",
    "log",
    "numbers",
    "system_info",
]


class TorchSite:
    """Moves one model through the tasks of this process's session.

    Parameters are looked up afresh for each task, since a trainer may have moved the model to another device.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._loaded: GlobalModel | None = None
        self._ended = False
        self.owner: object = None

    @property
    def over(self) -> bool:
        """Whether the run is over, so that a trainer works on its own again."""
        return self._session.over

    def is_running(self) -> bool:
        """Wait for the next task; False when the run is over."""
        self._ended = False
        return self._session.is_running()

    def receive(self, model: nn.Module) -> GlobalModel | None:
        """Load the current task's global model into ``model`` once; None if the task has ended already."""
        if self._ended:
            return None
        parameters = ModelParameters(model)
        files = {} if self._session.bound else parameters.files
        task = self._session.begin(parameters.specs, files, parameters.read)
        if task is not self._loaded:
            parameters.load(list(task.specs), task.tensors)
            self._loaded = task
        return task

    def score(self, metrics: Mapping[str, float], examples: int) -> None:
        """Report the global model's validation metrics."""
        self._session.score(metrics, examples)

    def submit(self, model: nn.Module, examples: int, metrics: Mapping[str, float]) -> None:
        """Publish the trained values; ``examples`` is the update's weight.

        Raises:
            ClosedError: not one example was trained on, so the update has no weight.
        """
        if examples < 1:
            raise ClosedError(
                "this round trained on no example: check that the training data is not empty and that the "
                "trainer's budget (epochs or steps) is positive"
            )
        self._ended = True
        self._loaded = None
        weight = min(examples, protocol.MAX_WEIGHT)
        self._session.submit(ModelParameters(model).read, weight, metrics)

    def end(self) -> None:
        """End an evaluation task."""
        self._ended = True
        self._loaded = None
        self._session.end_task()

    def claim(self, trainer: object) -> None:
        """Make ``trainer`` the one that takes part.

        Raises:
            ClosedError: another trainer of this process does already.
        """
        if self.owner is not None and self.owner is not trainer:
            raise ClosedError(
                "another trainer of this process is patched already; one process is one site, so patch one trainer"
            )
        self.owner = trainer

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell the server about an error that ends the block, without local paths, and let it pass."""
        try:
            yield
        except Exception as error:
            self._session.problem(error_text(error))
            raise


_site: TorchSite | None = None


def current_site() -> TorchSite:
    """Return this process's part, made on first use.

    Raises:
        ClosedError: this is one of several training processes, which is not supported yet.
    """
    global _site  # noqa: PLW0603 - one session per process is the contract
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ClosedError(
            "this script runs as several training processes (WORLD_SIZE > 1), which is not supported yet; start "
            "it as one process per site"
        )
    if _site is None:
        _site = TorchSite(get_session())
    return _site


def forget_site() -> None:
    """Leave the run and forget the trainer; for scripts that take part in several runs in turn."""
    global _site  # noqa: PLW0603
    _site = None
    forget_choice()
    reset_session()


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


def batch_size(batch: Any) -> int:
    """Return the number of examples in a batch: the first dimension of the first tensor in it, else 1."""
    if hasattr(batch, "shape"):
        return int(batch.shape[0]) if len(batch.shape) else 1
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        for part in batch:
            if hasattr(part, "shape") or isinstance(part, list | tuple | Mapping):
                return batch_size(part)
        return len(batch) or 1
    return 1


def is_running() -> bool:
    """Wait for the next task; False when the run is over. See `Session.is_running` for the errors."""
    return current_site().is_running()


def log(metrics: Mapping[str, float], step: int | None = None) -> None:
    """Show training metrics at the server while a round is under way."""
    get_session().log(metrics, step)


def system_info() -> dict[str, str | int]:
    """Return ``run``, ``site``, ``server``, ``round``, ``rounds`` and ``version``."""
    return get_session().system_info()
