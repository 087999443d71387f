"""The run as `fedcore status` and the live views show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from fedcore import protocol
from fedcore.clock import Clock
from fedcore.config import RunConfig
from fedcore.events import (
    BestChanged,
    Event,
    MetricsLogged,
    RunEnded,
    ScoreReceived,
    SiteReported,
    UpdateReady,
    VersionCommitted,
)
from fedcore.server.rounds.rounds import Rounds
from fedcore.server.rounds.selection import Pooling, SiteScore, pooled_metrics, site_scores
from fedcore.server.storage.history import Life, version_status
from fedcore.server.storage.store import Store

from .collecting import Collecting
from .ranking import worse_sites

__all__ = ["StatusBuilder", "Watchers", "merge_metrics", "within_a_message"]


# Of a long run only the latest versions are shown; the run folder has all of them.
_MAX_VERSIONS: Final = 200
_MAX_WATCHERS: Final = 64
WATCHER_SECONDS: Final = 5.0
_MAX_SITES: Final = 1000
"""Of so many that they fill a message, these are shown; fewer if they say much."""


def merge_metrics(known: dict[str, float], news: Mapping[str, float]) -> None:
    """Put new values into a site's metrics, of which there are never more than a message holds."""
    for name, value in news.items():
        if name in known or len(known) < protocol.MAX_METRICS:
            known[name] = value


def within_a_message(reply: protocol.StatusReply) -> tuple[protocol.StatusReply, int]:
    """Return a snapshot that one message holds, and its bytes: of many sites and rounds, the last round and the
    first sites."""
    sites, versions = reply.sites, reply.versions
    while (
        size := len(reply.model_dump_json(exclude=reply.left_out()).encode())
    ) > protocol.MAX_CONTROL_BYTES:
        if versions is reply.versions and len(versions) > 1:
            versions, sites = versions[-1:], sites[:_MAX_SITES]
        else:
            versions = [version.model_copy(update={"participants": []}) for version in versions]
            sites = sites[: len(sites) // 2]
        reply = reply.model_copy(update={"sites": sites, "versions": versions})
    return reply, size


class Watchers:
    """Who looks on again and again: they are answered once more when the run is over."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._asked: dict[bytes, float] = {}

    def note(self, peer: bytes) -> None:
        """Note that a peer has asked."""
        if peer in self._asked or len(self._asked) < _MAX_WATCHERS:
            self._asked[peer] = self._clock.monotonic()

    def forget(self, peer: bytes) -> None:
        """Note that a peer knows of the end."""
        self._asked.pop(peer, None)

    @property
    def present(self) -> bool:
        """Whether a peer that asked a moment ago does not know of the end yet."""
        now = self._clock.monotonic()
        self._asked = {p: at for p, at in self._asked.items() if now - at < WATCHER_SECONDS}
        return bool(self._asked)


class StatusBuilder:
    """Gathers what a `StatusReply` shows, from the run's events and its store; nothing decides by it."""

    def __init__(
        self, config: RunConfig, rounds: Rounds, store: Store, clock: Clock, collecting: Collecting
    ) -> None:
        self._clock = clock
        self._config = config
        self._rounds = rounds
        self._store = store
        self._started = self._clock.monotonic()
        self._before = store.life
        self._ended: float | None = None
        self.began = self._before.started or clock.wall().isoformat(timespec="seconds")
        self._versions: list[protocol.VersionStatus] | None = None
        self._first_version = rounds.version or 0
        self._messages: dict[str, str] = {}
        self._metrics: dict[str, dict[str, float]] = {}
        self._examples: dict[str, int] = {}
        self._collecting = collecting
        self._best: int | None = None
        self._scores: Mapping[int, Sequence[SiteScore]] = {}

    def on_event(self, event: Event) -> None:
        """Show what an event says."""
        if isinstance(event, MetricsLogged):
            merge_metrics(self._metrics.setdefault(event.site, {}), event.metrics)
        elif isinstance(event, UpdateReady):
            self._examples[event.site] = event.examples
        elif isinstance(event, SiteReported):
            self._messages[event.site] = event.message
        elif isinstance(event, ScoreReceived | VersionCommitted):
            self._versions = None  # they are read again when they are next shown
        elif isinstance(event, BestChanged):
            self._best = event.version
        elif isinstance(event, RunEnded):
            self._best = event.best_version

    def taken(self, stats: Mapping[str, int]) -> Life:
        """Return what the run has taken up to now, over all servers that worked on it."""
        if self._rounds.over and self._ended is None:
            self._ended = self._clock.monotonic()
        now = self._clock.monotonic() if self._ended is None else self._ended
        return Life(
            self.began,
            self._before.seconds + now - self._started,
            self._before.bytes_in + stats["bytes_in"],
            self._before.bytes_out + stats["bytes_out"],
        )

    def build(self, stats: Mapping[str, int], message: str) -> protocol.StatusReply:
        """Return a snapshot; ``stats`` are the data plane's counters."""
        rounds, chosen = self._rounds, self._config.selection
        life = self.taken(stats)
        running = self._collecting.running
        reduced, chunks = (
            (0, 0) if running is None or running.open else running.collector.progress()[:2]
        )
        versions = self._read_versions()
        last, best = site_scores(self._scores, chosen.metric, self._best)
        return protocol.StatusReply(
            run=self._config.run.name,
            phase="paused" if rounds.paused and not rounds.over else rounds.phase.value,
            round=rounds.round,
            rounds=rounds.rounds,
            metric=chosen.metric,
            mode=chosen.mode,
            best_version=self._best,
            model_bytes=versions[-1].bytes if versions else 0,
            chunks_done=reduced,
            chunks=chunks,
            bytes_in=life.bytes_in,
            bytes_out=life.bytes_out,
            elapsed=life.seconds,
            eta=self._eta(versions),
            sites=[
                protocol.SiteStatus(
                    site=member.name,
                    state=member.state.value,
                    examples=self._examples.get(member.name),
                    metrics=dict(self._metrics.get(member.name, {})),
                    message=(member.message or self._messages.get(member.name, ""))[:4096],
                    score=last.get(member.name),
                    best_score=best.get(member.name),
                )
                for member in rounds.roster
            ],
            versions=versions,
            message=message[:4096],
        )

    def _read_versions(self) -> list[protocol.VersionStatus]:
        if self._versions is None:
            scores, chosen = self._store.scores(), self._config.selection
            pooling = Pooling.of_settings(chosen.average, chosen.max_share)
            worse = worse_sites(self._config, scores)
            self._scores = scores
            self._versions = [
                version_status(
                    row,
                    protocol.first_metrics(
                        pooled_metrics(scores.get(row.version, []), pooling), chosen.metric
                    ),
                    len(scores.get(row.version, [])),
                    worse.get(row.version, []),
                )
                for row in self._store.versions()[-_MAX_VERSIONS:]
            ]
        return self._versions

    def _eta(self, versions: list[protocol.VersionStatus]) -> float | None:
        """Return the seconds left, from the mean of the rounds of this process; None before the first."""
        done = [v.seconds or 0.0 for v in versions if v.version > self._first_version]
        if self._rounds.over:
            return 0.0
        if not done or self._rounds.paused:
            return None
        return (self._rounds.rounds - versions[-1].version) * sum(done) / len(done)
