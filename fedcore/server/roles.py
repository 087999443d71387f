"""Which tensors of a run's model are buffers: what the sites declared when the first round was collected."""

from __future__ import annotations

import logging

from fedcore.roles import Buffers, compare_buffers
from fedcore.server.storage.store import Store
from fedcore.words import plural

__all__ = ["Roles"]

logger = logging.getLogger("fedcore.server")


class Roles:
    """The roles of a run. They decide bytes: from the first round on they stay, and are kept in the journal.

    A run that began without any goes on without any.

    Attributes:
        settled: whether they stay.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # With no model but the first, what was kept was of no use yet: its sites may have left for good.
        self.settled = bool(store.last_version)
        self._buffers: Buffers = store.buffers() if self.settled else None

    @property
    def buffers(self) -> Buffers:
        """The names of the buffers; None if they are not known, and all floats are parameters."""
        return self._buffers

    def say(self, buffers: Buffers) -> None:
        """Take up what the sites say now, while nothing is settled."""
        if not self.settled:
            self._buffers = buffers

    def settle(self) -> None:
        """Let them stay, as a round is collected from now on."""
        if self.settled:
            return
        self.settled = True
        self._store.keep_buffers(self._buffers)
        if self._buffers:
            logger.info(
                "%s of the model, such as %s, will keep the plain mean",
                plural(len(self._buffers), "buffer"), self._buffers[0],
            )  # fmt: skip

    def unlike(self, buffers: Buffers, here: str) -> str | None:
        """Say how those of a site differ from those that are settled; None where they don't."""
        return compare_buffers(buffers, self._buffers, here, "the run") if self.settled else None
