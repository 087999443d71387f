"""The registry of rules of several passes. One is a function in a file of this folder, and an entry here."""

from __future__ import annotations

from typing import Final

from .choosing import CHOOSING
from .clipping import CENTRED_CLIPPING, NORM_CLIPPING
from .deciding import SeveralPasses
from .geometric import RFA

__all__ = ["SEVERAL"]

SEVERAL: Final[dict[str, SeveralPasses]] = {
    rule.name: rule for rule in (*CHOOSING, RFA, CENTRED_CLIPPING, NORM_CLIPPING)
}
