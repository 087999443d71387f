"""So many at once, so many a second: what bounds whatever a peer can ask for again and again."""

from __future__ import annotations

__all__ = ["TokenBucket"]


class TokenBucket:
    """A bucket of ``burst`` that fills up again at ``per_second``; ``now`` is in seconds of any one clock."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, burst: float, per_second: float, now: float) -> None:
        self._burst, self._rate = burst, per_second
        self._left, self._at = burst, now

    def take(self, now: float) -> bool:
        """Take one; False, and nothing is taken, if there is none."""
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def owe(self, cost: float) -> None:
        """Take what may be more than there is: nothing is left until it has filled up again."""
        self._left -= cost
