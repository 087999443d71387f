"""Rules that choose among whole updates, by how far each is from the others: Krum and its kin.

They take two passes over the updates: one for the squared distances of all pairs, one for the mean of those that
were chosen. So they combine files only; a run has its updates chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fedcore.errors import ConfigError

from .options import Option, complete

__all__ = ["CHOOSING", "Choice", "ChoosingRule", "check_choice"]


@dataclass(frozen=True, slots=True)
class Choice:
    """What a rule has chosen.

    Attributes:
        scores: of each update; less is better.
        chosen: whether each update counts. Those that do weigh the same.
    """

    scores: tuple[float, ...]
    chosen: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class ChoosingRule:
    """A rule that chooses.

    Attributes:
        name: how the command line names it.
        summary: what it computes, in a phrase.
        options: the numbers that it can be given, by name.
        kept: how many of so many updates it chooses, with these settings. Raises ValueError if it can't be.
    """

    name: str
    summary: str
    options: Mapping[str, Option]
    kept: Callable[[int, Mapping[str, float]], int]

    def having(self, settings: Mapping[str, float]) -> dict[str, float]:
        """Return a number for each option. ConfigError: it has no such option, or does not take the value."""
        try:
            return complete(self.options, settings, self.name)
        except ValueError as error:
            raise ConfigError(f"the rule {self.name!r}: options: {error}") from None

    def choose(self, squares: Sequence[Sequence[float]], settings: Mapping[str, float]) -> Choice:
        """Choose among K updates (Blanchard et al. 2017, "Machine Learning with Adversaries").

        The score of an update is the sum of its K - f - 2 least squared distances to others, added from the least
        one on. Of equal scores the first one counts.

        Args:
            squares: shape (K, K), symmetric: the squared distances of the updates, in canonical order.
            settings: a number for each option.

        Raises:
            ConfigError: they are fewer than 2 f + 3, or more are to be chosen than are honest.
        """
        count, liars = len(squares), int(settings["f"])
        check_choice(self, count, settings)
        scores = []
        for own, row in enumerate(squares):
            others = sorted(square for other, square in enumerate(row) if other != own)
            scores.append(sum(others[: count - liars - 2], 0.0))
        best = sorted(range(count), key=lambda own: (scores[own], own))
        kept = set(best[: self.kept(count, settings)])
        return Choice(tuple(scores), tuple(own in kept for own in range(count)))


def check_choice(rule: ChoosingRule, count: int, settings: Mapping[str, float]) -> None:
    """Check that a rule can choose among so many updates.

    Raises:
        ConfigError: they are fewer than 2 f + 3, or more are to be chosen than are honest.
    """
    liars = int(settings["f"])
    if count < 2 * liars + 3:
        raise ConfigError(
            f"the rule {rule.name!r} with f = {liars} needs at least {2 * liars + 3} inputs (2 f + 3), got {count}"
        )
    try:
        rule.kept(count, settings)
    except ValueError as error:
        raise ConfigError(f"the rule {rule.name!r}: {error}") from None


def _one(_: int, __: Mapping[str, float]) -> int:
    return 1


def _several(count: int, settings: Mapping[str, float]) -> int:
    honest, wanted = count - int(settings["f"]), int(settings["m"])
    if wanted > honest:
        raise ValueError(
            f"m = {wanted}: expected at most {honest}, the number of inputs less f = {count - honest}"
        )
    return wanted or honest


_LIARS: Final = Option(1, 0, 1e6, "inputs that may be wrong in any way", whole=True)

CHOOSING: Final[dict[str, ChoosingRule]] = {
    rule.name: rule
    for rule in (
        ChoosingRule(
            name="krum",
            summary="the input that is nearest to its neighbours",
            options={"f": _LIARS},
            kept=_one,
        ),
        ChoosingRule(
            name="multi-krum",
            summary="the mean of the inputs that are nearest to their neighbours",
            options={
                "f": _LIARS,
                "m": Option(0, 0, 1e6, "inputs that are chosen; 0: all but f", whole=True),
            },
            kept=_several,
        ),
    )
}
