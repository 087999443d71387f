"""For how long the sites that have never joined are waited for."""

from __future__ import annotations

import math

__all__ = ["JoinWait"]


class JoinWait:
    """Counted once, from the run's first task; no I/O, the clock is the caller's.

    Attributes:
        until: the time at which it ends, or None before the first task.
        over: whether a site that has never joined is not waited for any more; it may join all the same.
    """

    def __init__(self, seconds: float = math.inf, *, over: bool = False) -> None:
        self._seconds = seconds
        self.until: float | None = None
        self.over = over

    def start(self, now: float) -> None:
        """A site was given a task; only the first one counts."""
        if self.until is None:
            self.until = now + self._seconds

    def end(self) -> None:
        """Wait no longer, as after the deadline of a round."""
        self.over = True

    def ends(self, now: float) -> bool:
        """Whether it ends now: true once."""
        if self.over or self.until is None or now < self.until:
            return False
        self.over = True
        return True
