"""Runs on one port: what floods, fails or ends one of them holds no other up."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from contextlib import closing
from pathlib import Path

import pytest

from fedcore import protocol
from fedcore.clock import ManualClock
from fedcore.server.host import Host
from fedcore.server.run import Run
from fedcore.transport.link import Control, SiteLink

from ..support.arriving import Arriving, says
from ..support.failing import Failing
from ..support.several_runs import (
    DEADLINE,
    MODELS,
    run_file,
    wait_for,
)


def test_a_flood_in_one_run_delays_another_by_its_share_of_the_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: list[str] = []
    handle = Run.handle

    def counted(run: Run, peer: bytes, message: protocol.FromSite) -> None:
        if isinstance(message, protocol.Alive):
            handled.append(run.config.run.name)
        handle(run, peer, message)

    monkeypatch.setattr(Run, "handle", counted)
    host = Host([run_file(tmp_path, name) for name in MODELS])
    with contextlib.ExitStack() as stack:
        stack.callback(host.close)
        host.start()
        links = {}
        for run, name in (("one", "a"), ("one", "b"), ("two", "c")):
            link = links[name] = stack.enter_context(
                closing(SiteLink(host.endpoint, uuid.uuid4().bytes))
            )
            link.send(protocol.Join(version="0", site=name, run=run, instance="0" * 32))
        until = time.monotonic() + DEADLINE
        while sum(len(run.peers) for run in host.runs) < 3:
            assert time.monotonic() < until
            host.step()
        one, two = 1, 2

        def arrived(audience: int) -> int:
            return host.link.exchange.stats_of(audience)["bytes_in"]

        before, size = arrived(one), sum(map(len, protocol.control_frames(protocol.Alive())))
        for _ in range(400):
            for name in ("a", "b"):
                links[name].send(protocol.Alive())
        wait_for(lambda: arrived(one) >= before + 800 * size)
        before = arrived(two)
        for _ in range(10):
            links["c"].send(protocol.Alive())
        wait_for(lambda: arrived(two) >= before + 10 * size)
        handled.clear()
        while handled.count("two") < 10:
            assert time.monotonic() < until
            host.step()
    assert handled[:25].count("two") == 10


def test_rows_of_one_run_that_cannot_be_written_hold_back_no_answer_of_another(
    tmp_path: Path,
) -> None:
    link = Arriving()
    host = Host([run_file(tmp_path, name) for name in MODELS], link=link)  # type: ignore[arg-type]
    try:
        host.start()
        host.runs[0].store._journal.db = Failing(host.runs[0].store._journal.db)  # type: ignore[assignment]
        link.waiting = [
            says(name, protocol.Join(version="0", site=name, run=run, instance="0" * 32))
            for run, name in (("one", "a"), ("two", "c"))
        ]
        host.step()
        answers = {peer[:1]: type(message) for peer, message in link.sent}
        assert answers == {b"a": protocol.Stopped, b"c": protocol.Welcome}
        assert "disk I/O error" in str(host.runs[0].error)
        assert (host.runs[0].over, host.runs[1].over) == (True, False)
        assert host.runs[1].store.members() == ["c"]
    finally:
        host.close()


def test_a_run_that_is_over_still_answers_and_wakes_its_server_no_more(tmp_path: Path) -> None:
    link, clock, waits = Arriving(), ManualClock(), list[float]()
    configs = [run_file(tmp_path, name) for name in MODELS]
    host = Host(configs, link=link, clock=clock)  # type: ignore[arg-type]
    arrive = link.recv

    def step(*messages: Control) -> None:
        link.waiting += messages
        host.step()

    def recv(seconds: float) -> Control | None:
        arrived = arrive(seconds)
        if arrived is None and seconds:
            waits.append(seconds)
            clock.advance(seconds)
        return arrived

    link.recv = recv
    try:
        host.start()
        one, _ = host.runs
        one.stop()
        one.end_if_asked()
        while not one.over:
            step()
        waits.clear()
        for _ in range(10):
            step()
        assert len(waits) == 10
        assert min(waits) > 0.4  # as often as without it
        joins = protocol.Join(version="0", site="a", run="one", instance="0" * 32)
        asks = [
            protocol.StatusRequest(),
            protocol.MetricsRequest(),
            protocol.Command(action="stop"),
        ]
        asks = [ask.model_copy(update={"run_id": one.store.run_id}) for ask in asks]
        step(says("a", joins), *(says("v", ask) for ask in asks))
        assert [type(message) for _, message in link.sent[-4:]] == [
            protocol.Finish, protocol.StatusReply, protocol.MetricsReply, protocol.CommandReply
        ]  # fmt: skip
        for _ in range(200):  # nothing is heard of the site any more
            step()
        assert not len(one.peers)
        assert min(waits[-10:]) > 0.4
    finally:
        host.close()


def test_a_site_that_changes_its_run_gets_the_answers_in_order_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    link = Arriving()
    host = Host([run_file(tmp_path, name) for name in MODELS], link=link)  # type: ignore[arg-type]
    try:
        host.start()
        link.waiting = [
            says("b", protocol.Join(version="0", site="b", run=name, instance="0" * 32))
            for name in ("one", "two", "one")
        ]
        host.step()
        welcomes = [message.run for _, message in link.sent]  # type: ignore[union-attr]
        assert welcomes == ["one", "two", "one"]
        assert caplog.messages.count("b left: it joins another run") == 2
    finally:
        host.close()


def test_a_key_that_is_revoked_does_not_end_a_server_one_of_whose_runs_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Arriving()
    host = Host([run_file(tmp_path, name) for name in MODELS], link=link)  # type: ignore[arg-type]
    try:
        host.start()
        one, two = host.runs
        declares = protocol.Declare(tensors=[("w", "F32", [4])], run_id=one.store.run_id)
        joins = protocol.Join(version="0", site="b", run="one", instance="0" * 32)
        link.waiting = [says("b", joins), says("b", declares)]
        host.step()
        one.store._journal.db = Failing(one.store._journal.db)  # type: ignore[assignment]
        monkeypatch.setattr(host._guard, "take_out_revoked", lambda: ["b"])
        host.step()
        assert "disk I/O error" in str(one.error)
        host.step()
        assert (one.over, two.over) == (True, False)
    finally:
        host.close()
