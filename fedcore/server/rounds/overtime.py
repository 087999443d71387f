"""How long a site may still send after a round's deadline: a deadline is a deadline, though not to the byte.

Each site that is pulled then has `ALLOWANCE_SECONDS`. They run out while chunks that it was asked for are
missing, and each chunk that comes gives `CHUNK_SECONDS` back. So a site that sends less than a chunk of the model
each second is left out after some seconds, and one that sends more is waited for. A round lasts beyond its
deadline by at most the allowance, and a second for each chunk that is still to come. Where more than
`SITES_AT_ONCE` are pulled, they share the server's line: all of these times are longer in proportion.
Sans I/O: the clock comes in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

__all__ = ["ALLOWANCE_SECONDS", "CHUNK_SECONDS", "SITES_AT_ONCE", "Overtime"]

ALLOWANCE_SECONDS: Final = 10.0
"""How long chunks of a site may be missing after the deadline; the most that it has at a time, too."""
CHUNK_SECONDS: Final = 1.0
"""What a chunk gives back."""
SITES_AT_ONCE: Final = 16
"""So many sites can be pulled at a chunk a second each: 134 Mbit/s."""


class Overtime:
    """The time that is left to each site."""

    def __init__(self) -> None:
        self._left: dict[str, float] = {}
        self._received: dict[str, int] = {}
        self._looked: float | None = None

    def reset(self) -> None:
        """Begin anew with the next deadline."""
        self._left.clear()
        self._received.clear()
        self._looked = None

    def look(self, now: float, pulls: Mapping[str, tuple[int, int]]) -> list[str]:
        """Return which sites are too slow.

        Args:
            now: the clock, in seconds; the first look is at the deadline.
            pulls: of each site, how many chunks it was asked for that have not come, and how many came so far.
        """
        passed = 0.0 if self._looked is None else now - self._looked
        self._looked = now
        shared = max(1.0, sum(bool(missing) for missing, _ in pulls.values()) / SITES_AT_ONCE)
        allowance = shared * ALLOWANCE_SECONDS
        slow = []
        for site, (missing, received) in sorted(pulls.items()):
            left = self._left.get(site, allowance)
            if missing:
                left -= passed
            came = received - self._received.get(site, received)
            self._received[site] = received
            self._left[site] = left = min(allowance, left + shared * CHUNK_SECONDS * came)
            if left <= 0:
                slow.append(site)
        return slow
