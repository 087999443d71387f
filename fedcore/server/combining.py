"""The thread in which a slow rule combines a collection's chunks."""

from __future__ import annotations

import atexit
import threading

from fedcore._core import Collector, Exchange

__all__ = ["Combining"]


class Combining:
    """Combines a collection's chunks while its exchange serves all sites, those of other runs too.

    It ends once the collection is cancelled, after the chunk that is being combined then. An interpreter that
    exits waits for it, as it must not go on without one.

    Args:
        exchange: in which the collection was started.
        collector: of which chunks are combined aside.
    """

    def __init__(self, exchange: Exchange, collector: Collector) -> None:
        self._exchange = exchange
        self._collector = collector
        self._thread = threading.Thread(target=self._combine, name="fedcore-combine", daemon=True)
        atexit.register(self._end)
        self._thread.start()

    def _combine(self) -> None:
        try:
            self._exchange.combine(self._collector)
        finally:
            atexit.unregister(self._end)

    def _end(self) -> None:
        self._exchange.cancel(self._collector)
        self._thread.join()
