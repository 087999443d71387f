"""How much an update weighs in a mean: by the number of examples behind it, the same as all, or within bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["EXAMPLES", "Weighing", "effective_weight"]

_BITS: Final = 24
_PARTS: Final = 1_000_000


def effective_weight(examples: int) -> int:
    """Return a number of examples rounded toward zero to 24 significant bits: less by at most one part in 2^23.

    A product of such a weight and a value of 4 or 2 bytes is exact in binary64, whatever the weight's size.
    """
    spare = max(0, examples.bit_length() - _BITS)
    return examples >> spare << spare


@dataclass(frozen=True, slots=True)
class Weighing:
    """What makes weights of numbers of examples; without arguments they are the weights.

    Attributes:
        equal: each update weighs 1.
        max_share: no update weighs more than this part of all, a multiple of a millionth above 0; None: as much as
            it comes to.

    Raises:
        ValueError: ``max_share`` is none, or it goes with ``equal``.
    """

    equal: bool = False
    max_share: float | None = None

    def __post_init__(self) -> None:
        share = self.max_share
        if share is None:
            return
        if not (0 < share < 1 and round(share * _PARTS) / _PARTS == share):
            raise ValueError(
                f"max_share: expected a number above 0 and below 1 of at most 6 decimals, got {share}"
            )
        if self.equal:
            raise ValueError(
                "max_share: equal weights have no greater share than others; leave it out"
            )

    @property
    def millionths(self) -> int:
        """The greatest share of an update, in millionths."""
        return _PARTS if self.max_share is None else round(self.max_share * _PARTS)

    @property
    def least(self) -> int:
        """How many updates it needs: those of fewer have greater shares, whatever they weigh."""
        return -(-_PARTS // self.millionths)

    @property
    def recorded(self) -> str:
        """What the header of a model file has of it; empty where numbers of examples are the weights."""
        if self.equal:
            return "equal"
        return "" if self.max_share is None else f"examples max_share={self.max_share}"

    def of(self, examples: Sequence[int]) -> list[float]:
        """Return the weights of updates, by the numbers of examples behind them, rounded as above.

        They are integers, but for those that `max_share` makes less.
        """
        from fedcore._core import weigh

        found = weigh(examples, self.equal, self.millionths)
        return [int(weight) if weight.is_integer() else weight for weight in found]


EXAMPLES: Final = Weighing()
"""Numbers of examples are the weights."""
