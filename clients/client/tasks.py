"""One pass of a plain loop as a block: `task` receives before it and sends after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fedcore.errors import WeightError

from . import plain

__all__ = ["Task", "task"]


@dataclass
class Task:
    """One pass of the loop, as `task` gives it; what is set here is sent at the end of the block.

    Attributes:
        kind: ``"train"``, or ``"submit"``: train, and the update is to be a model of its own; ``"evaluate"``: only
            ``metrics`` count; ``"infer"``: only ``outputs`` count.
        round, rounds, version: this round, how many there are, and the global model's own number.
        params: the global model, name -> array. After ``init(module)`` the module holds it already, and its own
            values are sent; otherwise put the update in its place.
        weight: number of training examples seen; must be set where ``kind`` is ``"train"``.
        metrics: validation metrics of the global model, on ``examples`` validation examples.
        train_metrics: shown at the server.
        outputs: of an inference task: numbers, texts and lists of them by name, all that leaves.
    """

    kind: str
    round: int
    rounds: int
    version: int
    params: dict[str, Any]
    weight: Any = None
    metrics: dict[str, float] = field(default_factory=dict)
    examples: int | None = None
    train_metrics: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def task() -> Iterator[Task]:
    """Receive the global model, into the module given to `init`, and send what the block leaves in the `Task`.

    A block that an error ends sends nothing.

    Raises:
        WeightError: the block set no weight in a training task; besides what `receive` and `send` raise.
    """
    given, whole = plain.begin()
    current = Task(given.kind, given.round, given.rounds, given.version, plain.receive())
    if whole:
        plain.load(current.params)
    yield current
    if given.kind == "infer":
        plain.answer(current.outputs, examples=current.examples or 1)
        return
    if given.trains and current.weight is None:
        raise WeightError(
            "set weight in the block of fl.task(): the number of training examples seen"
        )
    plain.send(
        None if whole else current.params,
        weight=plain.LEFT_OUT if current.weight is None else current.weight,
        metrics=current.metrics,
        examples=current.examples,
        train_metrics=current.train_metrics,
    )
