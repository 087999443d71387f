"""Who takes part: the members of a run and what each of them is doing.

Pure bookkeeping without I/O or a clock; `fedcore.server.rounds.rounds` decides what follows from it.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from fedcore.words import plural

__all__ = ["Delivery", "Member", "Roster", "SiteState"]


class SiteState(enum.StrEnum):
    """What a site is doing, as the status shows it."""

    ABSENT = "absent"
    JOINED = "joined"
    TRAINING = "training"
    UPLOADING = "uploading"
    DELIVERED = "delivered"
    LOST = "lost"
    DROPPED = "dropped"
    LEFT = "left"


@dataclass(frozen=True)
class Delivery:
    """An update that a site has published: its set id (hex) and the number of training examples."""

    set_id: str
    weight: int


@dataclass
class Member:
    """One site of the run.

    Attributes:
        delivery: its update for the round under way, once announced.
        counted: its update that the last version holds.
        dropped_round: the last round that this site was taken out of, or -1.
        declared: whether it has shown a model with the run's layout.
        returning: whether it was there before the server was started again and is still waited for.
        unfit: why the initial model that its process gave is not usable; empty if it gave none.
        message: the last notice about it.
    """

    name: str
    state: SiteState = SiteState.ABSENT
    instance: str = ""
    declared: bool = False
    returning: bool = False
    delivery: Delivery | None = None
    counted: Delivery | None = None
    dropped_round: int = -1
    unfit: str = ""
    message: str = ""
    scored: set[int] = field(default_factory=set)

    @property
    def alive(self) -> bool:
        """Whether its process is there."""
        return self.state not in (SiteState.ABSENT, SiteState.LOST, SiteState.LEFT)


class Roster:
    """The members, by name: the listed sites, or the first ``count`` that join."""

    def __init__(self, sites: Sequence[str] | None, count: int | None) -> None:
        self._listed = sites is not None
        self._members = {name: Member(name) for name in sites or ()}
        self._ordered: list[Member] = []
        self.expected = len(self._members) if sites is not None else (count or 0)

    def __iter__(self) -> Iterator[Member]:
        """Iterate in canonical order: by name."""
        if len(self._ordered) != len(self._members):
            self._ordered = sorted(self._members.values(), key=lambda member: member.name)
        return iter(self._ordered)

    def get(self, name: str) -> Member | None:
        """Return a member, or None for an unknown site."""
        return self._members.get(name)

    def refusal(self, name: str) -> str | None:
        """Return why ``name`` may not take part, or None if it may."""
        if name in self._members or (not self._listed and len(self._members) < self.expected):
            return None
        if self._listed:
            return f"no site {name!r} in this run; it lists {', '.join(sorted(self._members))}"
        return f"this run has its {plural(self.expected, 'site')} already: {', '.join(sorted(self._members))}"

    def admit(self, name: str, instance: str) -> Member:
        """Add a site, or return the member that it is; its process is ``instance`` from now on."""
        member = self._members.setdefault(name, Member(name))
        if member.instance != instance:
            member.declared = False
            member.delivery = None
            member.unfit = ""
        member.instance = instance
        return member

    def expect_back(self, names: Iterable[str]) -> None:
        """Note who had joined before the server was started again; a place that a name had is still its own."""
        for name in names:
            if self.refusal(name) is None:
                member = self._members.setdefault(name, Member(name))
                member.returning = True
                member.message = "awaited: it was there before the server was started again"

    @property
    def missing(self) -> int:
        """How many expected sites have never joined."""
        present = sum(member.state is not SiteState.ABSENT for member in self)
        return self.expected - present
