"""Keys that say more than they may: slowed, named in the log and dropped, while the others' run goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fedcore import protocol
from fedcore.clock import ManualClock
from fedcore.monitor.ask import ask_status
from fedcore.protocol import control_frames
from fedcore.security.keys import load_kit
from fedcore.security.provision import Provisioned
from fedcore.server import replies
from fedcore.transport.link import Control, SiteLink

from ..support.links import DEADLINE, Links
from ..support.secured_runs import AT_ONCE, join, models, running, server_of, site

pytestmark = pytest.mark.timeout(600)


def message(link: SiteLink, accept: Callable[[Any], bool]) -> Any:
    """Return the first message of the server that ``accept`` takes."""
    until = time.monotonic() + DEADLINE
    while (left := until - time.monotonic()) > 0:
        arrived = link.recv(left)
        if isinstance(arrived, Control):
            told = protocol.decode_from_server(arrived.body)
            if accept(told):
                return told
    raise AssertionError("nothing acceptable arrived")


def flood(link: SiteLink, count: int) -> None:
    frames = [b"S", b"", *control_frames(protocol.Alive())]
    for _ in range(count):
        link.command(frames)


def lines(caplog: pytest.LogCaptureFixture, part: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if part in r.getMessage()]


def test_a_site_that_floods_is_named_and_cut_and_the_others_have_the_same_models(
    tmp_path: Path,
    kits: Provisioned,
    links: Links,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = server_of(tmp_path, sites=["a", "b", "c"], min_results=2)
    with running(server) as (pool, result):
        hostile = links.site(server.endpoint, load_kit(kits.kits["c"]).credentials)
        hostile.send(join("c"))
        message(hostile, lambda m: isinstance(m, protocol.Welcome))
        flood(hostile, 20_000)
        refused = message(hostile, lambda m: isinstance(m, protocol.Refused))
        assert (refused.code, "floods the server" in refused.message) == ("flood", True)
        until = time.monotonic() + DEADLINE
        while not lines(caplog, "is not heard any more"):
            hostile.send(protocol.Alive())
            assert time.monotonic() < until
            assert hostile.recv(0.05) is None  # nor answered
        honest = [
            pool.submit(site, kits.kits[name], server.endpoint, step)
            for name, step in (("a", 1), ("b", 3))
        ]
        assert [done.result(200) for done in honest] == [2, 2]
        assert result.result(200).ok
    assert models(tmp_path) == [0, 2, 4]
    assert len(lines(caplog, "c floods the server: 1024 control messages")) == 1


def test_an_observer_that_floods_is_named_and_dropped_and_the_others_are_answered(
    tmp_path: Path,
    kits: Provisioned,
    links: Links,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = server_of(tmp_path, timing=AT_ONCE)
    with running(server):
        eye = links.site(server.endpoint, load_kit(kits.kits["eye"]).credentials)
        frames = [b"S", b"", *control_frames(protocol.StatusRequest())]
        for _ in range(20_000):
            eye.command(frames)
            arrived = eye.recv(0.0)  # a queue that nobody reads has no room for the refusal
            if isinstance(arrived, Control) and b'"refused"' in arrived.body:
                break
        else:
            arrived = None
        refused = (
            message(eye, lambda m: isinstance(m, protocol.Refused))
            if arrived is None
            else protocol.decode_from_server(arrived.body)
        )
        assert (refused.code, "floods the server" in refused.message) == ("flood", True)
        until = time.monotonic() + DEADLINE
        while not lines(caplog, "eye (observer) floods the server"):
            assert time.monotonic() < until
            time.sleep(0.02)
        ops = load_kit(kits.kits["ops"]).credentials
        assert ask_status(server.endpoint, DEADLINE, ops).run == "t"


def test_a_site_that_says_the_same_without_end_fills_neither_log_nor_journal(
    tmp_path: Path,
    kits: Provisioned,
    links: Links,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    server = server_of(tmp_path, timing=AT_ONCE, sites=["a", "b"], min_results=1)
    with running(server) as (pool, result):
        first, done = threading.Event(), threading.Event()

        def hold(_: int) -> None:
            first.set()
            assert done.wait(DEADLINE)

        honest = pool.submit(site, kits.kits["a"], server.endpoint, 1, hold)
        assert first.wait(DEADLINE)  # a first model is there to be scored
        link = links.site(server.endpoint, load_kit(kits.kits["b"]).credentials)
        began = time.monotonic()
        for round_ in range(6):
            link.send(join("b"))
            message(link, lambda m: isinstance(m, protocol.Welcome))
            for number in range(50):
                metrics = {str(number): float("nan")}
                link.send(protocol.Problem(message="x" * 4000))
                link.send(protocol.Score(version=0, metrics=metrics, examples=1))
                link.send(protocol.Score(version=7, metrics=metrics, examples=1))
            link.send(protocol.Leave(reason=str(round_)))
        link.send(join("b"))
        message(link, lambda m: isinstance(m, protocol.Welcome))
        took = time.monotonic() - began
        said = lines(caplog, "b ") + lines(caplog, "b:")
        (scores,) = (
            server.runs[0].store.journal.db.execute("SELECT COUNT(*) FROM scores").fetchone()
        )
        link.close()
        done.set()
        assert honest.result(200) == 2
        assert result.result(200).ok
    assert len(said) <= 2 * (replies.LINES + 1 + took * replies.LINES_PER_SECOND)
    assert scores == 2
    assert lines(caplog, "more lines of b were left out") or len(said) <= replies.LINES + 1


def test_names_have_lines_of_their_own_and_what_is_left_out_is_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = ManualClock()
    found = replies.Replies(Mock(), clock)
    for number in range(500):
        found.tell("b", "%s reports: %s", str(number))
    found.tell("a", "%s reports: %s", "once")
    assert len(lines(caplog, "b reports")) == replies.LINES
    assert lines(caplog, "a reports: once")
    clock.advance(2.0)
    found.tell("b", "%s reports: %s", "again")
    assert lines(caplog, "b reports: again (and 400 more lines of b were left out)")
