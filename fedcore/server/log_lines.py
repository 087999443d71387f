"""What happens in a run, as lines of the server's log: a listener like any other.

Only the lines that follow from one event are written here. What a part of the server has to say of itself, such as
a disk that is full, it says where it is noticed.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import Final

from fedcore import __version__
from fedcore.config import RunConfig
from fedcore.events import (
    AnswerReceived,
    BestChanged,
    Event,
    FactorsMeasured,
    RunEnded,
    RunStarted,
    ServerStopped,
    SiteJoined,
    SiteLost,
    SiteReported,
    UpdateRefused,
    UpdatesJudged,
    VersionCommitted,
)
from fedcore.words import plural

from .replies import Replies

__all__ = ["LogLines"]

logger: Final = logging.getLogger("fedcore.server")
_MOST_NAMED: Final = 16


class LogLines:
    """Writes the log lines of one run.

    Args:
        config: the run file.
        run_id: id of the run.
        replies: limits the lines that a site can bring about.
    """

    def __init__(self, config: RunConfig, run_id: str, replies: Replies) -> None:
        self._config = config
        self._run_id = run_id
        self._replies = replies
        self._rounds = config.run.rounds
        self._best: int | None = None

    def on_event(self, event: Event) -> None:
        """Write what an event says, if anything."""
        if isinstance(event, SiteJoined | SiteLost | SiteReported | UpdateRefused | AnswerReceived):
            self._on_site(event)
        elif isinstance(event, RunStarted):
            self._on_start(event)
        elif isinstance(event, VersionCommitted):
            self._on_commit(event)
        elif isinstance(event, FactorsMeasured):
            logger.info("%s", _off(event, exact=self._config.aggregation.lora == "exact"))
        elif isinstance(event, UpdatesJudged):
            self._on_judged(event)
        elif isinstance(event, BestChanged):
            if event.value is not None and (self._best is not None or event.version):
                worse = f"; it is worse at {', '.join(event.worse_at)}" if event.worse_at else ""
                text = f"{_metric(event)}{worse}"
                logger.info("best model so far: round %d (%s)", event.version, text)
            self._best = event.version
        elif isinstance(event, RunEnded):
            self._on_end(event)
        elif isinstance(event, ServerStopped) and event.failed:
            logger.error("stopped: %s", event.reason)
        elif isinstance(event, ServerStopped):
            logger.warning("%s", event.reason)

    def _on_site(
        self, event: SiteJoined | SiteLost | SiteReported | UpdateRefused | AnswerReceived
    ) -> None:
        if isinstance(event, SiteJoined):
            self._replies.tell(event.site, "%s joined", level=logging.INFO)
        elif isinstance(event, SiteReported):
            if event.message:
                text = "%s reports: %s" if event.own else "%s %s"
                self._replies.tell(event.site, text, event.message)
        elif isinstance(event, AnswerReceived):
            outputs = ", ".join(event.outputs)
            self._replies.tell(event.site, "%s answered: %s", outputs, level=logging.INFO)
        elif isinstance(event, UpdateRefused):
            text = "the update of %s is left out of round %d: %s"
            if event.round == 0:
                logger.warning(
                    "the initial model of %s is not usable: %s", event.site, event.reason
                )
            else:
                logger.warning(text, event.site, event.round, event.reason)
        elif event.how == "left":
            self._replies.tell(event.site, "%s left: %s", event.reason, level=logging.INFO)
        elif event.how == "lost":
            logger.warning("%s is lost: %s", event.site, event.reason)

    def _on_start(self, event: RunStarted) -> None:
        name, self._rounds = self._config.run.name, event.rounds
        logger.info(
            "fedcore %s, run %s (id %s), process %d on %s",
            __version__, name, self._run_id, os.getpid(), socket.gethostname(),
        )  # fmt: skip
        if event.version is not None:
            logger.info("run %s goes on after round %d", name, event.version)

    def _on_commit(self, event: VersionCommitted) -> None:
        if event.version == 0:
            logger.info(
                "initial model%s: %s, %s bytes",
                f" from {event.source}" if event.source else "",
                plural(event.tensors, "tensor"), f"{event.nbytes:,}",
            )  # fmt: skip
            return
        logger.info(
            "round %d of %d committed: %s, %.1f s, of which %.2f s to pull and reduce",
            event.version, self._rounds, ", ".join(event.participants), event.seconds,
            event.collect_seconds,
        )  # fmt: skip

    def _on_judged(self, event: UpdatesJudged) -> None:
        out = [site for site in event.scores if site not in event.weights]
        logger.info(
            "round %d: the rule %s takes the updates of %s; left out: %s (%s)",
            event.round, self._config.aggregation.rule, _scored(event, list(event.weights)),
            _scored(event, out) or "none", event.measure,
        )  # fmt: skip

    def _on_end(self, event: RunEnded) -> None:
        how = {"complete": "is complete", "stopped": f"was {event.message}"}
        best = ""
        if event.best_version is not None:
            so_far = "" if event.outcome == "complete" else " so far"
            folder = "" if event.best is None else f", in {event.best}"
            best = f"; best model{so_far}: round {event.best_version}, {_metric(event)}{folder}"
        level = logging.ERROR if event.outcome == "failed" else logging.INFO
        logger.log(level, "the run %s%s", how.get(event.outcome, f"failed: {event.message}"), best)


def _off(event: FactorsMeasured, *, exact: bool) -> str:
    """Say how far the mean of the factors is off that of the products; where these were combined, what was cut."""
    off = f"{'would be' if exact else 'is'} {_percent(event.of_norm)} off"
    mean = "the mean of the factors"
    if exact:
        mean += ", filled up with zeros where ranks differ,"
    parts = [f"round {event.round}: {mean} {off} the mean of the products"]
    if event.of_change is not None:
        parts.append(f", {_percent(event.of_change)} of what the round changed")
    if event.of > 1:
        parts.append(f"; most in {event.worst}, {_percent(event.worst_of_norm)}")
    if exact:
        parts.append(f"; {_percent(event.cut)} is cut at rank {event.rank}")
    if event.modules < event.of:
        parts.append(
            f" (of {event.modules} of {event.of} modules: the server was killed in this round)"
        )
    return "".join(parts)


def _percent(part: float | None) -> str:
    return "an unknown part" if part is None else f"{100 * part:.3g} %"


def _scored(event: UpdatesJudged, sites: list[str]) -> str:
    """Return sites with their scores, the least one first."""
    ordered = sorted(sites, key=lambda site: (event.scores[site], site))
    named = [f"{site} {event.scores[site]:.4g}" for site in ordered[:_MOST_NAMED]]
    more = len(ordered) - len(named)
    return ", ".join([*named, *([f"{more} more"] if more else [])])


def _metric(event: BestChanged | RunEnded) -> str:
    if event.metric is None:
        return "the last one, as no metric selects"
    return f"{event.metric} unknown" if event.value is None else f"{event.metric} {event.value:.4f}"
