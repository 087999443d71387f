"""Rules that choose among whole updates, by how far each is from the others: Krum and multi-Krum.

Blanchard et al. 2017, "Machine Learning with Adversaries". Of K updates, f may be wrong in any way. The score of
an update is the sum of its K - f - 2 least squared distances to others, added from the least one on. The updates
of the least scores are chosen, and weigh the same. Of equal scores the first one counts, as of the two nearest
updates of three. The order is that of names, which no update can change. With `mix` the rule chooses among mixed
updates; what is left of an update is how many of the chosen ones it is a part of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from .deciding import Decision, SeveralPasses, Squares
from .mixing import MIX, least_mixed, mixing_of
from .options import Option
from .squares import TooFar, total

__all__ = ["CHOOSING"]

_Kept = Callable[[int, Mapping[str, float]], int]


def _scores(squares: Squares, count: int, liars: int) -> tuple[float, ...]:
    scores = []
    for own in range(count):
        others = sorted(squares[own][other] for other in range(count) if other != own)
        scores.append(total(others[: count - liars - 2]))
    return tuple(scores)


def _judge(
    kept: _Kept, squares: Squares, weights: Sequence[float], settings: Mapping[str, float]
) -> Decision:
    count = len(weights)
    mixing = mixing_of(
        [row[:count] for row in squares[:count]], count - int(settings["mix"]), settings
    )
    scores = _scores(mixing.squares, count, int(settings["f"]))
    best = sorted(range(count), key=lambda own: (scores[own], own))
    chosen = set(best[: kept(count, settings)])
    if scores[best[0]] == math.inf:
        raise TooFar(range(count))
    return Decision(
        weights=tuple(sum(own in mixing.members[one] for one in chosen) for own in range(count)),
        base=0,
        scores=scores,
        measure="sum of squared distances to its neighbours",
    )


def _one(_: int, __: Mapping[str, float]) -> int:
    return 1


def _several(count: int, settings: Mapping[str, float]) -> int:
    honest, wanted = count - int(settings["f"]), int(settings["m"])
    if wanted > honest:
        raise ValueError(
            f"m = {wanted}: expected at most {honest}, the number of inputs less f = {count - honest}"
        )
    return wanted or honest


def _rule(name: str, summary: str, kept: _Kept, **options: Option) -> SeveralPasses:
    def fits(count: int, settings: Mapping[str, float]) -> None:
        kept(count, settings)

    return SeveralPasses(
        name=name,
        version=1,
        summary=summary,
        options=options,
        weighted=False,
        needs_base=False,
        least_with=lambda settings: max(2 * int(settings["f"]) + 3, least_mixed(settings)),
        judge=lambda squares, weights, settings: _judge(kept, squares, weights, settings),
        fits=fits,
        keeps_most=kept is not _one,
        least_words="2 f + 3, so that three allow f = 0 alone; and 2 mix + 1",
    )


_LIARS: Final = Option(1, 0, 1e6, "inputs that may be wrong in any way", whole=True)

CHOOSING: Final = (
    _rule("krum", "the input that is nearest to its neighbours", _one, f=_LIARS, mix=MIX),
    _rule(
        "multi-krum",
        "the mean of the inputs that are nearest to their neighbours",
        _several,
        f=_LIARS,
        m=Option(0, 0, 1e6, "inputs that are chosen; 0: all but f", whole=True),
        mix=MIX,
    ),
)
