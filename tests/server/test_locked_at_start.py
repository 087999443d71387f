"""A server of several runs starts while another process has the journal of one of them locked."""

from __future__ import annotations

import contextlib
import logging
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcore import protocol
from fedcore.cli.app import app
from fedcore.clock import ManualClock
from fedcore.errors import BusyError, IntegrityError
from fedcore.monitor.ask import ENDPOINT_FILE, why_unserved
from fedcore.server.host import Host
from fedcore.server.storage.lock import FolderLock
from fedcore.server.storage.store import Store

from ..support.arriving import Arriving, says
from ..support.several_runs import DEADLINE, MODELS, run_file, started, wait_for, written


def joins(site: str, run: str) -> protocol.Join:
    return protocol.Join(version="0", site=site, run=run, instance="0" * 32)


@contextlib.contextmanager
def lock(folder: Path, run: str) -> Iterator[sqlite3.Connection]:
    """Lock the journal of a run that has begun; the test's COMMIT frees it."""
    config = run_file(folder, run)
    Store(config.run_folder, None).close()
    with contextlib.closing(
        sqlite3.connect(config.run_folder / "run.sqlite", isolation_level=None, timeout=0)
    ) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield other


@contextlib.contextmanager
def served(folder: Path, *runs: str) -> Iterator[tuple[Host, Arriving, ManualClock]]:
    link, clock = Arriving(), ManualClock()
    host = Host([run_file(folder, name) for name in runs], link=link, clock=clock)  # type: ignore[arg-type]
    with contextlib.closing(host):
        yield host, link, clock


def test_a_run_that_is_locked_at_the_start_is_served_later_and_the_others_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    later = []
    with lock(tmp_path, "one") as other, served(tmp_path, *MODELS) as (host, link, clock):
        host.opened = lambda run: later.append(run.config.run.name)
        host.start()
        link.waiting = [says("a", joins("a", "one")), says("c", joins("c", "two"))]
        host.step()
        assert [(peer[:1], type(m)) for peer, m in link.sent] == [
            (b"a", protocol.Refused),
            (b"c", protocol.Welcome),
        ]
        assert getattr(link.sent[0][1], "code", "") == "busy"
        link.sent.clear()
        link.waiting = [says("e", protocol.StatusRequest(run_id="0" * 32))]
        host.step()
        asked = link.sent.pop()[1]
        assert isinstance(asked, protocol.Refused)
        assert asked.code == "busy"  # a command that watches goes on
        assert "another process has its database locked" in asked.message
        other.execute("COMMIT")
        clock.advance(1.0)
        link.waiting = [says("a", joins("a", "one"))]  # as a site does that has no answer
        host.step()
        assert [(peer[:1], type(m)) for peer, m in link.sent] == [(b"a", protocol.Welcome)]
        assert later == ["one"]
        assert [run.store.members() for run in host.runs] == [["c"], ["a"]]
    assert sum(str(tmp_path / "runs/one") in text for text in caplog.messages) == 1


def test_a_server_whose_runs_are_all_locked_at_its_start_waits_for_the_first(
    tmp_path: Path,
) -> None:
    locked = lock(tmp_path, "one"), lock(tmp_path, "two")
    with locked[0] as one, locked[1], served(tmp_path, *MODELS) as (host, link, clock):
        host.start()
        link.waiting = [says("a", joins("a", "one"))]
        host.step()
        assert host.runs == []
        one.execute("COMMIT")
        clock.advance(1.0)
        host.step()
        assert [run.config.run.name for run in host.runs] == ["one"]
        assert host.waiting == ["two"]


def test_a_run_that_gets_locked_between_its_opening_and_its_start_starts_once_it_is_free(
    tmp_path: Path,
) -> None:
    with served(tmp_path, *MODELS) as (host, link, _):
        path = tmp_path / "runs/one/run.sqlite"
        with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=0)) as other:
            other.execute("BEGIN EXCLUSIVE")
            host.start()
            link.waiting = [says("a", joins("a", "one")), says("c", joins("c", "two"))]
            host.step()
            assert [peer[:1] for peer, _ in link.sent] == [b"a", b"c"]
            other.execute("COMMIT")
        host.step()
        assert [run.store.members() for run in host.runs] == [["a"], ["c"]]


@pytest.mark.parametrize("how", ["stop", "interrupt"])
def test_a_server_that_is_ended_waits_for_no_locked_run_and_names_it(
    tmp_path: Path, how: str
) -> None:
    with lock(tmp_path, "one"), served(tmp_path, *MODELS) as (host, _, _clock):
        host.stop() if how == "stop" else host.interrupt("SIGTERM")
        results = host.serve()
        assert [result.ending for result in results] == [
            "stopped" if how == "stop" else "interrupted"
        ]
        assert host.unopened == ["one"]


@pytest.mark.parametrize("how", ["stop", "interrupt"])
def test_a_server_that_is_ended_while_it_opens_a_run_ends_that_run_too(
    tmp_path: Path, how: str
) -> None:
    with lock(tmp_path, "one") as other, served(tmp_path, *MODELS) as (host, link, clock):
        host.start()
        host.opened = lambda _: host.stop() if how == "stop" else host.interrupt("SIGTERM")
        other.execute("COMMIT")
        clock.advance(1.0)
        host.step()
        two, one = host.runs
        assert one.end_asked == two.end_asked == (how == "stop")
        link.recv = clock.advance
        results = host.serve()
    assert {result.ending for result in results} == {"stopped" if how == "stop" else "interrupted"}
    assert how == "stop" or all("SIGTERM" in result.message for result in results)


def test_a_run_whose_folder_is_in_use_once_its_database_is_free_is_served_after_that(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with lock(tmp_path, "one") as other, served(tmp_path, *MODELS) as (host, _, clock):
        host.start()
        other.execute("COMMIT")
        with contextlib.closing(FolderLock(tmp_path / "runs/one")):
            clock.advance(1.0)
            host.step()
            assert host.waiting == ["one"]
            assert [text for text in caplog.messages if "in use by another server" in text]
        clock.advance(1.0)
        host.step()
        assert [run.config.run.name for run in host.runs] == ["two", "one"]


def test_a_run_that_another_server_keeps_is_given_up_after_ten_minutes_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with lock(tmp_path, "one") as other, served(tmp_path, *MODELS) as (host, _, clock):
        host.start()
        clock.advance(1000.0)
        host.step()
        assert host.waiting == ["one"]  # a locked database is waited for, however long
        other.execute("COMMIT")
        with contextlib.closing(FolderLock(tmp_path / "runs/one")):
            for seconds in (1.0, 599.0):
                clock.advance(seconds)
                host.step()
            assert host.waiting == ["one"]
            clock.advance(1.0)
            host.step()
        assert host.waiting == []
        host.stop()
        with pytest.raises(BusyError, match="in use by another server"):
            host.serve()
    assert sum("run one is not served: " in text for text in caplog.messages) == 1


def test_a_run_folder_whose_database_is_locked_is_named_as_such_to_an_operator(
    tmp_path: Path,
) -> None:
    with lock(tmp_path, "one") as other:
        folder = tmp_path / "runs/one"
        assert "has its database locked" in why_unserved(folder)
        other.execute("COMMIT")
        assert not why_unserved(folder)
        assert CliRunner().invoke(app, ["stop", str(folder)]).exit_code == 2


def test_a_run_that_cannot_be_served_once_it_is_free_is_named_and_holds_no_other_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with lock(tmp_path, "one") as other, served(tmp_path, *MODELS) as (host, link, clock):
        host.start()
        host.step()
        (tmp_path / "runs/one/models/round-0007.safetensors").write_bytes(b"not the server's own")
        other.execute("COMMIT")
        clock.advance(1.0)
        link.waiting = [says("a", joins("a", "one")), says("c", joins("c", "two"))]
        host.step()
        answers = [(peer[:1], type(m)) for peer, m in link.sent]
        assert answers == [(b"a", protocol.Refused), (b"c", protocol.Welcome)]
        assert [text for text in caplog.messages if "run one is not served: " in text]
        host.stop()
        link.recv = clock.advance  # c never leaves: it is waited for
        with pytest.raises(IntegrityError, match="round-0007"):
            host.serve()


def test_the_command_shows_a_run_in_its_folder_once_it_is_served(tmp_path: Path) -> None:
    with lock(tmp_path, "one") as other:
        files = [written(tmp_path, name, "tcp://127.0.0.1:0") for name in MODELS]
        server = started(tmp_path, *files)
        try:
            one, two = (tmp_path / "runs" / name for name in MODELS)
            wait_for((two / ENDPOINT_FILE).exists)
            assert not (one / ENDPOINT_FILE).exists()
            other.execute("COMMIT")
            wait_for(lambda: (one / "server.log").exists() and "run one (id" in said(one))
            addresses = [(folder / ENDPOINT_FILE).read_text().split("#") for folder in (one, two)]
            assert addresses[0][0] == addresses[1][0]
            assert addresses[0][1] != addresses[1][1]
            server.send_signal(signal.SIGTERM)
            assert server.wait(DEADLINE) == 128 + signal.SIGTERM
        finally:
            server.kill()
            server.wait()
    assert not (one / ENDPOINT_FILE).exists()


def said(folder: Path) -> str:
    return (folder / "server.log").read_text()
