"""The factors of a site's adapters: which of them a round trains, and that the others stay as they are."""

from __future__ import annotations

from collections.abc import Mapping

from fedcore._core import same_bytes
from fedcore.adapters.forms import Forms
from fedcore.errors import LayoutError
from fedcore.model_file import Reader
from fedcore.protocol import LoraMethod
from fedcore.roles import Pairs

__all__ = ["Factors"]


class Factors(Forms):
    """What a site's updates hold.

    Args:
        method: how the run combines factors; None: each tensor for itself.
        pairs: the factors of the site's adapters, which count only where the run combines them.

    Attributes:
        pairs: those that the server wants to know.
    """

    def __init__(self, method: LoraMethod | None, pairs: Pairs) -> None:
        self.pairs = () if method is None else pairs
        super().__init__(method, self.pairs)

    def check(self, read: Reader, received: Mapping[str, memoryview], round_: int) -> None:
        """Refuse what was trained beside other factors than the run's: it is of no use there.

        Args:
            read: gives the values after training.
            received: the global model.
            round_: the update's.

        Raises:
            LayoutError: a factor has changed that this round leaves as it is; it is named.
        """
        for name in sorted(self.fixed(round_)):
            if not same_bytes(read(name), received[name]):
                raise LayoutError(
                    f"training changed {name!r}, which round {round_} leaves as it is (aggregation.lora): no "
                    "callback may change it, and no optimizer may move a parameter without a gradient"
                )
