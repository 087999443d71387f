"""What of a model the updates of a round hold: all of it, or one factor of each adapter."""

from __future__ import annotations

from fedcore import protocol
from fedcore._core import Layout
from fedcore.adapters.forms import Forms
from fedcore.layout import layout_hash
from fedcore.protocol import LoraMethod
from fedcore.roles import Pairs, compare_pairs, pairs_of
from fedcore.server.storage.store import Store

__all__ = ["Factors"]


class Factors:
    """The factors of a run's adapters. They decide bytes, and are kept in the journal.

    Args:
        method: how they are combined; None: each tensor for itself.
        store: the run folder.

    Attributes:
        pairs: the names of A and B of each adapted module; none while no site has said them.
    """

    def __init__(self, method: LoraMethod | None, store: Store) -> None:
        self._method = method
        self._store = store
        self.pairs: Pairs = () if method is None else store.factors()
        self._forms = self.pairs, Forms(method, self.pairs)
        self._hashed: tuple[Layout, str] | None = None

    def unlike(self, site: str, declare: protocol.Declare, there: str, theirs: Pairs) -> str | None:
        """Say why a site's tensors are not those of adapters, or how they differ from ``theirs``; else None.

        Raises:
            LayoutError: the site names factors that are no factors of one product.
        """
        if self._method is None:
            return None
        pairs = pairs_of(declare)
        if not pairs:
            return (
                f"site {site!r} names no factors of a LoRA adapter, which aggregation.lora = {self._method!r} "
                "combines: give it a PEFT model with a LoRA adapter, trained in one process"
            )
        differs = compare_pairs(pairs, theirs, f"site {site!r}", there) if theirs else None
        return differs and f"the adapters differ: {differs}; give all sites the same adapter"

    def say(self, declare: protocol.Declare) -> None:
        """Take up what a site says of the run's model, unless it is known."""
        if not self.pairs:
            self.take(declare)

    def take(self, declare: protocol.Declare) -> None:
        """Take up the factors of the site whose model becomes the run's."""
        if self._method is not None:
            self.pairs = pairs_of(declare)
            self._store.keep_factors(self.pairs)

    def layout(self, model: Layout, round_: int) -> Layout:
        """Return the layout of a round's updates; the model's own, the same object, where they hold all of it."""
        if self._forms[0] != self.pairs:
            self._forms = self.pairs, Forms(self._method, self.pairs)
        return self._forms[1].layout(model, round_)

    def hash(self, model: Layout, round_: int) -> str | None:
        """Return the hash of the layout of a round's updates; None where it is the model's own."""
        layout = self.layout(model, round_)
        if layout is model:
            return None
        if self._hashed is None or self._hashed[0] is not layout:
            self._hashed = layout, layout_hash(layout)
        return self._hashed[1]
