"""Arithmetic on a matrix of squared distances, which the rules of several passes share.

A point is a linear combination of the sources with parts that add up to 1, so its distance to each source follows
from the matrix. Only + - x / and the square root are used, and sums that are rounded once (`math.fsum`): every
machine gets the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Final

from fedcore.errors import ConfigError
from fedcore.weighing import effective_weight

from .deciding import Squares

__all__ = ["TooFar", "middle", "near", "part_of", "squares_to", "total", "whole_weights"]

_FAR: Final = 2.0**40  # 2^20 times as far; further away, rounding of the matrix hides the direction
_TOP: Final = 62  # the greatest weight has its highest bit here
_BITS: Final = 24


class TooFar(ConfigError):
    """The squares of distances between updates are beyond binary64, so that nothing can be decided.

    Attributes:
        sources: which updates are so far from others; empty: all.
    """

    def __init__(self, sources: Sequence[int] = ()) -> None:
        super().__init__(
            "the square of a distance between updates is beyond binary64: their values are too large"
        )
        self.sources = tuple(sources)


def total(values: Iterable[float]) -> float:
    """Return a sum of numbers from 0 on, rounded once; infinite where it is beyond binary64."""
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def middle(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the weighted median: the least value for which those up to it have half of all weights."""
    pairs = sorted(zip(values, map(Fraction, weights), strict=True))
    half = sum(weight for _, weight in pairs) / 2
    reached = Fraction()
    for value, weight in pairs:
        reached += weight
        if reached >= half:
            return value
    raise ValueError("there is no value")


def near(squares: Sequence[float], weights: Sequence[float], least: float = 0.0) -> list[int]:
    """Return which sources are within 2^20 times the middle distance.

    Args:
        squares: how far away each source is, squared.
        weights: of the sources.
        least: what the middle square is taken for if it is less.

    Raises:
        TooFar: half of them are further away than binary64 can hold.
    """
    bound = _FAR * max(middle(squares, weights), least)
    found = [
        source for source, square in enumerate(squares) if square <= bound and square < math.inf
    ]
    if not found:
        raise TooFar([source for source, square in enumerate(squares) if square == math.inf])
    return found


def part_of(squares: Squares, points: Sequence[int]) -> list[list[float]]:
    """Return the matrix of some of the points.

    Raises:
        TooFar: one of its distances is infinite.
    """
    found = [[squares[one][other] for other in points] for one in points]
    far = [one for one, row in zip(points, found, strict=True) if math.inf in row]
    if far:
        raise TooFar(far)
    return found


def squares_to(squares: Squares, parts: Sequence[float]) -> list[float]:
    """Return the squared distance of each point of a matrix to a combination of the first ones.

    Args:
        squares: shape (n, n).
        parts: of the first points, at most n; from 0 on, they add up to 1.
    """
    some = [(index, part) for index, part in enumerate(parts) if part]
    means = [total(part * row[index] for index, part in some) for row in squares]
    spread = total(part * means[index] for index, part in some) / 2
    return [max(0.0, mean - spread) if mean < math.inf else mean for mean in means]


def whole_weights(
    parts: Sequence[float], whole: Fraction | None = None
) -> tuple[tuple[int, ...], int]:
    """Return the parts of sources as integers of 24 significant bits, and what the base weighs beside them.

    Parts are rounded toward zero, the base's away from it: no source has a greater share of the sum than its
    part. A part above 0 is at least 1.

    Args:
        parts: from 0 on, one of them above 0.
        whole: what they and the base's part add up to; None: the base has none.
    """
    _, exponent = math.frexp(max(*parts, float(whole or 0)))
    scale = Fraction(2) ** (_TOP + 1 - exponent)
    weights = [
        max(1, effective_weight(int(part * scale))) if part else 0 for part in map(Fraction, parts)
    ]
    base = 0
    if whole is not None:
        base = max(0, math.ceil(whole * scale) - sum(weights))
        spare = max(0, base.bit_length() - _BITS)
        base = -(-base >> spare) << spare
    common = math.gcd(*weights, base)
    common &= -common  # its greatest power of two; the sums keep their bits without it
    return tuple(weight // common for weight in weights), base // common
