"""Several runs on one port: each is what it would be alone, and they share one process and its memory."""

from __future__ import annotations

import contextlib
import re
import signal
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedcore import protocol
from fedcore.clock import SYSTEM
from fedcore.errors import ConfigError, RefusedError, StorageError
from fedcore.monitor.ask import StatusClient, ask_status, find_server
from fedcore.server.acting import Acting
from fedcore.server.budget import Budget
from fedcore.server.host import WHICH_RUN, Host
from fedcore.server.opening import Opening
from fedcore.transport.link import SiteLink

from ..support.ports import free_port
from ..support.several_runs import (
    DEADLINE,
    MODELS,
    UNKNOWN,
    Peer,
    best,
    run_file,
    serving,
    site,
    started,
    wait_for,
    written,
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What each run makes where it is the only one."""
    found = {}
    for name in ("one", "two"):
        folder = tmp_path_factory.mktemp(name)
        config = run_file(folder, name)
        with serving(config) as (host, pool, ended):
            for one in config.participants.sites:
                pool.submit(site, host.endpoint, name, one)
            assert all(result.ok for result in ended.result(DEADLINE))
        found[name] = best(folder, name)
    return found


def test_two_runs_on_one_port_end_as_each_does_alone(
    tmp_path: Path, alone: dict[str, bytes]
) -> None:
    with serving(run_file(tmp_path, "one"), run_file(tmp_path, "two")) as (host, pool, ended):
        at = host.endpoint
        sites = [pool.submit(site, at, *who) for who in (("one", "a"), ("one", "b"))]
        assert [done.result(DEADLINE) for done in sites] == [3, 3]
        assert not ended.done()  # the other run has not begun
        sites = [pool.submit(site, at, *who) for who in (("two", "b"), ("two", "c"))]
        assert [done.result(DEADLINE) for done in sites] == [3, 3]
        assert [result.ok for result in ended.result(DEADLINE)] == [True, True]
    assert {name: best(tmp_path, name) for name in alone} == alone


def test_a_run_by_krum_beside_another_one_ends_as_it_does_alone(
    tmp_path: Path, alone: dict[str, bytes]
) -> None:
    found = []
    for names in (["one"], ["one", "two"]):
        folder = tmp_path / names[-1]
        one = run_file(folder, "one", people={"sites": ["a", "b", "c"]})
        rule = one.aggregation.model_copy(update={"rule": "krum", "options": {"f": 0.0}})
        runs = {
            "one": one.model_copy(update={"aggregation": rule}),
            "two": run_file(folder, "two"),
        }
        with serving(*(runs[name] for name in names)) as (host, pool, ended):
            for name in names:
                for who in runs[name].participants.sites:
                    pool.submit(site, host.endpoint, name, who)
            assert all(result.ok for result in ended.result(DEADLINE))
        found.append(best(folder, "one"))
    assert found[0] == found[1]
    assert best(tmp_path / "two", "two") == alone["two"]


def test_two_runs_killed_and_started_again_end_as_each_does_alone(
    tmp_path: Path, alone: dict[str, bytes]
) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    names = [written(tmp_path, name, address) for name in MODELS]
    server = started(tmp_path, *names)
    stops = [threading.Barrier(5), threading.Barrier(5)]

    def hold(round_: int) -> None:
        if round_ == 2:
            for stop in stops:
                stop.wait(DEADLINE)

    with ThreadPoolExecutor(4) as pool:
        try:
            who = [("one", "a"), ("one", "b"), ("two", "b"), ("two", "c")]
            sites = [pool.submit(site, address, *each, hold) for each in who]
            stops[0].wait(DEADLINE)
            server.kill()
            server.wait()
            server = started(tmp_path, *names)
            for name in MODELS:  # by the run folder, as commands on the server's machine do
                wait_for(lambda name=name: find_server(tmp_path / "runs" / name) is not None)
                found = find_server(tmp_path / "runs" / name)
                assert found is not None
                assert ask_status(found.address, DEADLINE).run == name
            stops[1].wait(DEADLINE)
            assert [done.result(DEADLINE) for done in sites] == [3] * 4
            assert server.wait(DEADLINE) == 0, (tmp_path / "server.log").read_text()
        finally:
            for stop in stops:
                stop.abort()
            server.kill()
            server.wait()
    assert {name: best(tmp_path, name) for name in alone} == alone
    again = (tmp_path / "server.log").read_text().split("expecting ")
    assert len(again) == 3
    assert "[one] " in again[0]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_all_runs_and_each_says_how_it_ended(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    server = started(tmp_path, *(written(tmp_path, name, address) for name in MODELS))
    try:
        with StatusClient(address) as client, contextlib.suppress(RefusedError):
            client.ask(DEADLINE)  # it names no run: what matters is that the server is there
        server.send_signal(number)
        assert server.wait(DEADLINE) == status
    finally:
        server.kill()
        server.wait()
    text = (tmp_path / "server.log").read_text()
    how = "the server was ended by SIGTERM" if status == 143 else "stopped on request"
    assert [f"run {name}: {how}" in text for name in MODELS] == [True, True], text
    logs = [(tmp_path / "runs" / name / "server.log").read_text() for name in MODELS]
    assert [("run one:" in log, "run two:" in log) for log in logs] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.slow
def test_a_process_with_two_runs_takes_no_more_memory_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in MODELS:
        monkeypatch.setitem(MODELS, name, 16 << 20)  # 64 MiB: more than the memory of all runs
    memory, address = 48, f"tcp://127.0.0.1:{free_port()}"
    names = [written(tmp_path, name, address, f"{memory}MiB") for name in MODELS]
    server = started(tmp_path, *names)
    taken: list[int] = []

    def measure() -> None:
        status = Path(f"/proc/{server.pid}/status")
        while server.poll() is None:
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
                taken.append(int(found[1]) if found else 0)
            time.sleep(0.01)

    with ThreadPoolExecutor(5) as pool:
        try:
            with StatusClient(address) as client, contextlib.suppress(RefusedError):
                client.ask(DEADLINE)
            measured = pool.submit(measure)
            wait_for(lambda: bool(taken))
            who = [("one", "a"), ("one", "b"), ("two", "b"), ("two", "c")]
            sites = [pool.submit(site, address, *each) for each in who]
            assert [done.result(300) for done in sites] == [3] * 4
            assert server.wait(DEADLINE) == 0, (tmp_path / "server.log").read_text()
            measured.result(DEADLINE)
        finally:
            server.kill()
            server.wait()
    assert max(taken) - taken[0] <= memory << 10


def test_a_finished_run_is_left_out_where_others_go_on(tmp_path: Path) -> None:
    one, two = run_file(tmp_path, "one"), run_file(tmp_path, "two")
    with serving(one) as (host, pool, ended):
        for name in one.participants.sites:
            pool.submit(site, host.endpoint, "one", name)
        assert ended.result(DEADLINE)[0].ok
    with serving(one, two) as (host, pool, ended):
        assert [run.config.run.name for run in host.runs] == ["two"]
        with closing(SiteLink(host.endpoint, uuid.uuid4().bytes)) as link:
            peer = Peer(link)
            peer.send(protocol.Join(version="0", site="a", run="one", instance="0" * 32))
            assert peer.await_message(protocol.Refused).message == WHICH_RUN
        for name in two.participants.sites:
            pool.submit(site, host.endpoint, "two", name)
        assert [result.ok for result in ended.result(DEADLINE)] == [True]
    with pytest.raises(ConfigError, match="is finished"):
        Host([one, two])


def test_the_runs_of_a_host_share_one_memory_budget(tmp_path: Path) -> None:
    total = 256 << 20
    configs = [run_file(tmp_path, name, memory="256MiB") for name in MODELS]
    shares, opened = Opening(configs, encrypted=False, discard=False, clock=SYSTEM).first()
    with opened:
        budgets = [share.budget for share in shares]
        assert sum(b.chunks + b.outgoing + b.control for b in budgets) <= total
        assert [share.config.server.memory for share in shares] == [total // 2] * 2
        alone = Budget.of_run(configs[0], encrypted=False)
        assert budgets[0].chunks < alone.chunks * 0.55
    with pytest.raises(ConfigError, match=r"run 'one', one of 2 of this server: server\.memory"):
        Host([run_file(tmp_path, name, memory="16MiB") for name in MODELS])


def test_a_run_that_cannot_be_written_does_not_end_the_other(
    tmp_path: Path, alone: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Acting.commit

    refused: list[Any] = []

    def full(acting: Acting, action: Any) -> None:
        if action.version == 2 and not refused:  # the other run is not that far yet
            refused.append(action)
            raise StorageError("no space left")
        commit(acting, action)

    monkeypatch.setattr(Acting, "commit", full)
    with serving(run_file(tmp_path, "one"), run_file(tmp_path, "two")) as (host, pool, ended):
        at = host.endpoint
        for name in ("b", "c"):
            pool.submit(site, at, "two", name, patience=3)  # its server does not come back
        wait_for(lambda: host.runs[1].error is not None)
        host_goes_on = threading.Event()
        sites = [
            pool.submit(site, at, "one", name, lambda _: host_goes_on.wait(DEADLINE) and None)
            for name in ("a", "b")
        ]
        with closing(SiteLink(at, uuid.uuid4().bytes)) as link:
            peer = Peer(link)
            peer.send(protocol.Join(version="0", site="b", run="two", instance="0" * 32))
            assert "its disk" in peer.await_message(protocol.Stopped).message
            link.run_id = host.runs[1].store.run_id
            peer.send(protocol.StatusRequest())
            assert "an error has ended" in peer.await_message(protocol.StatusReply).message
            peer.send(protocol.Command(action="resume"))
            assert not peer.await_message(protocol.CommandReply).ok
            assert peer.pulls(host.runs[1]) == UNKNOWN
        host_goes_on.set()
        assert [done.result(DEADLINE) for done in sites] == [3, 3]
        with pytest.raises(StorageError, match="no space left"):
            ended.result(DEADLINE)
    assert best(tmp_path, "one") == alone["one"]


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"listen": "tcp://127.0.0.1:7000"}, "server.listen"),
        ({"memory": "512MiB"}, "server.memory"),
        ({"insecure_network": True}, "server.insecure_network"),
    ],
)
def test_runs_that_differ_in_what_the_process_is_are_refused_by_name(
    tmp_path: Path, other: dict[str, Any], key: str
) -> None:
    first = run_file(tmp_path, "one")
    with pytest.raises(ConfigError, match=key):
        Host([first, run_file(tmp_path, "two", **other)])
    with pytest.raises(ConfigError, match=r"run\.name is 'one' twice"):
        Host([first, first])
    with serving(first) as (host, _, _):
        assert host.endpoint  # the folder was let go of
