"""Log lines are a view of the run's events."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal
from unittest.mock import Mock

import pytest

from fedcore.clock import ManualClock
from fedcore.events import (
    AnswerReceived,
    BestChanged,
    Event,
    RunEnded,
    RunStarted,
    ServerStopped,
    SiteJoined,
    SiteLost,
    SiteReported,
    UpdateRefused,
    VersionCommitted,
)
from fedcore.server.log_lines import LogLines
from fedcore.server.replies import LINES, Replies
from tests.support.runs import run_config

VALUES: dict[str, Any] = {"metric": "acc", "value": 0.5}


@pytest.fixture
def lines(tmp_path: Path) -> LogLines:
    return LogLines(run_config(tmp_path, count=2), "1a2b", Replies(Mock(), ManualClock()))


def commit(version: int, source: str = "") -> VersionCommitted:
    return VersionCommitted(
        version=version,
        participants={"a": 3, "b": 1} if version else {},
        seconds=2.5,
        collect_seconds=0.25,
        nbytes=20016,
        tensors=2,
        source=source,
    )


def end(
    outcome: Literal["complete", "failed"], best: str | None = "runs/r/best", message: str = ""
) -> RunEnded:
    return RunEnded(
        outcome=outcome, message=message, version=3, best_version=2, best=best, **VALUES
    )


@pytest.mark.parametrize(
    ("event", "level", "text"),
    [
        (SiteJoined(site="a"), "INFO", "a joined"),
        (SiteLost(site="a", reason="done", how="left"), "INFO", "a left: done"),
        (SiteLost(site="a", reason="no word", how="lost"), "WARNING", "a is lost: no word"),
        (SiteReported(site="a", message="no disk", own=True), "WARNING", "a reports: no disk"),
        (SiteReported(site="a", message="has no key", own=False), "WARNING", "a has no key"),
        (
            UpdateRefused(site="a", round=2, reason="NaN"),
            "WARNING",
            "the update of a is left out of round 2: NaN",
        ),
        (
            UpdateRefused(site="a", round=0, reason="NaN"),
            "WARNING",
            "the initial model of a is not usable: NaN",
        ),
        (
            AnswerReceived(site="a", version=1, examples=2, outputs=("x", "y")),
            "INFO",
            "a answered: x, y",
        ),
        (commit(0), "INFO", "initial model: 2 tensors, 20,016 bytes"),
        (commit(0, "a"), "INFO", "initial model from a: 2 tensors, 20,016 bytes"),
        (BestChanged(version=2, **VALUES), "INFO", "best model so far: round 2 (acc 0.5000)"),
        (
            end("complete"),
            "INFO",
            "the run is complete; best model: round 2, acc 0.5000, in runs/r/best",
        ),
        (
            end("failed", None, "too few sites"),
            "ERROR",
            "the run failed: too few sites; best model so far: round 2, acc 0.5000",
        ),
        (ServerStopped(reason="disk full", failed=True), "ERROR", "stopped: disk full"),
        (ServerStopped(reason="SIGTERM", failed=False), "WARNING", "SIGTERM"),
    ],
)
def test_an_event_is_one_line_of_the_log(
    lines: LogLines, caplog: pytest.LogCaptureFixture, event: Event, level: str, text: str
) -> None:
    with caplog.at_level(logging.INFO, "fedcore.server"):
        lines.on_event(event)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [(level, text)]


@pytest.mark.parametrize(
    "event",
    [
        SiteLost(site="a", reason="its key was revoked", how="removed"),
        SiteReported(site="a", message="", own=False),
        BestChanged(version=0, **VALUES),
        BestChanged(version=3, metric=None, value=None),
    ],
)
def test_what_is_said_elsewhere_or_means_nothing_is_no_line(
    lines: LogLines, caplog: pytest.LogCaptureFixture, event: Event
) -> None:
    with caplog.at_level(logging.INFO, "fedcore.server"):
        lines.on_event(event)
    assert not caplog.records


def test_a_commit_counts_the_rounds_that_the_run_has(
    lines: LogLines, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fedcore.server"):
        lines.on_event(RunStarted(version=6, rounds=9))
        lines.on_event(commit(7))
    assert "goes on after round 6" in caplog.text
    assert "round 7 of 9 committed: a, b, 2.5 s, of which 0.25 s to pull and reduce" in caplog.text


def test_a_site_fills_no_log_with_its_events(
    lines: LogLines, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(LINES + 50):
        lines.on_event(SiteReported(site="a", message=str(number), own=True))
    assert len(caplog.records) == LINES
