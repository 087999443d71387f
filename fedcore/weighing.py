"""How much a number of examples weighs in a mean."""

from __future__ import annotations

from typing import Final

__all__ = ["effective_weight"]

_BITS: Final = 24


def effective_weight(examples: int) -> int:
    """Return a number of examples rounded toward zero to 24 significant bits: less by at most one part in 2^23.

    A product of such a weight and a value of 4 or 2 bytes is exact in binary64, whatever the weight's size.
    """
    spare = max(0, examples.bit_length() - _BITS)
    return examples >> spare << spare
