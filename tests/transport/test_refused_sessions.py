"""A site that a server refuses, does not take up, or does not answer, over a real socket."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from fedcore import protocol as p
from fedcore.errors import (
    LayoutError,
    RefusedError,
    TransferTimeout,
)
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.link import Control, ServerLink

from ..support.stage import DEADLINE, SPECS, Stage, begun_round, fill, limit, stage

IN_USE = "another process is 'north'"


def test_a_refusal_reaches_the_script_with_the_servers_words(pump: str) -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.say(p.Refused(code="unknown-site", message="no site 'north' here"))
        with pytest.raises(RefusedError, match="no site 'north' here") as caught:
            running.result(DEADLINE)
        assert caught.value.code == "unknown-site"


@pytest.mark.parametrize("version", [1, 3])
def test_a_server_of_another_version_is_one_error_with_both(pump: str, version: int) -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.link.send(server.peer, p.Rejoin(), version)
        both = rf"speaks protocol {version}, this site 2 \(fedcore .*\); install the same version"
        with pytest.raises(RefusedError, match=both) as caught:
            running.result(DEADLINE)
        assert caught.value.code == "version"


def test_a_run_that_was_taken_back_while_a_site_took_part_is_named_by_its_cause() -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.welcome()
        server.run_id = uuid.uuid4().hex
        server.welcome()
        again = r"run 'r' under another id, as after a rollback; start this site again"
        with pytest.raises(RefusedError, match=again) as caught:
            running.result(DEADLINE)
        assert caught.value.code == "other-run"
        left = server.expect(p.Leave)
        assert left.run_id == server.run_id, "the server would take it for one of another run"
        assert "start it again" in left.reason


def test_a_name_that_is_held_is_asked_for_until_it_is_free(
    pump: str, caplog: pytest.LogCaptureFixture
) -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        for _ in range(2):
            server.expect(p.Join)
            server.say(p.Refused(code="name-in-use", message=IN_USE))
        server.expect(p.Join)
        server.welcome()
        server.task("train", 1, server.publish(0))
        assert running.result(DEADLINE) is True
    assert [r.getMessage() for r in caplog.records] == [
        "site north is still held by an earlier connection; waiting for up to 60 s"
    ]


def refuse_joins(
    server: Stage, over: Callable[[], bool], code: str = "name-in-use", why: str = IN_USE
) -> None:
    """Answer each join with a refusal, until something holds."""
    while not over():
        arrived = server.link.recv(0.05)
        if isinstance(arrived, Control) and isinstance(p.decode_from_site(arrived.body), p.Join):
            server.link.send(arrived.peer, p.Refused(code=code, message=why))


def refuse_for_good(server: Stage, session: Session, running: Future[Any]) -> None:
    """Refuse a session its name until it gives up: at once, after the first answer."""
    refuse_joins(server, lambda: session.connection.machine.held)
    limit(session, connect_timeout=0.1)
    refuse_joins(server, running.done)


def test_a_site_that_a_server_does_not_take_up_in_time_is_given_the_servers_reason(
    pump: str,
) -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        locked = ("busy", "its database is locked")
        refuse_joins(server, lambda: bool(session.connection.machine.busy), *locked)
        limit(session, connect_timeout=0.1)
        refuse_joins(server, running.done, *locked)
        with pytest.raises(TransferTimeout, match=r"did not take this site up .* is locked"):
            running.result(DEADLINE)


def test_a_name_that_stays_held_is_an_error_after_the_connect_timeout(pump: str) -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        refuse_for_good(server, session, running)
        with pytest.raises(RefusedError, match="another process is 'north'") as caught:
            running.result(DEADLINE)
        assert caught.value.code == "name-in-use"


def test_a_name_that_was_taken_over_in_mid_run_is_an_error_too(pump: str) -> None:
    with stage() as (server, session, call):
        begun_round(server, session, call)
        session.submit(fill(0), 1)
        server.expect(p.Ready)
        running = call(session.is_running)
        server.say(p.Rejoin())
        refuse_for_good(server, session, running)
        with pytest.raises(RefusedError, match="another process is 'north'"):
            running.result(DEADLINE)


def test_a_site_that_was_refused_does_not_come_again_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(p, "REPEAT_SECONDS", 0.01)
    with stage() as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.welcome()
        server.task("train", 1, server.publish(1))
        running.result(DEADLINE)
        begun = call(session.begin, SPECS, {}, fill(0))
        server.expect(p.Declare)
        server.say(p.Refused(code="layout", message="other tensors"))
        with pytest.raises(LayoutError, match="other tensors"):
            begun.result(DEADLINE)
        session.problem("refused")
        server.expect(p.Problem)
        server.heard.clear()
        server.say(p.Rejoin())  # to its next PING
        server.say(p.Finish(ok=True, outcome="complete"))
        with session.connection.changed:
            assert session.connection.changed.wait_for(
                lambda: session.connection.machine.finish is not None, DEADLINE
            )
        session.problem("heard")
        server.expect(p.Problem)
        assert not server.heard


def test_a_server_that_is_not_there_is_named_while_waiting_and_after_the_connect_timeout(
    pump: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fedcore.site.connection.NOTICE_SECONDS", 0.1)
    probe = ServerLink("tcp://127.0.0.1:0")
    address = probe.endpoint
    probe.close()
    session = Session(SiteSettings(server=address, site="north", connect_timeout=0.6))
    try:
        with pytest.raises(TransferTimeout, match=address):
            session.is_running()
    finally:
        session.close()
    waits = [record.getMessage() for record in caplog.records]
    assert any(f"nothing heard from {address}" in text for text in waits)
    assert all("still trying; is fedcore-server running there" in text for text in waits)


def test_a_site_that_gave_up_its_first_join_does_not_join_later_unseen() -> None:
    with stage(connect_timeout=0.0) as (server, session, call):
        with pytest.raises(TransferTimeout, match="no answer"):
            call(session.is_running).result(DEADLINE)
        server.expect(p.Join)
        server.welcome()
        assert server.expect(p.Leave).reason == "it had no answer for too long, and it asks no more"
        assert session.run == ""
