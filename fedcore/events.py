"""What happens in a run, as objects for listeners: trackers, pages, log lines.

A listener is a function of one event. ``server.listeners`` of a run file names it::

    from fedcore import events

    def listener(event: events.Event) -> None:
        if isinstance(event, events.VersionCommitted):
            print(f"{event.run}: version {event.version} of {', '.join(event.participants)}")

An event is handed out after the run's journal has it, where the journal keeps it; each class says so. It changes
nothing: what a listener does, raises or misses has no effect on the run. After a crash some events come again, and
the last ones before it may never come: what has to be complete is read from the run folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

__all__ = [
    "AnswerReceived",
    "BestChanged",
    "Event",
    "FactorsMeasured",
    "Listener",
    "MetricsLogged",
    "RoundStarted",
    "RunEnded",
    "RunStarted",
    "ScoreReceived",
    "ServerStopped",
    "SiteJoined",
    "SiteLost",
    "SiteReported",
    "SitesChosen",
    "UpdateReady",
    "UpdateRefused",
    "UpdatesJudged",
    "VersionCommitted",
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events.

    Attributes:
        run: name of the run.
        run_id: random id of the run; another one after ``fedcore rollback``.
        time: when the event was handed out, in seconds since the epoch.
    """

    run: str = field(default="", compare=False)
    run_id: str = field(default="", compare=False)
    time: float = field(default=0.0, compare=False)


@dataclass(frozen=True, kw_only=True)
class RunStarted(Event):
    """A server works on the run from now on: the first one, or another one after it. Not in the journal.

    Attributes:
        version: the last committed version; None before the first.
        rounds: how many rounds the run has.
    """

    version: int | None
    rounds: int


@dataclass(frozen=True, kw_only=True)
class SiteJoined(Event):
    """A site has joined, or is back. In the journal."""

    site: str


@dataclass(frozen=True, kw_only=True)
class SiteLost(Event):
    """A site is not there any more, or is not waited for any more. Not in the journal.

    Attributes:
        how: ``"left"``: it left in order; ``"removed"``: the server refused it, or its key was revoked;
            ``"lost"``: nothing came from it any more.
    """

    site: str
    reason: str
    how: Literal["left", "removed", "lost"]


@dataclass(frozen=True, kw_only=True)
class SiteReported(Event):
    """There is something to know about a site: its own words, or what the server found. Not in the journal.

    Attributes:
        message: what the site reports, or words that go on after its name; empty if it is over.
        own: these are the site's words; else the server found it.
    """

    site: str
    message: str
    own: bool


@dataclass(frozen=True, kw_only=True)
class SitesChosen(Event):
    """These sites train in a round in which not all do. In the journal.

    A site that is lost may be replaced: then the event comes again for the same round.
    """

    round: int
    sites: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RoundStarted(Event):
    """The first task of a round was sent. Not in the journal: a server that is started again begins it once more.

    Attributes:
        round: 0 for the initial model, else from 1.
    """

    round: int


@dataclass(frozen=True, kw_only=True)
class UpdateReady(Event):
    """A site has finished its training of a round, and its update can be pulled. Not in the journal.

    Attributes:
        examples: the number of training examples, as the site gives it.
    """

    site: str
    round: int
    examples: int


@dataclass(frozen=True, kw_only=True)
class UpdateRefused(Event):
    """An update does not count: it holds NaN or infinity, or came too slowly. Not in the journal."""

    site: str
    round: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class UpdatesJudged(Event):
    """A rule of several passes has decided what each update of a round weighs. In the journal.

    A site that is lost may change it: then the event comes again for the same round.

    Attributes:
        weights: of the updates that count, by site.
        scores: of all updates; less is better.
        measure: what a score is, in a phrase.
        base: what the model weighs that the updates start from.
    """

    round: int
    weights: Mapping[str, int]
    scores: Mapping[str, float]
    measure: str
    base: int


@dataclass(frozen=True, kw_only=True)
class FactorsMeasured(Event):
    """It was measured how far the mean of adapters' factors lies from that of their products. In the journal.

    Attributes:
        round: whose updates they are.
        modules, of: how many modules were measured, of how many.
        of_norm, of_change: the error of all together, as a part of the mean of the products and of what the round
            changed; None: not known.
        cut, rank: of the result, what its rank left out as a part of it, where products are combined.
        worst, worst_of_norm: the module with the greatest error for its norm.
    """

    round: int
    modules: int
    of: int
    of_norm: float | None
    of_change: float | None
    cut: float | None
    rank: int | None
    worst: str
    worst_of_norm: float | None


@dataclass(frozen=True, kw_only=True)
class ScoreReceived(Event):
    """A site has scored a version. In the journal.

    Attributes:
        metrics: values by name; they may be NaN or infinite.
        examples: the number of examples behind them.
    """

    site: str
    version: int
    metrics: Mapping[str, float]
    examples: int


@dataclass(frozen=True, kw_only=True)
class AnswerReceived(Event):
    """A site has answered an inference task. The journal has the values.

    Attributes:
        outputs: the names of what it answered.
    """

    site: str
    version: int
    examples: int
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class VersionCommitted(Event):
    """A version exists. In the journal.

    Attributes:
        version: 0 for the initial model, else the round that made it.
        participants: the effective weight of each site in it, in canonical order; of version 0 none.
        seconds: from the round's first task to the commit; collect_seconds: of these, to pull and combine.
        nbytes, tensors: size of the model.
        source: of version 0, the site whose model it is; empty if it is the run file's.
    """

    version: int
    participants: Mapping[str, float]
    seconds: float
    collect_seconds: float
    nbytes: int
    tensors: int
    source: str


@dataclass(frozen=True, kw_only=True)
class BestChanged(Event):
    """Another version leads, and ``best/`` holds it. It follows from the scores in the journal.

    Attributes:
        metric, value: what selected it; None where no metric selects, or no score is known.
        worse_at: the sites at which it is worse than the best version before it.
    """

    version: int
    metric: str | None
    value: float | None
    worse_at: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MetricsLogged(Event):
    """A site has reported training metrics. The journal has the kept points of them a second later.

    Attributes:
        step: None for the metrics that came with an update.
    """

    site: str
    round: int
    step: int | None
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class RunEnded(Event):
    """The run is over: the last event. In the journal.

    Attributes:
        outcome: as in ``summary.json``.
        message: why it ended, if not as planned.
        version: the last version; best_version: the selected one; None where nothing was committed.
        best: the folder with the selected model.
        metric, value: what selected it; None where no metric selects, or no score is known.
    """

    outcome: Literal["complete", "stopped", "failed"]
    message: str
    version: int | None
    best_version: int | None
    best: str | None
    metric: str | None
    value: float | None


@dataclass(frozen=True, kw_only=True)
class ServerStopped(Event):
    """The server ends before the run does: the last event of its process, but none after ``kill -9``. Not in the
    journal.

    Attributes:
        failed: an error ended it; else a signal did.
    """

    reason: str
    failed: bool


Listener: TypeAlias = Callable[[Event], object]
"""What is called with each event, one after the other, on a thread of its own."""
