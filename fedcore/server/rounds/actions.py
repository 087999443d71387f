"""What the round state machine asks of the process around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "Action",
    "Choose",
    "Commit",
    "EndRun",
    "GiveUp",
    "HoldCollect",
    "Participant",
    "PullAhead",
    "SendDropped",
    "SendTask",
    "StartCollect",
]


@dataclass(frozen=True)
class Participant:
    """A site whose update a round's aggregate holds."""

    site: str
    set_id: str
    weight: int


@dataclass(frozen=True)
class Choose:
    """Write down who trains in a round, all of them; the tasks follow, so that a restart finds the same choice."""

    round: int
    sites: tuple[str, ...]


@dataclass(frozen=True)
class SendTask:
    """Give a site its task."""

    site: str
    kind: Literal["initial", "train", "submit", "evaluate", "infer"]
    round: int

    @property
    def version(self) -> int:
        """The model that the task is about: what is trained is that of the round before."""
        if self.kind == "submit":
            return 0
        return self.round - 1 if self.kind == "train" else self.round


@dataclass(frozen=True)
class SendDropped:
    """Tell a site that its update does not count."""

    site: str
    round: int
    message: str


@dataclass(frozen=True)
class GiveUp:
    """Say that a site is no longer waited for."""

    site: str
    message: str


@dataclass(frozen=True)
class PullAhead:
    """Pull a site's update for model ``version`` while others still train."""

    version: int
    participant: Participant


@dataclass(frozen=True)
class StartCollect:
    """Pull and reduce the participants' updates into model ``version``; they are in canonical order."""

    version: int
    participants: tuple[Participant, ...]


@dataclass(frozen=True)
class HoldCollect:
    """Stop pulling; nothing of it counts."""


@dataclass(frozen=True)
class Commit:
    """Make the collected model ``version`` durable, then call `Rounds.committed`."""

    version: int
    participants: tuple[Participant, ...]


@dataclass(frozen=True)
class EndRun:
    """The run is over, or is given up."""

    ok: bool
    message: str


Action = (
    Choose
    | SendTask
    | SendDropped
    | GiveUp
    | PullAhead
    | StartCollect
    | HoldCollect
    | Commit
    | EndRun
)
