"""What a run is made of: what its host gives it, and what its own parts have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedcore.clock import Clock
from fedcore.config import RunConfig
from fedcore.events import (
    BestChanged,
    Event,
    SiteReported,
    VersionCommitted,
)
from fedcore.server.rounds.participation import Roster
from fedcore.server.rounds.rounds import Rounds
from fedcore.server.rounds.tasks import make_rounds
from fedcore.server.storage.store import Store, VersionRow
from fedcore.transport.ends import ServerEnd

from .access import Access
from .collecting import Collecting
from .declaring import Declaring
from .gates import Gates
from .guard import Guard
from .listeners import Listeners
from .log_lines import LogLines
from .outcome import Outcome
from .peers import Peers
from .replies import Replies
from .run_link import RunLink
from .status import StatusBuilder
from .timing import Timing
from .versions import Versions

__all__ = ["Parts", "Surroundings"]


@dataclass(frozen=True)
class Surroundings:
    """What a run has of its host.

    Attributes:
        link: how peers are reached.
        audience: the run's number at this host, from 1.
        access, replies, guard: who may say what, what is logged of it, and what follows where it is not allowed.
        chunks: the bytes that updates' chunks may take.
        device: where means are computed, in words.
        clock, timing: what deadlines and waits are measured with.
    """

    link: ServerEnd
    audience: int
    access: Access
    replies: Replies
    guard: Guard[Any]
    chunks: int
    device: str
    clock: Clock
    timing: Timing


class Parts:
    """The parts of a run that keep its state.

    Args:
        config, store: the run file, and the run folder, opened.
        around: what the host gives the run.
        put_out: refuses a site that has joined; gets its peer and name, a code and a text.

    Attributes:
        config, store: as given.
        link, access, replies, guard, clock, timing: as in `Surroundings`; the link is the run's own.
        versions: the models.
        collecting: the updates under way.
        peers: the sites that are there.
        outcome: what the run leaves behind.
        rounds: the plan, and how far it is.
        status: what is shown of the run.
        gates: what may pause it.
        listeners: who gets its events; the host closes them.
        declaring: what its sites have declared.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        around: Surroundings,
        put_out: Callable[[bytes, str, str, str], None],
    ) -> None:
        self.config, self.store = config, store
        self.link = RunLink(around.link, store.run_id, around.audience)
        self.access, self.replies, self.guard = around.access, around.replies, around.guard
        self.clock, self.timing = around.clock, around.timing
        self.versions = Versions(config, store, self.link.exchange, self.link.restrict)
        self.collecting = Collecting(config, store, self.versions, self.link, around.chunks)
        roster = Roster(config.participants.sites, config.participants.count)
        name = (config.run.name, store.run_id)
        self.peers = Peers(self.link, roster, self.replies, name)
        self.outcome = Outcome(config, store, roster)
        self.rounds: Rounds = make_rounds(
            config, roster, store.last_version, over=bool(self.outcome.early_end)
        )
        self.status = StatusBuilder(config, self.rounds, store, self.clock, self.collecting)
        self.gates = Gates(config, store, self.link.wake, self.clock.monotonic)
        self.listeners = Listeners(
            config.server.listeners,
            name,
            lambda: self.clock.wall().timestamp(),
            (self.status.on_event, LogLines(config, store.run_id, self.replies).on_event),
        )
        store.hold_back(self.link.outlet, self.listeners.outlet)
        store.taken = lambda: self.status.taken(self.link.stats())
        self.declaring = Declaring(
            config,
            self.link,
            (self.peers, put_out),
            (store, self.versions, self.collecting),
            self.report,
        )
        self.declaring.forget_revoked(self.access)

    # --- events ---

    def emit(self, event: Event) -> None:
        """Hand an event to the listeners."""
        self.listeners.emit(event)

    def report(self, site: str, message: str) -> None:
        """Hand out what is to be shown with a site."""
        self.emit(SiteReported(site=site, message=message, own=False))

    def emit_commit(self, row: VersionRow, collected: float = 0.0, source: str = "") -> None:
        """Hand out that a version exists."""
        assert self.versions.model is not None
        self.emit(
            VersionCommitted(
                version=row.version,
                participants=dict(row.participants),
                seconds=row.seconds,
                collect_seconds=collected,
                nbytes=row.nbytes,
                tensors=len(self.versions.model.layout.tensors),
                source=source,
            )
        )

    def emit_best(self, before: int | None) -> None:
        """Hand out which version is the best one, if it was another one before."""
        best = self.outcome.best
        if best is not None and best != before:
            metric, value = self.config.selection.metric, self.outcome.score(best)
            worse = tuple(self.outcome.worse_at(best))
            self.emit(BestChanged(version=best, metric=metric, value=value, worse_at=worse))
