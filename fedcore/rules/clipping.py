"""Rules that shorten updates which are too long: norm clipping and centred clipping.

Both are relative to the base, the model that the sites began at. With the weights a_k, which add up to 1 here:

- Norm clipping: base + sum a_k (y_k - base) min(1, bound / |y_k - base|).
- Centred clipping (Karimireddy, He and Jaggi 2021, "Learning from History for Byzantine Robust Optimization"):
  v begins at the base, and v <- v + sum a_k (y_k - v) min(1, radius / |y_k - v|) is repeated. The paper begins at
  the result of the round before, which is the base here: sites train on what it made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Final

from .deciding import Decision, SeveralPasses, Squares
from .mixing import MIX, least_mixed, mixing_of
from .options import Option
from .squares import middle, near, part_of, squares_to, total, whole_weights

__all__ = ["CENTRED_CLIPPING", "NORM_CLIPPING"]


def _clip_norms(
    squares: Squares, weights: Sequence[float], options: Mapping[str, float]
) -> Decision:
    norms = _norms(squares, len(weights))
    bound = options["bound"] or middle(norms, weights)
    kept = near([squares[-1][k] for k in range(len(weights))], weights, bound * bound)
    parts = [0.0] * len(weights)
    for source in kept:
        parts[source] = float(weights[source]) * _factor(norms[source], bound)
    whole = Fraction() + sum(Fraction(weights[source]) for source in kept)
    return Decision(*whole_weights(parts, whole), tuple(norms), "norm of the update")


def _clip_from_centre(
    squares: Squares, weights: Sequence[float], options: Mapping[str, float]
) -> Decision:
    count = len(weights)
    norms = _norms(squares, count)
    radius = options["radius"] or middle(norms, weights)
    kept = near([squares[-1][k] for k in range(count)], weights, radius * radius)
    mixing = mixing_of(
        part_of(squares, [*kept, count]), count - int(options["mix"]), options, base=True
    )
    alphas = [weights[source] for source in kept]
    found = _centre(mixing.squares, alphas, radius, int(options["iterations"]))
    parts = [0.0] * count
    for source, part in zip(kept, mixing.parts(found), strict=True):
        parts[source] = part
    whole = Fraction() + sum(map(Fraction, alphas))
    shares = [part / float(whole) for part in parts]
    away = squares_to(squares, [*shares, max(0.0, 1 - total(shares))])
    scores = tuple(math.sqrt(square) for square in away[:count])
    return Decision(*whole_weights(parts, whole), scores, "distance to the result")


def _centre(
    squares: Squares, alphas: Sequence[float], radius: float, iterations: int
) -> list[float]:
    """Return the parts of the points in their centre, of a whole that is the sum of the weights.

    Args:
        squares: of the points, and of the base after them.
        alphas: the weights of the points.
        radius: to which a step towards a point is shortened.
        iterations: how often all points move the centre.
    """
    whole = total(map(float, alphas))
    parts, base = [0.0] * len(alphas), whole
    for _ in range(iterations):
        away = squares_to(squares, [part / whole for part in [*parts, base]])
        factors = [_factor(math.sqrt(square), radius) for square in away[: len(alphas)]]
        pairs = list(zip(map(float, alphas), factors, strict=True))
        stays = total(alpha * (1 - factor) for alpha, factor in pairs) / whole
        parts = [
            part * stays + alpha * factor
            for part, (alpha, factor) in zip(parts, pairs, strict=True)
        ]
        base *= stays
    return parts


def _norms(squares: Squares, count: int) -> list[float]:
    return [math.sqrt(squares[-1][source]) for source in range(count)]


def _factor(norm: float, bound: float) -> float:
    return 1.0 if norm <= bound else bound / norm


NORM_CLIPPING: Final = SeveralPasses(
    name="norm-clipping",
    version=1,
    summary="the mean of the updates, each shortened to a norm",
    weighted=True,
    needs_base=True,
    options={
        "bound": Option(0, 0, 1e30, "the greatest norm of an update; 0: the median of the norms"),
    },
    least_with=lambda _: 1,
    judge=_clip_norms,
)

CENTRED_CLIPPING: Final = SeveralPasses(
    name="centred-clipping",
    version=1,
    summary="the base, moved by the mean of the differences to it, each shortened to a radius, several times",
    weighted=True,
    needs_base=True,
    options={
        "radius": Option(
            0, 0, 1e30, "to which a difference is shortened; 0: the median of the updates' norms"
        ),
        "iterations": Option(3, 1, 1e4, "times that the centre is moved", whole=True),
        "mix": MIX,
    },
    least_with=least_mixed,
    least_words="2 mix + 1",
    judge=_clip_from_centre,
)
