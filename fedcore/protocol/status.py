"""What `fedcore status` and an operator's commands say and get; none of them needs a `Join`."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from .base import Message, OfRun, Part
from .fields import MetricName, Metrics, Round, SiteName, Steer, Text

ENDED: Final = ("done", "stopped", "failed")
"""The phases of a run that is over."""


class StatusRequest(OfRun):
    """Asked by ``fedcore status``; needs no `Join`. Where a server has several runs, ``run_id`` says which."""

    type: Literal["status-request"] = "status-request"


class MetricsRequest(OfRun):
    """Asked by ``fedcore status --metrics``; needs no `Join`. ``after``: what `MetricsReply.last` said, or 0."""

    type: Literal["metrics-request"] = "metrics-request"
    after: Annotated[int, Field(ge=0, lt=1 << 53)] = 0


class Command(OfRun):
    """An operator steers the run; needs no `Join`. ``"pause"``: begin no round after the one under way."""

    type: Literal["command"] = "command"
    action: Steer


class CommandReply(OfRun):
    """Answer to `Command`: whether it is carried out, and what that means or why not."""

    type: Literal["command-reply"] = "command-reply"
    ok: bool
    message: Text


class SiteStatus(Part):
    """One site's line in a `StatusReply`.

    ``score`` is its value of the metric that selects, of the last model that it has scored; ``best_score``, of the
    best model.
    """

    site: SiteName
    state: Literal[
        "absent", "joined", "training", "uploading", "delivered", "lost", "dropped", "left"
    ]
    examples: int | None = None
    metrics: Metrics = {}
    message: Text = ""
    score: float | None = None
    best_score: float | None = None


class UpdateStatus(Part):
    """What a rule of several passes made of a site's update: its weight, 0 if it is left out, and its score."""

    site: SiteName
    weight: Annotated[int, Field(ge=0, lt=1 << 63)]
    score: Annotated[float, Field(allow_inf_nan=True)]


class FactorsStatus(Part):
    """How far the mean of adapters' factors lay from the mean of their products, in the round of a version.

    ``modules`` of the adapter's ``of`` modules were measured. ``of_norm``: the error as a part of the mean of the
    products, of all together; ``of_change``: as a part of what the round changed. Where products are combined, the
    mean of the factors would have been off so much; ``cut`` is the part of the result that its ``rank`` left out.
    ``worst`` is the module with the greatest error for its norm.
    """

    modules: int
    of: int
    of_norm: float | None = None
    of_change: float | None = None
    cut: float | None = None
    rank: int | None = None
    worst: Text = ""
    worst_of_norm: float | None = None


class VersionStatus(Part):
    """One global model in a `StatusReply`: its weighted validation metrics and who is in it.

    Of a rule of several passes it has what became of each update, too, and what a score is.
    ``worse_at``: the sites at which it is worse than the best model before it, if it is the better one.
    """

    version: Round
    metrics: Metrics = {}
    scored: int = 0
    participants: list[SiteName] = []
    worse_at: list[SiteName] = []
    seconds: float | None = None
    bytes: int = 0
    updates: list[UpdateStatus] = []
    measure: Text = ""
    factors: FactorsStatus | None = None


class MetricSeries(Part):
    """The kept points of one training metric of one site: number, round, step, seconds since 1970, value."""

    site: SiteName
    name: MetricName
    points: list[tuple[int, Round, int | None, float, Annotated[float, Field(allow_inf_nan=True)]]]


class MetricsReply(OfRun):
    """Some series of a run. ``last`` is 0 if they are the last ones; else it is asked for what comes after it."""

    type: Literal["metrics-reply"] = "metrics-reply"
    after: int
    last: int
    series: list[MetricSeries]


class StatusReply(Message):
    """A snapshot of the run, as ``fedcore status`` and the live views show it."""

    type: Literal["status-reply"] = "status-reply"
    run: Text
    phase: Literal[
        "waiting",
        "initial",
        "training",
        "aggregating",
        "evaluating",
        "paused",
        "done",
        "stopped",
        "failed",
    ]
    round: Round
    rounds: Round
    metric: Text | None
    mode: Literal["min", "max"] | None
    best_version: Round | None = None
    model_bytes: int = 0
    chunks_done: int = 0
    chunks: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    elapsed: float = 0.0
    eta: float | None = None
    sites: list[SiteStatus] = []
    versions: list[VersionStatus] = []
    message: Text = ""
