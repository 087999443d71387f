"""The contract of a rule that is written in Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PythonRule"]


class PythonRule(ABC):
    """What combines the sites' updates, piece by piece; a subclass is used as ``--rule package.module:Class``.

    An object is made for each thread, with the weights of the sources. The core gives it the same piece of each
    source, decoded to binary64 and free of NaN and infinity, and rounds once what comes back. Integers and
    booleans do not come here.

    - What an element becomes depends on that element of each source and on the weights alone: not on its
      neighbours, on how large a piece is, on time or on random numbers.
    - It is finite for finite values, and fits the model's dtype.
    - Sources come in canonical order. With ``symmetric`` another order gives the same bits.

    `fedcore.rules.python.check_rule` tries that on random numbers.

    Attributes:
        version: changes when the same inputs give other bits; part of what is recorded.
        weighted: weights change the result.
        symmetric: the order of the sources does not change the result.
        least: sources that it needs at least.
        weights: of the sources, in their order.
    """

    version: ClassVar[int] = 1
    weighted: ClassVar[bool] = True
    symmetric: ClassVar[bool] = False
    least: ClassVar[int] = 1

    def __init__(self, weights: NDArray[np.float64]) -> None:
        self.weights = weights

    @abstractmethod
    def combine(self, values: NDArray[np.float64], out: NDArray[np.float64]) -> None:
        """Combine a piece.

        Args:
            values: shape (sources, elements), read-only, and valid during the call alone.
            out: shape (elements,); every element is to be filled in.
        """
