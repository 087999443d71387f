"""The contract of a rule of several passes: what it decides of whole updates, by how far each is from the others.

The first pass over the updates gives the squared distances of all pairs. The rule decides from these numbers alone
what each update weighs. The second pass is the mean with those weights, in which the model that the updates start
from may have a weight, too: then the step is shorter. So the aggregate is

    (sum of weights[k] * update[k] + base * model) / (sum of weights + base).

A decision depends on its arguments alone, and uses + - x / and square roots only: the same numbers give the same
bits on every machine. It is made again without an update that is lost in the second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedcore.errors import ConfigError

from .options import Option, complete

__all__ = ["Decision", "SeveralPasses", "Squares"]

Squares = Sequence[Sequence[float]]
"""Squared distances of all pairs, symmetric, with zeros on the diagonal; infinite ones, but no NaN."""


def _fits_all(_: int, __: Mapping[str, float]) -> None:
    """Take any number of updates."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a rule has decided of K updates.

    Attributes:
        weights: what each weighs, an integer of at most 24 significant bits below 2^63; 0: it is left out.
        base: what the model weighs that the updates start from, of the same kind.
        scores: what the rule has measured of each; less is better.
        measure: what a score is, in a phrase.
    """

    weights: tuple[int, ...]
    base: int
    scores: tuple[float, ...]
    measure: str

    @property
    def chosen(self) -> tuple[bool, ...]:
        """Whether each update counts."""
        return tuple(weight > 0 for weight in self.weights)

    @property
    def scale(self) -> float:
        """By what the mean of the steps is multiplied, correctly rounded."""
        whole = sum(self.weights)
        return whole / (whole + self.base)


@dataclass(frozen=True, slots=True)
class SeveralPasses:
    """A rule of several passes.

    Attributes:
        name: how run files and the command line name it.
        version: changes when the same distances and weights give another decision.
        summary: what it computes, in a phrase.
        options: the numbers that it can be given, by name.
        weighted: the weights of updates change the result.
        needs_base: it has to know the distance of each update to the model that they start from.
        least_with: how many updates it needs at least, for settings.
        judge: decides; gets what `decide` gets, and enough updates.
        fits: raises ValueError where it can't decide of so many updates, though they are enough.
        keeps_most: it leaves out few updates, so that it pays to keep what was surveyed for the second pass.
        least_words: where `least_with` comes from, in a phrase.
    """

    name: str
    version: int
    summary: str
    options: Mapping[str, Option]
    weighted: bool
    needs_base: bool
    least_with: Callable[[Mapping[str, float]], int]
    judge: Callable[[Squares, Sequence[float], Mapping[str, float]], Decision]
    fits: Callable[[int, Mapping[str, float]], None] = _fits_all
    least_words: str = ""
    keeps_most: bool = True

    def recorded(self, settings: Mapping[str, float]) -> str:
        """Return name, version and settings, as the header of a model file has them."""
        numbers = [f"{name}={value.hex()}" for name, value in settings.items()]
        return " ".join([self.name, str(self.version), *numbers])

    def having(self, settings: Mapping[str, float]) -> dict[str, float]:
        """Return a number for each option. ConfigError: it has no such option, or does not take the value."""
        try:
            return complete(self.options, settings, self.name)
        except ValueError as error:
            raise ConfigError(f"the rule {self.name!r}: options: {error}") from None

    def least(self, settings: Mapping[str, float]) -> int:
        """Return how many updates it needs at least."""
        return self.least_with(settings)

    def check(self, count: int, settings: Mapping[str, float]) -> None:
        """Raise ConfigError if it can't decide of so many updates."""
        least = self.least(settings)
        if count < least:
            numbers = ", ".join(f"{name} = {value:g}" for name, value in settings.items())
            options = f" with {numbers}" if numbers else ""
            words = f" ({self.least_words})" if self.least_words else ""
            raise ConfigError(
                f"the rule {self.name!r}{options} needs at least {least} inputs{words}, got {count}"
            )
        try:
            self.fits(count, settings)
        except ValueError as error:
            raise ConfigError(f"the rule {self.name!r}: {error}") from None

    def decide(
        self, squares: Squares, weights: Sequence[float], settings: Mapping[str, float]
    ) -> Decision:
        """Decide of K updates.

        Args:
            squares: shape (K + 1, K + 1): of the updates in canonical order, and of the model that they start
                from, the last row. Shape (K, K) will do where it does not need the base.
            weights: of the updates, above 0.
            settings: a number for each option.

        Raises:
            ConfigError: they are too few.
        """
        self.check(len(weights), settings)
        return self.judge(squares, weights, settings)
