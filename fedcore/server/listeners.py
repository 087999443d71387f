"""Hands the events of a run to listeners, which can neither delay nor disturb it."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from fedcore.events import Event, Listener
from fedcore.outlet import Outlet
from fedcore.protocol import shown
from fedcore.words import plural

from .loading import describe, load_function

__all__ = ["MOST_WAITING", "Listeners"]

MOST_WAITING: Final = 1024
"""Events that wait for one listener; beyond it the oldest is dropped."""

_MOST_TEXT: Final = 500

logger = logging.getLogger("fedcore.server")


class _Worker:
    """One listener with its thread, and the events that wait for it."""

    def __init__(self, name: str, listener: Listener) -> None:
        self._name = name
        self._listener = listener
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._dropped = 0
        self._slow = False
        self._failed = False
        self._thread: threading.Thread | None = None

    def give(self, event: Event) -> None:
        with self._changed:
            if self._thread is None and not self._start():
                self._dropped += 1
                return
            if len(self._waiting) >= MOST_WAITING:
                self._waiting.popleft()
                self._dropped += 1
                if not self._slow:
                    logger.warning("listener %s is slow: it misses events of the run", self._name)
                self._slow = True
            self._waiting.append(event)
            self._changed.notify()

    def _start(self) -> bool:
        """Start the thread, and say so once where the system refuses one; the next event tries again."""
        run = contextvars.copy_context().run  # its log lines are those of the run
        thread = threading.Thread(
            target=run, args=(self._work,), name=f"fedcore listener {self._name}", daemon=True
        )
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            if self._dropped == 0:
                logger.warning(
                    "listener %s misses events of the run: its thread can't start: %s",
                    self._name, describe(error),
                )  # fmt: skip
            return False
        self._thread = thread
        return True

    def close(self, until: float) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(max(0.0, until - time.monotonic()))
        with self._changed:
            missed = self._dropped + len(self._waiting)
        if missed:
            logger.warning("listener %s has missed %s", self._name, plural(missed, "event"))

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                event = self._waiting.popleft()
            try:
                self._listener(event)
            except BaseException as error:  # even one that would end the process: the run goes on
                if not self._failed:
                    logger.warning(
                        "listener %s fails: %s (said once)", self._name,
                        shown(describe(error), _MOST_TEXT), exc_info=logger.isEnabledFor(logging.DEBUG),
                    )  # fmt: skip
                self._failed = True


class Listeners:
    """The listeners of one run. `emit` and `close` belong to the server's thread.

    Each has a thread of its own, which begins with the first event. `emit` never waits.

    Args:
        names: the listeners as the run file has them.
        run: name and id of the run.
        wall: gives the time, in seconds since the epoch.
        views: parts of the server itself that are called within `emit`; they are quick and raise nothing.

    Attributes:
        outlet: the way of events to the threads: while it is held, they wait.

    Raises:
        ConfigError: a listener can't be loaded; it is named.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: tuple[str, str] = ("", ""),
        wall: Callable[[], float] = time.time,
        views: Sequence[Listener] = (),
    ) -> None:
        self._workers = [_Worker(name, load_function(name, "server.listeners")) for name in names]
        self._wall = wall
        self._views = tuple(views)
        self._run = run
        self.outlet = Outlet(self._give)

    def emit(self, event: Event) -> None:
        """Hand an event to all listeners."""
        for view in self._views:
            view(event)
        if self._workers:
            run, run_id = self._run
            self.outlet.put(replace(event, run=run, run_id=run_id, time=self._wall()))

    def _give(self, event: Event) -> None:
        for worker in self._workers:
            worker.give(event)

    def close(self, seconds: float) -> None:
        """Wait so long at most until the listeners have had what waits for them; no event may follow."""
        until = time.monotonic() + seconds
        for worker in self._workers:
            worker.close(until)
