"""The factors of a site's adapters: which of them a round trains, and that the others stay as they are.

Where the run combines products, the global model has another rank than the site's adapter. What the site is given
of it is its best part of the site's rank: the first columns of each B, and the first rows of each A.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedcore._core import Layout, same_bytes
from fedcore.adapters.forms import Forms, version_form
from fedcore.errors import LayoutError
from fedcore.layout import table
from fedcore.model_file import Reader
from fedcore.protocol import LoraMethod
from fedcore.roles import Pairs

__all__ = ["Factors"]


class Factors(Forms):
    """What a site's updates hold.

    Args:
        method: how the run combines factors; None: each tensor for itself.
        pairs: the factors of the site's adapters, which count only where the run combines them.
        max_rank: the highest rank of the global model, where products are combined.

    Attributes:
        pairs: those that the server wants to know.
    """

    def __init__(
        self, method: LoraMethod | None, pairs: Pairs, max_rank: int | None = None
    ) -> None:
        self.pairs = () if method is None else pairs
        super().__init__(method, self.pairs)
        self._max_rank = max_rank if method == "exact" and pairs else None
        self._whole: tuple[Layout, Layout] | None = None

    def model_layout(self, own: Layout) -> Layout:
        """Return the layout of the global model; the same object where it is that of the site's tensors.

        Raises:
            LayoutError: the rank of an adapter is above that of the global model.
        """
        if self._max_rank is None:
            return own
        if self._whole is None or self._whole[0] is not own:
            form = version_form(table(own), self.pairs, self._max_rank)
            self._whole = own, Layout([(n, d, list(s)) for n, d, s in form], own.chunk_bytes)
        return self._whole[1]

    def given(self, own: Layout, model: Mapping[str, memoryview]) -> Mapping[str, memoryview]:
        """Return what a site of this layout is given of the global model.

        Args:
            own: the layout of the site's tensors.
            model: raw bytes of the global model, by name.
        """
        return model if self._max_rank is None else _BestPart(own, self.model_layout(own), model)

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


class _BestPart(Mapping[str, memoryview]):
    """The tensors of a layout out of a global model of other ranks; what that lacks is zero."""

    def __init__(self, own: Layout, whole: Layout, model: Mapping[str, memoryview]) -> None:
        self._own = {name: shape for name, _, shape in table(own)}
        self._whole = {name: shape for name, _, shape in table(whole)}
        self._model = model

    def __getitem__(self, name: str) -> memoryview:
        own, whole = self._own[name], self._whole[name]
        if own == whole:
            return self._model[name]
        import numpy as np  # a site without adapters of its own rank does without

        values = np.frombuffer(self._model[name], np.float32).reshape(whole)
        found = np.zeros(own, np.float32)
        rows, columns = (min(a, b) for a, b in zip(own, whole, strict=True))
        found[:rows, :columns] = values[:rows, :columns]
        return memoryview(found.tobytes())

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)
