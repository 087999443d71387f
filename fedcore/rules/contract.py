"""The contract of a rule that is written in Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from .options import Option

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PythonRule"]


class PythonRule(ABC):
    """What combines the sites' updates, piece by piece; a subclass is named ``package.module:Class``.

    An object is made for each thread, with the weights of the sources and the rule's settings. The core gives it
    the same piece of each source, decoded to binary64 and free of NaN and infinity, and rounds once what comes
    back. Integers and booleans do not come here.

    - What an element becomes depends on that element of each source, on the weights and on the settings alone: not
      on its neighbours, on how large a piece is, on time or on random numbers.
    - It is finite for finite values, and fits the model's dtype.
    - Sources come in canonical order. With ``symmetric`` another order gives the same bits.

    `fedcore.rules.python.check_rule` tries that on random numbers. A rule that raises, leaves an element out or
    gives NaN ends what is under way; in a run, the round goes on once the rule is mended.

    Attributes:
        version: changes when the same inputs give other bits; part of what is recorded.
        weighted: weights change the result.
        symmetric: the order of the sources does not change the result.
        least: sources that it needs at least.
        options: the numbers that it can be given, by name.
        weights: of the sources, in their order.
        settings: a number for each option.
    """

    version: ClassVar[int] = 1
    weighted: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False
    least: ClassVar[int] = 1
    options: ClassVar[Mapping[str, Option]] = {}

    def __init__(self, weights: NDArray[np.float64], settings: Mapping[str, float]) -> None:
        self.weights = weights
        self.settings = settings

    @classmethod
    def least_with(cls, settings: Mapping[str, float]) -> int:  # noqa: ARG003 - for subclasses
        """Return how many sources it needs at least with these settings; `least` where that is always the same."""
        return cls.least

    @abstractmethod
    def combine(self, values: NDArray[np.float64], out: NDArray[np.float64]) -> None:
        """Combine a piece.

        Args:
            values: shape (sources, elements), read-only, and valid during the call alone.
            out: shape (elements,); every element is to be filled in.
        """
