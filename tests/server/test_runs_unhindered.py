"""Runs on one port: what floods, fails or ends one of them holds no other up."""

from __future__ import annotations

import contextlib
import gc
import logging
import sqlite3
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedcore import protocol
from fedcore._core import RateExceeded
from fedcore.clock import ManualClock
from fedcore.errors import BusyError
from fedcore.security.keys import AllowList, Identity, Role, load_kit
from fedcore.security.provision import Project, Provisioned, provision, revoke
from fedcore.server.host import Host
from fedcore.server.run import Run
from fedcore.transport.link import Control, DataEvent, SiteLink
from fedcore.transport.local import LocalNetwork

from ..support.arriving import Arriving, says
from ..support.failing import Failing
from ..support.several_runs import (
    DEADLINE,
    MODELS,
    PARTIES,
    run_file,
    wait_for,
)

KEYED: dict[str, Any] = {"insecure": False, "keys": "kits/server"}


def provisioned(folder: Path) -> Provisioned:
    return provision(Project("tcp://127.0.0.1:7733", PARTIES), folder / "kits")


def peer_of(kits: Provisioned, site: str) -> bytes:
    """The id of a connection with a site's key."""
    (who,) = AllowList.load(kits.server / "allow.toml").of_name(site).values()
    return who.user.encode() + b"\0" + site.encode() * 5


def joins(site: str, run: str, kits: Provisioned | None = None) -> Control:
    message = protocol.Join(version="0", site=site, run=run, instance="0" * 32)
    if kits is None:
        return says(site, message)
    return Control(peer_of(kits, site), protocol.encode(message))


@contextlib.contextmanager
def two_runs(
    folder: Path, clock: ManualClock | None = None, **server: Any
) -> Iterator[tuple[Host, Arriving, sqlite3.Connection]]:
    """Two runs under a clock that stands still, after a step, and what can lock the first one's journal."""
    link = Arriving()
    configs = [run_file(folder, name, **server) for name in MODELS]
    host = Host(configs, link=link, clock=clock or ManualClock())  # type: ignore[arg-type]
    other = sqlite3.connect(folder / "runs/one/run.sqlite", isolation_level=None, timeout=0)
    try:
        host.start()
        host.step()
        yield host, link, other
    finally:
        other.close()
        host.close()


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
        host.runs[0].store.journal.db = Failing(host.runs[0].store.journal.db)  # type: ignore[assignment]
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


@pytest.mark.parametrize("lock", ["BEGIN EXCLUSIVE", "BEGIN IMMEDIATE", "BEGIN"])
def test_a_run_whose_journal_is_locked_waits_and_holds_no_other_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lock: str
) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    link = Arriving()
    host = Host([run_file(tmp_path, name) for name in MODELS], link=link)  # type: ignore[arg-type]
    other = sqlite3.connect(tmp_path / "runs/one/run.sqlite", isolation_level=None, timeout=0)
    try:
        host.start()
        other.execute(lock)
        other.execute("SELECT * FROM meta").fetchone()
        link.waiting = [joins("a", "one"), joins("b", "one"), joins("c", "two")]
        host.step()
        answers = [(peer[:1], type(message)) for peer, message in link.sent]
        assert answers == [
            (b"a", protocol.Refused), (b"b", protocol.Refused), (b"c", protocol.Welcome)
        ]  # fmt: skip
        link.sent.clear()
        host.stop()
        host.end_what_is_asked()
        assert [run.result is None for run in host.runs] == [True, False]
        other.execute("COMMIT")
        host.step()
        answers = [(peer[:1], type(message)) for peer, message in link.sent if peer[:1] != b"c"]
        assert answers == [(b"a", protocol.Welcome), (b"b", protocol.Welcome)]
        assert host.runs[0].store.members() == ["a", "b"]
        host.end_what_is_asked()
        assert host.runs[0].result is not None
        assert [run.error for run in host.runs] == [None, None]
        said = [text.partition("run.sqlite ")[2][:13] for text in caplog.messages]
        assert [text for text in said if text] == ["locked: waiti", "is free again"]
    finally:
        other.close()
        host.close()


def test_messages_of_a_run_whose_journal_is_locked_are_handled_once_it_is_free(
    tmp_path: Path,
) -> None:
    network = LocalNetwork()
    host = Host([run_file(tmp_path, name) for name in MODELS], link=network.server())
    other = sqlite3.connect(tmp_path / "runs/one/run.sqlite", isolation_level=None, timeout=0)
    sites = {name: network.dial("local", name.encode() * 16, None) for name in "ac"}
    try:
        host.start()
        for name, run in (("a", "one"), ("c", "two")):
            sites[name].send(protocol.Join(version="0", site=name, run=run, instance="0" * 32))
        while sum(len(run.peers) for run in host.runs) < 2:
            host.step()
        other.execute("BEGIN EXCLUSIVE")
        host.step()
        for link in sites.values():
            link.send(protocol.Declare(tensors=[("w", "F32", [700])]))
        while not host.runs[1].declaring.declared:
            host.step()
        assert not host.runs[0].declaring.declared
        other.execute("COMMIT")
        while not host.runs[0].declaring.declared:
            host.step()
    finally:
        other.close()
        for link in sites.values():
            link.close()
        host.close()


def test_messages_for_a_run_whose_journal_stays_locked_take_no_more_than_their_room(
    tmp_path: Path,
) -> None:
    link = Arriving()
    configs = [run_file(tmp_path, name) for name in MODELS]
    host = Host(configs, link=link, clock=ManualClock())  # type: ignore[arg-type]
    other = sqlite3.connect(tmp_path / "runs/one/run.sqlite", isolation_level=None, timeout=0)
    try:
        host.start()
        host.turns.room = 2 * len(joins("a", "one").body)
        other.execute("BEGIN EXCLUSIVE")
        link.waiting = [joins("x", "one"), *[joins("a", "one")] * 3, joins("b", "one")]
        host.step()
        assert host.turns.waits(host.runs[0])
        other.execute("COMMIT")
        host.step()
        assert host.runs[0].store.members() == ["a"]
        link.waiting = [joins("b", "one")]  # as a site does that has no answer
        host.step()
        assert host.runs[0].store.members() == ["a", "b"]
    finally:
        other.close()
        host.close()


def test_what_a_site_says_after_it_asked_to_join_a_locked_run_keeps_its_place(
    tmp_path: Path,
) -> None:
    with two_runs(tmp_path) as (host, link, other):
        other.execute("BEGIN EXCLUSIVE")
        link.waiting = [joins("a", "one")]
        host.step()
        link.waiting = [says("a", protocol.Leave(reason="bye")), joins("c", "two")]
        host.step()
        assert [peer[:1] for peer, _ in link.sent] == [b"a", b"c"]
        other.execute("COMMIT")
        host.step()
        assert [type(message) for peer, message in link.sent if peer[:1] == b"a"] == [
            protocol.Refused,
            protocol.Welcome,
        ]
        assert [len(run.peers) for run in host.runs] == [0, 1]


def test_what_waited_for_a_locked_journal_reaches_the_disk_together(tmp_path: Path) -> None:
    class Counting(Failing):
        commits = 0

        def execute(self, statement: str, *values: Any) -> Any:
            Counting.commits += statement == "COMMIT"
            return self._db.execute(statement, *values)

    with two_runs(tmp_path) as (host, link, other):
        host.runs[0].store.journal.db = Counting(host.runs[0].store.journal.db)  # type: ignore[assignment]
        other.execute("BEGIN EXCLUSIVE")
        link.waiting = [joins("a", "one"), joins("b", "one")]
        host.step()
        other.execute("COMMIT")
        host.step()
        assert host.runs[0].store.members() == ["a", "b"]
        assert Counting.commits == 1


def test_a_revoked_key_is_taken_out_of_a_locked_run_however_much_waits_there(
    tmp_path: Path,
) -> None:
    clock, kits = ManualClock(), provisioned(tmp_path)
    with two_runs(tmp_path, clock, **KEYED) as (host, link, other):
        host.turns.most, one = 1, host.runs[0]
        link.waiting = [joins("a", "one", kits)]
        host.step()
        other.execute("BEGIN EXCLUSIVE")
        link.waiting = [Control(peer_of(kits, "a"), protocol.encode(protocol.Alive()))]
        host.step()
        revoke(kits.server, "a")
        clock.advance(2)  # the list is looked at again
        host.step()
        assert len(one.peers) == 1
        other.execute("COMMIT")
        host.step()
        assert not len(one.peers)


def test_who_would_wait_for_a_locked_run_is_answered_at_once_with_the_reason(
    tmp_path: Path,
) -> None:
    with two_runs(tmp_path) as (host, link, other):
        other.execute("BEGIN EXCLUSIVE")
        one = host.runs[0]
        link.waiting = [
            joins("a", "one"),
            says("o", protocol.Command(action="stop", run_id=one.store.run_id)),
        ]
        link.waiting += [
            says("s", protocol.StatusRequest(run_id=one.store.run_id)),
            says("m", protocol.MetricsRequest(run_id=one.store.run_id)),
        ]
        host.step()
        joined, answer, *asked = (message for _, message in link.sent)
        for busy in (joined, *asked):
            assert isinstance(busy, protocol.Refused)
            assert busy.code == "busy"
            assert "database of this run locked" in busy.message
        assert isinstance(answer, protocol.CommandReply)
        assert not answer.ok
        assert "database of this run locked" in answer.message
        other.execute("COMMIT")
        host.step()
        assert [peer[:1] for peer, _ in link.sent[4:]] == [b"a"]  # nothing else waited
        assert isinstance(link.sent[-1][1], protocol.Welcome)
        assert not one.end_asked


def test_logged_values_that_find_no_room_while_a_run_is_locked_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with two_runs(tmp_path) as (host, link, other):
        host.turns.most = 1
        link.waiting = [joins("a", "one")]
        host.step()
        other.execute("BEGIN EXCLUSIVE")
        logged, run_id = {"loss": 0.5, "norm": 2.0}, host.runs[0].store.run_id
        logs = protocol.Log(round=1, step=1, metrics=logged, run_id=run_id)
        problem = protocol.Problem(message="out of memory", run_id=run_id)
        link.waiting = [*[says("a", logs)] * 3, says("a", problem)]
        host.step()
        other.execute("COMMIT")
        host.step()
        link.waiting = [says("v", protocol.StatusRequest(run_id=run_id))]
        host.step()
        reply = link.sent[-1][1]
        assert isinstance(reply, protocol.StatusReply)
        (shown,) = (s for s in reply.sites if s.site == "a")
        assert "lost" in shown.message
    for lost in ("4 values that it logged", "1 problem that it reported"):
        assert sum("lost" in text and lost in text for text in caplog.messages) == 1


def test_the_last_score_of_a_site_waits_for_a_locked_run_however_much_waits_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with two_runs(tmp_path) as (host, link, other):
        host.turns.most, one = 1, host.runs[0]
        link.waiting = [joins("a", "one")]
        host.step()
        other.execute("BEGIN EXCLUSIVE")
        run_id, handled = one.store.run_id, []
        log = protocol.Log(round=1, step=1, metrics={"loss": 0.5}, run_id=run_id)
        scores = [
            protocol.Score(version=0, metrics={"loss": value}, examples=1, run_id=run_id)
            for value in (1.0, 2.0, 3.0)
        ]
        link.waiting = [says("a", log), *(says("a", score) for score in scores)]
        host.step()
        assert host.turns.put_off(one) == 2
        monkeypatch.setattr(one, "handle", lambda _, message: handled.append(message))
        other.execute("COMMIT")
        host.step()
    assert handled == [log, scores[-1]]


def test_ends_of_floods_in_a_locked_run_take_no_more_room_however_many_come(
    tmp_path: Path,
) -> None:
    with two_runs(tmp_path) as (host, link, other):
        link.waiting = [joins("a", "one")]
        host.step()
        other.execute("BEGIN EXCLUSIVE")
        host.step()
        one = host.runs[0]
        for _ in range(5):
            link.waiting = [RateExceeded(b"a" * 16, "too much")]
            host.step()
        assert host.turns.put_off(one) == 1
        other.execute("COMMIT")
        host.step()
        assert not len(one.peers)


def test_a_run_that_was_left_to_the_next_server_does_nothing_while_another_waits(
    tmp_path: Path,
) -> None:
    with two_runs(tmp_path) as (host, link, other):
        two = host.runs[1]
        link.waiting = [joins("c", "two")]
        host.step()
        other.execute("BEGIN EXCLUSIVE")
        host.step()
        host.interrupt("SIGTERM")
        host.end_what_is_asked()
        assert [run.over for run in host.runs] == [False, True]
        link.sent.clear()
        declares = protocol.Declare(tensors=[("w", "F32", [4])], run_id=two.store.run_id)
        stops = protocol.Command(action="stop", run_id=two.store.run_id)
        link.waiting = [says("c", declares), joins("b", "two"), says("v", stops)]
        host.step()
        assert [(peer[:1], type(message)) for peer, message in link.sent] == [
            (b"b", protocol.Stopped), (b"v", protocol.CommandReply)
        ]  # fmt: skip
        assert all("SIGTERM" in str(message) for _, message in link.sent)
        assert not two.declaring.declared
        other.execute("COMMIT")
        host.step()
        host.end_what_is_asked()
        assert [run.result and run.result.ending for run in host.runs] == ["interrupted"] * 2


def test_a_deadline_that_passed_while_a_run_waited_comes_after_what_was_sent_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcore.server.host.MOST_TOGETHER", 1)
    monkeypatch.setattr(
        Run, "deadline", property(lambda run: 0.0 if run.config.run.name == "one" else None)
    )
    with two_runs(tmp_path) as (host, link, other):
        other.execute("BEGIN EXCLUSIVE")
        host.step()
        other.execute("COMMIT")
        link.waiting = [joins("c", "two"), joins("a", "one"), joins("b", "one")]
        host.step()
        assert host.runs[0].store.members() == ["a", "b"]


def test_a_full_disk_ends_a_run_among_others_without_a_trace_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(Failing):
        def execute(self, statement: str, *values: Any) -> Any:
            if statement.startswith("INSERT"):
                self._db.execute("ROLLBACK")  # as SQLite itself does then
                raise sqlite3.OperationalError("database or disk is full")
            return self._db.execute(statement, *values)

    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with two_runs(tmp_path) as (host, link, _):
        host.runs[0].store.journal.db = Full(host.runs[0].store.journal.db)  # type: ignore[assignment]
        link.waiting = [joins("a", "one"), joins("c", "two")]
        host.step()
        gc.collect()
        assert "disk is full" in str(host.runs[0].error)
        assert [type(message) for _, message in link.sent] == [protocol.Welcome]
        assert not unraisable


def test_another_server_may_go_on_with_a_run_that_was_given_up(tmp_path: Path) -> None:
    assert provisioned(tmp_path).kits
    configs = [run_file(tmp_path, name, **KEYED) for name in MODELS]
    host = Host(configs)
    try:
        host.start()
        with pytest.raises(BusyError):
            Host(configs[:1])
        host.runs[0].store.journal.db = Failing(host.runs[0].store.journal.db)  # type: ignore[assignment]
        host.runs[0].stop()
        host.end_what_is_asked()
        assert [run.error is None for run in host.runs] == [False, True]
        kit = tmp_path / "runs/one/local"
        assert not kit.exists()
        next_host = Host(configs[:1])
        try:
            host.close()
            assert load_kit(kit).name == "run-folder"
            with pytest.raises(BusyError):
                Host(configs[:1])
        finally:
            next_host.close()
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

    def recv(seconds: float) -> Control | DataEvent | None:
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
    tmp_path: Path,
) -> None:
    clock, kits = ManualClock(), provisioned(tmp_path)
    with two_runs(tmp_path, clock, **KEYED) as (host, link, _):
        one, two = host.runs
        declares = protocol.Declare(tensors=[("w", "F32", [4])], run_id=one.store.run_id)
        link.waiting = [
            joins("b", "one", kits),
            Control(peer_of(kits, "b"), protocol.encode(declares)),
        ]
        host.step()
        one.store.journal.db = Failing(one.store.journal.db)  # type: ignore[assignment]
        revoke(kits.server, "b")
        clock.advance(2)  # the list is looked at again
        host.step()
        assert "disk I/O error" in str(one.error)
        host.step()
        assert (one.over, two.over) == (True, False)


@pytest.mark.parametrize(("inside", "left"), [("one", ["two"]), (None, [])])
def test_a_key_that_floods_one_run_keeps_its_part_in_another(
    tmp_path: Path, inside: str | None, left: list[str]
) -> None:
    link = Arriving()
    configs = [run_file(tmp_path, name) for name in MODELS]
    host = Host(configs, link=link, clock=ManualClock())  # type: ignore[arg-type]
    try:
        host.start()
        host.step()  # the look at the sites is over, and time stands still
        user = Identity("b", Role.SITE, "0" * 16).user.encode()
        peers = {name: user + b"\0" + name.encode() * 5 for name in (*MODELS, "none")}
        for name in MODELS:
            join = protocol.Join(version="0", site="b", run=name, instance="0" * 32)
            link.waiting.append(Control(peers[name], protocol.encode(join)))
        host.step()
        assert [len(run.peers) for run in host.runs] == [1, 1]
        link.waiting = [RateExceeded(peers[inside or "none"], "many messages")]
        host.step()
        assert [run.config.run.name for run in host.runs if len(run.peers)] == left
        refused = [peer for peer, message in link.sent if isinstance(message, protocol.Refused)]
        assert peers[inside or "none"] in refused
    finally:
        host.close()
