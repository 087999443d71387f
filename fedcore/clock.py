"""The clock that a server runs on: the system's, or one that a test sets."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

__all__ = ["SYSTEM", "Clock", "ManualClock", "SystemClock", "milliseconds"]


class Clock(Protocol):
    """What tells the time. Deadlines and rate limits use `monotonic`; `wall` is shown, and decides nothing."""

    def monotonic(self) -> float:
        """Return seconds that never run backwards, from any start."""

    def wall(self) -> datetime:
        """Return the time of day, with its zone."""


def milliseconds(clock: Clock) -> int:
    """Return a clock's monotonic time as the core counts it."""
    return int(clock.monotonic() * 1000)


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        """Return the system's monotonic time in seconds."""
        return time.monotonic()

    def wall(self) -> datetime:
        """Return the system's time in UTC."""
        return datetime.now(UTC)


SYSTEM: Final = SystemClock()


class ManualClock:
    """A clock that stands still until it is moved; for tests.

    Args:
        now: where `monotonic` begins, in seconds.
        wall: where `wall` begins.
    """

    def __init__(self, now: float = 1000.0, wall: datetime | None = None) -> None:
        self._start = self._now = now
        self._wall = wall or datetime(2026, 1, 1, tzinfo=UTC)

    def monotonic(self) -> float:
        """Return the seconds that it was set to."""
        return self._now

    def wall(self) -> datetime:
        """Return its first time of day plus the seconds since."""
        return self._wall + timedelta(seconds=self._now - self._start)

    def advance(self, seconds: float) -> None:
        """Move both times forward.

        Raises:
            ValueError: ``seconds`` is negative.
        """
        if seconds < 0:
            raise ValueError(f"a clock does not run backwards: {seconds} s")
        self._now += seconds
