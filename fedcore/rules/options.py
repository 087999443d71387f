"""Numbers that a rule or a server optimizer takes from the run file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Option", "complete"]


@dataclass(frozen=True, slots=True)
class Option:
    """A number that a rule or a server optimizer takes.

    Attributes:
        default: its value where the run file has none.
        least, below: it is at least the one, or above it where ``open`` is true, and below the other.
        summary: what it does, in a phrase.
        whole: it is an integer.
    """

    default: float
    least: float
    below: float
    summary: str
    open: bool = False
    whole: bool = False

    @property
    def bounds(self) -> str:
        """What it may be, in words."""
        kind = "an integer" if self.whole else "a number"
        return (
            f"{kind} {'above' if self.open else 'at least'} {self.least:g} and below {self.below:g}"
        )

    def allows(self, value: float) -> bool:
        """Whether it may have this value."""
        inside = (value > self.least if self.open else value >= self.least) and value < self.below
        return inside and (not self.whole or value == int(value))


def complete(
    declared: Mapping[str, Option], given: Mapping[str, float], of: str
) -> dict[str, float]:
    """Return a value for each option.

    Args:
        declared: the options by name.
        given: values for some of them.
        of: whose they are, for messages.

    Raises:
        ValueError: a name is unknown, or a value is not allowed.
    """
    for name, value in given.items():
        if name not in declared:
            raise ValueError(f"unknown key {name!r} of {of!r}{_hint(name, declared)}")
        if not declared[name].allows(value):
            raise ValueError(f"{name}: expected {declared[name].bounds}, got {value}")
    values = {name: float(option.default) for name, option in declared.items()}
    return values | {name: float(value) for name, value in given.items()}


def _hint(name: str, declared: Mapping[str, Option]) -> str:
    near = difflib.get_close_matches(name, declared, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; expected one of {', '.join(declared)}" if declared else "; it has no options"
