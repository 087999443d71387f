"""The geometric median of whole updates (RFA), from the squared distances of all pairs.

Pillutla, Kakade and Harchaoui 2022, "Robust Aggregation for Federated Learning", algorithm 2: the smoothed
Weiszfeld iteration. It begins at the weighted mean z and repeats

    b_k = a_k / max(smoothing, |y_k - z|),    z = sum b_k y_k / sum b_k

with the weights a_k. Cost: K^2 products an iteration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

from .deciding import Decision, SeveralPasses, Squares
from .mixing import MIX, least_mixed, mixing_of
from .options import Option
from .squares import middle, near, part_of, squares_to, total, whole_weights

__all__ = ["RFA"]


def _judge(squares: Squares, weights: Sequence[float], options: Mapping[str, float]) -> Decision:
    count = len(weights)
    everyone = [row[:count] for row in squares[:count]]
    kept = near([middle(row, weights) for row in everyone], weights)
    mixing = mixing_of(part_of(squares, kept), count - int(options["mix"]), options)
    alphas = [float(weights[source]) for source in kept]
    found = _weiszfeld(mixing.squares, alphas, options["smoothing"], int(options["iterations"]))
    parts = [0.0] * count
    for source, part in zip(kept, mixing.parts(found), strict=True):
        parts[source] = part
    most = max(parts)
    whole, _ = whole_weights([part / most for part in parts])
    scores = tuple(math.sqrt(square) for square in squares_to(everyone, parts))
    return Decision(whole, 0, scores, "distance to the result")


def _weiszfeld(
    squares: Squares, alphas: Sequence[float], smoothing: float, iterations: int
) -> list[float]:
    """Return the parts of the points in their smoothed geometric median."""
    parts = _of_one(alphas)
    for _ in range(iterations):
        far = [math.sqrt(square) for square in squares_to(squares, parts)]
        before = parts
        parts = _of_one(
            [alpha / max(smoothing, away) for alpha, away in zip(alphas, far, strict=True)]
        )
        if parts == before:  # so it would be after any other iteration
            break
    return parts


def _of_one(numbers: Sequence[float]) -> list[float]:
    whole = total(numbers)
    return [number / whole for number in numbers]


RFA: Final = SeveralPasses(
    name="rfa",
    version=1,
    summary="the geometric median of the inputs, by the smoothed Weiszfeld iteration",
    weighted=True,
    needs_base=False,
    options={
        "iterations": Option(100, 1, 1e4, "times that the median is made better", whole=True),
        "smoothing": Option(
            1e-6,
            0,
            1e6,
            "a distance; an input that is nearer counts as if it were so far",
            open=True,
        ),
        "mix": MIX,
    },
    least_with=least_mixed,
    least_words="2 mix + 1",
    judge=_judge,
)
