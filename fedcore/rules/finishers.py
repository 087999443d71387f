"""The registry of server optimizers. Each is a source file in ``csrc/reduce/`` and an entry here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from fedcore.errors import ConfigError

__all__ = ["FINISHERS", "Finisher", "Option", "find_finisher"]


@dataclass(frozen=True, slots=True)
class Option:
    """A number that an optimizer takes.

    Attributes:
        default: its value where the run file has none.
        least, below: it is at least the one, or above it where ``open`` is true, and below the other.
        summary: what it does, in a phrase.
    """

    default: float
    least: float
    below: float
    summary: str
    open: bool = False

    @property
    def bounds(self) -> str:
        """What it may be, in words."""
        return f"{'above' if self.open else 'at least'} {self.least:g} and below {self.below:g}"

    def allows(self, value: float) -> bool:
        """Whether it may have this value."""
        return (value > self.least if self.open else value >= self.least) and value < self.below


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


FINISHERS: Final[dict[str, Finisher]] = {
    finisher.name: finisher
    for finisher in (
        Finisher(
            name="momentum",
            version=1,
            summary="momentum of the server (FedAvgM): v <- momentum * v + step; x <- x + learning_rate * v",
            states=("momentum",),
            options={
                "learning_rate": Option(1.0, 0, 1e6, "the part of v that is added", open=True),
                "momentum": Option(0.9, 0, 1, "the part of v that stays from round to round"),
            },
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
