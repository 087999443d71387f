"""Nearest-neighbour mixing, which other rules of several passes take as an option.

Allouah et al. 2023, "Fixing by Mixing": each update is replaced by the mean of the K - f updates that are nearest
to it, itself among them. So honest sites whose data differ come nearer to each other before a rule looks at them.
What a rule makes of the mixed updates is a combination of the updates themselves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from .deciding import Squares
from .options import Option

__all__ = ["MIX", "Mixing", "least_mixed", "mixing_of"]

MIX: Final = Option(
    0,
    0,
    1e6,
    "inputs that nearest-neighbour mixing leaves out of each mean; 0: it is off",
    whole=True,
)


@dataclass(frozen=True, slots=True)
class Mixing:
    """Mixed sources.

    Attributes:
        members: of each mixed source, the sources of which it is the mean, in order.
        squares: the squared distances of the mixed sources; of the base, too, if there was one.
    """

    members: tuple[tuple[int, ...], ...]
    squares: Squares

    def parts(self, mixed: Sequence[float]) -> list[float]:
        """Return the parts of the sources, by those of the mixed ones."""
        shares = [part / len(own) for part, own in zip(mixed, self.members, strict=True)]
        return [
            math.fsum(
                share for share, own in zip(shares, self.members, strict=True) if source in own
            )
            for source in range(len(self.members))
        ]


def least_mixed(options: Mapping[str, float]) -> int:
    """Return how many sources mixing needs: those that it leaves out are fewer than the others."""
    return 2 * int(options["mix"]) + 1


def mixing_of(
    squares: Squares, size: int, options: Mapping[str, float], base: bool = False
) -> Mixing:
    """Mix sources.

    Args:
        squares: of n sources and, with ``base``, of the base after them. All are finite.
        size: how many sources make up a mixed one; all, if there are fewer.
        options: of the rule. Without ``mix`` each source stays what it is.
    """
    count = len(squares) - base
    if not options["mix"]:
        return Mixing(tuple((source,) for source in range(count)), squares)
    members = []
    for source in range(count):
        order = sorted(range(count), key=lambda k: (squares[source][k], k != source, k))
        members.append(tuple(sorted(order[:size])))
    points: list[tuple[int, ...]] = [*members, *([(count,)] if base else [])]
    return Mixing(tuple(members), _squares_of_means(squares, points))


def _squares_of_means(squares: Squares, points: Sequence[tuple[int, ...]]) -> list[list[float]]:
    """Return the squared distances of the means of sets of sources, but for one rounding those of the matrix.

    Each is the mean square from one set to the other, less half the mean squares within each. Sums are integers of
    one unit, so that nothing is lost. Cost: the cube of the number of sources.
    """
    found = [[0.0] * len(points) for _ in points]
    if any(square == math.inf for row in squares for square in row):
        for one, other in itertools.combinations(range(len(points)), 2):
            found[one][other] = found[other][one] = _square(squares, points[one], points[other])
        return found
    ratios = [[square.as_integer_ratio() for square in map(float, row)] for row in squares]
    unit = max(below for row in ratios for _, below in row)  # a power of two, as all are
    rows = [[above * (unit // below) for above, below in row] for row in ratios]
    sums = [_sums(row, points) for row in rows]  # from each source to each set
    columns = [list(column) for column in zip(*sums, strict=True)]
    whole = [_sums(column, points) for column in columns]  # from each set to each set
    for one, other in itertools.combinations(range(len(points)), 2):
        a, b = len(points[one]), len(points[other])
        exact = (
            2 * a * b * whole[one][other] - b * b * whole[one][one] - a * a * whole[other][other]
        )
        square = max(0.0, float(Fraction(exact, 2 * a * a * b * b * unit)))
        found[one][other] = found[other][one] = square
    return found


def _sums(values: Sequence[int], sets: Sequence[Sequence[int]]) -> list[int]:
    """Return the sum of the values of each set of indices."""
    return [sum(map(values.__getitem__, chosen)) for chosen in sets]


def _square(squares: Squares, one: Sequence[int], other: Sequence[int]) -> float:
    """Return the squared distance of the means of two sets of sources, but for one rounding that of the matrix.

    It is the mean square from one set to the other, less half the mean squares within each.
    """
    a, b = len(one), len(other)
    if a == b:  # what both hold adds nothing
        one, other = sorted({*one} - {*other}), sorted({*other} - {*one})
    terms = [(a * b, squares[i][j]) for i in one for j in other]
    terms += [(-b * b, squares[i][j]) for i in one for j in one if i < j]
    terms += [(-a * a, squares[i][j]) for i in other for j in other if i < j]
    if any(square == math.inf for _, square in terms):
        return math.inf
    exact = sum(factor * Fraction(square) for factor, square in terms)
    return max(0.0, float(exact / (a * a * b * b)))
