"""Several runs on one port: each is what it would be alone, and a peer of one learns nothing of another."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore import protocol
from fedcore._core import Collector, CollectorDone, CollectorOptions, SourceRejected
from fedcore.clock import ManualClock
from fedcore.config import parse_run
from fedcore.errors import ConfigError, RefusedError, StorageError
from fedcore.model_file import create_model
from fedcore.monitor.ask import StatusClient, ask_status, find_server
from fedcore.security.keys import Role, load_kit
from fedcore.security.provision import Project, provision
from fedcore.server.acting import Acting
from fedcore.server.budget import Budget
from fedcore.server.host import _WHICH_RUN, Host
from fedcore.server.opening import open_shares
from fedcore.server.outcome import RunResult
from fedcore.server.run import Run
from fedcore.server.run_log import OfRun
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.link import Control, SiteLink

from ..support.arriving import Arriving, says
from ..support.failing import Failing
from ..support.links import wait
from ..support.processes import heed_signals

DEADLINE = 30.0
UNKNOWN = "the tensors are no longer published there"
MODELS = {"one": 5000, "two": 700}
PARTIES = dict.fromkeys("abc", Role.SITE) | {"eye": Role.OBSERVER, "ops": Role.OPERATOR}
Answers = protocol.Refused | protocol.StatusReply | protocol.CommandReply


def run_file(
    folder: Path,
    name: str,
    listen: str = "tcp://127.0.0.1:0",
    people: dict[str, Any] | None = None,
    **server: Any,
) -> Any:
    return parse_run(
        {
            "run": {"name": name, "rounds": 3},
            "participants": people or {"sites": ["a", "b"] if name == "one" else ["b", "c"]},
            "transfer": {"update": "bf16" if name == "one" else "int8"},
            "server": {"listen": listen, "insecure": True, **server},
        },
        folder=folder,
    )


def site(
    address: str,
    run: str,
    name: str,
    hold: Callable[[int], None] = lambda _: None,
    patience: float = 60,
) -> int:
    """Take part in a run; ``hold`` is called with the round before its update is sent."""
    settings = SiteSettings(address, name, run=run, connect_timeout=15, idle_timeout=patience)
    trained = 0
    with closing(Session(settings)) as session:
        while session.is_running():
            specs = [("w", "F32", [MODELS[run]])]
            model = session.begin(specs, {}, lambda _: bytes(4 * MODELS[run]))
            if model.kind == "evaluate":
                session.end_task()
                continue
            drawn = np.random.default_rng([ord(name), model.round]).normal(size=MODELS[run])
            values = np.frombuffer(model.tensors["w"], np.float32) + drawn.astype(np.float32)
            hold(model.round)
            session.submit(lambda _, values=values: values.tobytes(), ord(name))
            trained += 1
    return trained


@contextmanager
def serving(*configs: Any) -> Iterator[tuple[Host, ThreadPoolExecutor, Future[list[RunResult]]]]:
    host = Host(configs)
    with ThreadPoolExecutor(8) as pool:
        try:
            yield host, pool, pool.submit(host.serve)
        finally:
            host.stop()


def best(folder: Path, name: str) -> bytes:
    return (folder / "runs" / name / "final/model.safetensors").read_bytes()


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


def test_a_peer_of_one_run_gets_neither_sets_nor_status_nor_names_of_another(
    tmp_path: Path,
) -> None:
    release, trains = threading.Event(), threading.Event()

    def hold(_: int) -> None:
        trains.set()
        assert release.wait(DEADLINE)

    people = {"sites": ["a", "b", "spy"], "min_results": 2, "join_timeout": "1s"}
    one_file = run_file(tmp_path, "one", people=people)
    with serving(one_file, run_file(tmp_path, "two")) as (host, pool, ended):
        at, (one, two) = host.endpoint, host.runs
        sites = [pool.submit(site, at, "one", name, hold) for name in ("a", "b")]
        sites += [pool.submit(site, at, "two", name, hold) for name in ("b", "c")]
        assert trains.wait(DEADLINE)
        wait_for(lambda: all(run.versions.set_id for run in host.runs))
        with closing(SiteLink(at, uuid.uuid4().bytes)) as link:
            peer = Peer(link)
            for name, run in (("x", "one"), ("spy", "two"), ("spy", "three"), ("spy", None)):
                peer.send(protocol.Join(version="0", site=name, run=run, instance="0" * 32))
                refused = peer.await_message(protocol.Refused)
                assert (refused.code, refused.message) == ("other-run", _WHICH_RUN)
            requests = (
                protocol.StatusRequest(),
                protocol.MetricsRequest(),
                protocol.Command(action="pause"),
            )
            for request in requests:
                peer.send(request)
                assert peer.await_message(protocol.Refused).message == _WHICH_RUN
            assert [peer.pulls(run) for run in (one, two)] == [UNKNOWN] * 2
            peer.send(protocol.Join(version="0", site="spy", run="one", instance="0" * 32))
            assert peer.await_message(protocol.Welcome).run == "one"
            assert [peer.pulls(run) for run in (one, two)] == ["", UNKNOWN]
            link.run_id = two.store.run_id  # as one that has guessed it
            for request in (*requests, protocol.Declare(tensors=[("w", "F32", [700])])):
                peer.send(request)
                peer.await_message(protocol.Rejoin)
            link.run_id = None
            peer.send(protocol.Declare(tensors=[("no", "F32", [1])]))
            assert peer.await_message(protocol.Refused).code == "layout"
            peer.send(protocol.Join(version="0", site="spy", run="one", instance="0" * 32))
            peer.await_message(protocol.Welcome)
            assert not [text for text in ("two", two.store.run_id) if text in str(peer.received)]
            peer.send(protocol.StatusRequest())
            assert peer.await_message(protocol.StatusReply).run == "one"
            peer.send(protocol.Leave(reason="it has seen enough"))
        status = ask_status(f"{at}#{two.store.run_id}", DEADLINE)
        assert (status.run, [s.site for s in status.sites]) == ("two", ["b", "c"])
        with StatusClient(f"{at}#{two.store.run_id}") as client:
            assert client.training(DEADLINE) == []
        release.set()
        assert [done.result(DEADLINE) for done in sites] == [3] * 4
        assert all(result.ok for result in ended.result(DEADLINE))


def test_a_sites_key_gets_nothing_of_a_run_that_it_is_not_in(tmp_path: Path) -> None:
    kits = provision(Project("tcp://127.0.0.1:7733", PARTIES), tmp_path / "kits").kits
    keyed = {"insecure": False, "keys": "kits/server"}
    with serving(*(run_file(tmp_path, name, **keyed) for name in MODELS)) as (host, _, _):
        one, two = host.runs

        def first_answer(kit: Path, message: protocol.FromSite, run: Run | None = None) -> Any:
            with closing(
                SiteLink(host.endpoint, uuid.uuid4().bytes, load_kit(kit).credentials)
            ) as link:
                link.run_id = None if run is None else run.store.run_id
                peer = Peer(link)
                peer.send(message)
                return peer.await_message(Answers)

        for run in (None, one, two):
            refused = first_answer(kits["a"], protocol.StatusRequest(), run)
            assert refused.code == "role"
            assert "two" not in refused.message
        join = protocol.Join(version="0", site="a", run="two", instance="0" * 32)
        refused = first_answer(kits["a"], join)
        assert (refused.code, refused.message) == ("other-run", _WHICH_RUN)
        for name in ("eye", "ops"):  # the host's own people see all of its runs
            assert first_answer(kits[name], protocol.StatusRequest()).message == _WHICH_RUN
            for run in (one, two):
                status = first_answer(kits[name], protocol.StatusRequest(), run)
                assert status.run == run.config.run.name
        for run in (one, two):  # and the key in a run folder is for that run
            folder = run.store.folder
            status = first_answer(folder / "local", protocol.StatusRequest())
            assert status.run == run.config.run.name
            reply = first_answer(folder / "local", protocol.Command(action="pause"))
            assert (reply.ok, reply.run_id) == (True, run.store.run_id)
        with closing(
            SiteLink(
                host.endpoint, uuid.uuid4().bytes, load_kit(one.store.folder / "local").credentials
            )
        ) as link:
            link.run_id = two.store.run_id
            Peer(link).send(protocol.StatusRequest())
            assert Peer(link).await_message(protocol.Rejoin)


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def written(folder: Path, name: str, address: str, memory: str = "256MiB") -> Path:
    """Write a run file, as `run_file` has it."""
    config, path = run_file(folder, name, address), folder / f"{name}.toml"
    path.write_text(
        f'[run]\nname = "{name}"\nrounds = 3\n[participants]\nsites = {config.participants.sites}\n'
        f'[transfer]\nupdate = "{config.transfer.update}"\n[server]\nlisten = "{address}"\ninsecure = true\n'
        f'memory = "{memory}"\n'
    )
    return path


def started(folder: Path, *run_files: Path) -> subprocess.Popen[bytes]:
    command = "from fedcore.cli.app import server_main; server_main()"
    with (folder / "server.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-c", command, *map(str, run_files)],
            stdout=log,
            stderr=log,
            preexec_fn=heed_signals,  # noqa: PLW1509
        )


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
            assert peer.await_message(protocol.Refused).message == _WHICH_RUN
        for name in two.participants.sites:
            pool.submit(site, host.endpoint, "two", name)
        assert [result.ok for result in ended.result(DEADLINE)] == [True]
    with pytest.raises(ConfigError, match="is finished"):
        Host([one, two])


def test_the_runs_of_a_host_share_one_memory_budget(tmp_path: Path) -> None:
    total = 256 << 20
    configs = [run_file(tmp_path, name, memory="256MiB") for name in MODELS]
    shares, opened = open_shares(configs, encrypted=False, discard=False)
    with opened:
        budgets = [share.budget for share in shares]
        assert sum(b.chunks + b.outgoing + b.control for b in budgets) <= total
        assert [share.config.server.memory for share in shares] == [total // 2] * 2
        alone = Budget.of_run(configs[0], encrypted=False)
        assert budgets[0].chunks < alone.chunks * 0.55
    with pytest.raises(ConfigError, match=r"run 'one', one of 2 of this server: server\.memory"):
        Host([run_file(tmp_path, name, memory="16MiB") for name in MODELS])


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


def test_lines_about_a_peer_are_in_the_log_of_its_run_and_others_in_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    logs = {name: Lines(name) for name in MODELS}
    logger = logging.getLogger("fedcore.server")
    for handler in logs.values():
        logger.addHandler(handler)
    try:
        with (
            serving(run_file(tmp_path, "one"), run_file(tmp_path, "two")) as (host, _, _),
            closing(SiteLink(host.endpoint, uuid.uuid4().bytes)) as link,
        ):
            peer = Peer(link)
            peer.send(protocol.Join(version="0", site="x", run="one", instance="0" * 32))
            peer.await_message(protocol.Refused)
            peer.send(protocol.Join(version="0", site="c", run="two", instance="0" * 32))
            peer.await_message(protocol.Welcome)
            peer.send(protocol.Problem(message="lightning"))
            peer.send(protocol.Ready.model_construct(round=1, sets=[], weight=1))  # it needs a set
            peer.await_message(protocol.Refused)
    finally:
        for handler in logs.values():
            logger.removeHandler(handler)
    found = {name: "\n".join(handler.lines) for name, handler in logs.items()}
    assert all("refused x: this server has several runs" in text for text in found.values())
    for text in ("c joined", "lightning", "c sent a"):
        assert (text in found["one"], text in found["two"]) == (False, True), text


class Lines(logging.Handler):
    """What the log of a run would have."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.addFilter(OfRun(run))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


class Peer:
    """A peer that sends what the test wants."""

    def __init__(self, link: SiteLink) -> None:
        self.link = link
        self.received: list[protocol.FromServer] = []

    def pulls(self, run: Run) -> str:
        """Pull the model of a run; returns why not, or nothing if it comes."""
        assert run.versions.model is not None
        layout = run.versions.model.layout
        out, options = create_model(None, layout), CollectorOptions(1 << 20)
        source = [(b"", run.versions.set_id, 1)]
        collector = Collector(layout, source, out.file, out.data_offset, None, options)
        self.link.exchange.start(collector)
        self.link.kick()
        event = wait(self.link, lambda m: isinstance(m, CollectorDone | SourceRejected))
        self.link.exchange.cancel(collector)
        return event.message if isinstance(event, SourceRejected) else ""

    def send(self, message: protocol.FromSite) -> None:
        self.link.send(message)

    def await_message(self, kind: Any) -> Any:
        until = time.monotonic() + DEADLINE
        while time.monotonic() < until:
            arrived = self.link.recv(until - time.monotonic())
            if isinstance(arrived, Control):
                message = protocol.decode_from_server(arrived.body)
                self.received.append(message)
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} came")


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
