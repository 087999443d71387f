"""The registry of server optimizers. Each is a source file in ``csrc/reduce/`` and an entry here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedcore.errors import ConfigError

from .options import Option

__all__ = ["FINISHERS", "Finisher", "factor_of", "find_finisher"]


@dataclass(frozen=True, slots=True)
class Finisher:
    """What is known of a server optimizer without the compiled core, whose own table a test compares with these.

    Attributes:
        name: how run files name it.
        version: changes when the same inputs give other bits.
        summary: what it computes, in a phrase.
        states: what it keeps from version to version, an element for each element of the parameters.
        options: what it can be given, by name.
    """

    name: str
    version: int
    summary: str
    states: tuple[str, ...]
    options: dict[str, Option]


_RATE: Final = Option(0.001, 0, 1e6, "how far an element moves in a round, about", open=True)
_TAU: Final = Option(
    0.001, 0, 1e6, "what is added to the root of v; v starts at its square", open=True
)
_BETA1: Final = Option(0.9, 0, 1, "the part of m that stays from round to round")
_BETA2: Final = Option(0.99, 0, 1, "the part of v that stays from round to round")

FINISHERS: Final[dict[str, Finisher]] = {
    finisher.name: finisher
    for finisher in (
        Finisher(
            name="momentum",
            version=1,
            summary="momentum of the server (FedAvgM): v <- momentum * v + step; x <- x + learning_rate * v",
            states=("momentum",),
            options={
                # v sums up 1 / (1 - momentum) steps: 0.1 of it is as long as one step of the mean.
                "learning_rate": Option(0.1, 0, 1e6, "the part of v that is added", open=True),
                "momentum": Option(0.9, 0, 1, "the part of v that stays from round to round"),
            },
        ),
        Finisher(
            name="nesterov",
            version=1,
            summary="momentum that looks ahead (DiLoCo's outer step): v <- momentum * v + step; "
            "x <- x + learning_rate * (momentum * v + step)",
            states=("momentum",),
            options={
                "learning_rate": Option(
                    0.7, 0, 1e6, "the part of the step that is added", open=True
                ),
                "momentum": Option(0.9, 0, 1, "the part of v that stays from round to round"),
            },
        ),
        Finisher(
            name="adagrad",
            version=1,
            summary="FedAdagrad: v <- v + step^2; x <- x + learning_rate * step / (sqrt(v) + tau)",
            states=("variance",),
            options={"learning_rate": _RATE, "tau": _TAU},
        ),
        Finisher(
            name="adam",
            version=1,
            summary="FedAdam: m <- beta1 * m + (1 - beta1) * step; v <- beta2 * v + (1 - beta2) * step^2; "
            "x <- x + learning_rate * m / (sqrt(v) + tau)",
            states=("momentum", "variance"),
            options={"learning_rate": _RATE, "beta1": _BETA1, "beta2": _BETA2, "tau": _TAU},
        ),
        Finisher(
            name="yogi",
            version=1,
            summary="FedYogi: FedAdam with v <- v - (1 - beta2) * step^2 * sign(v - step^2)",
            states=("momentum", "variance"),
            options={"learning_rate": _RATE, "beta1": _BETA1, "beta2": _BETA2, "tau": _TAU},
        ),
    )
}


def find_finisher(name: str) -> Finisher:
    """Return the optimizer of that name. Raises ConfigError, which names the known ones."""
    finisher = FINISHERS.get(name)
    if finisher is None:
        raise ConfigError(
            f"no server optimizer is named {name!r}; expected one of {', '.join(FINISHERS)}"
        )
    return finisher


def factor_of(schedule: Sequence[tuple[int, float]], round_: int) -> float:
    """Return the factor of the learning rate in a round, by a schedule of at least one point.

    Between two points the factor lies on a straight line, elsewhere it is the nearest point's. Only + - x and /
    are used, which every machine rounds in the same way.
    """
    begin, before = schedule[0]
    for end, factor in schedule:
        if round_ < end:
            part = (round_ - begin) / (end - begin) if round_ > begin else 0.0
            return before + (factor - before) * part
        begin, before = end, factor
    return before
