"""Who trains in a round where not all sites do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from .participation import Member, Roster

__all__ = ["Sample"]

_SETTLE_SECONDS: Final = 30.0  # after the first site has joined, for the others to join too


class Sample:
    """The sites that train in the round under way.

    The order of choice is a hash of seed, round and name: it does not depend on who came first.

    Args:
        size: how many they are; all sites if None.
        seed: of the choice.
    """

    def __init__(self, size: int | None, seed: int) -> None:
        self.size = size
        self.chosen: set[str] = set()
        self._seed = seed
        self._first_joined: float | None = None

    def joined(self, now: float) -> None:
        """A site has joined; the first choice waits for the others from the first one on."""
        if self._first_joined is None:
            self._first_joined = now

    def begin(self, chosen: Iterable[str] = ()) -> None:
        """Another round begins, for which these are chosen already."""
        self.chosen = set(chosen)

    def includes(self, member: Member) -> bool:
        """Whether a site trains in this round."""
        return self.size is None or member.name in self.chosen

    def choose(self, roster: Roster, round_: int, now: float) -> list[Member]:
        """Choose who trains in this round, or who takes the place of a chosen site that was lost.

        The first choice waits for all sites, or for ``_SETTLE_SECONDS`` and enough of them.
        """
        if self.size is None:
            return []
        free = [m for m in roster if m.alive and m.name not in self.chosen]
        if not self.chosen:
            complete = roster.missing == 0 and not any(m.returning for m in roster)
            began = now if self._first_joined is None else self._first_joined
            if not complete and now < began + _SETTLE_SECONDS:
                return []
            if len(free) < self.size and not complete:
                return []
        standing = sum(m.alive or m.returning for m in roster if m.name in self.chosen)
        free.sort(key=lambda m: hashlib.sha256(f"{self._seed}/{round_}/{m.name}".encode()).digest())
        found = free[: max(0, self.size - standing)]
        self.chosen.update(member.name for member in found)
        return found
