"""``fedcore status``: of a running server, of its folder, and of a run that has ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedcore.cli.app import main
from fedcore.config import RunConfig, load_run_file, parse_run
from fedcore.errors import ConfigError, RefusedError
from fedcore.monitor.ask import (
    ENDPOINT_FILE,
    Target,
    ask_status,
    find_server,
    following,
    read_summary,
    snapshots,
)
from fedcore.protocol import ENDED, StatusReply
from fedcore.server.service import Server
from fedcore.server.storage.past import read_past
from fedcore.simulation.processes import simulate


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return parse_run(
        {
            "run": {"name": "t", "rounds": 2},
            "participants": {"sites": ["a", "b"]},
            "server": {"listen": "tcp://127.0.0.1:0", "insecure": True},
        },
        folder=tmp_path,
    )


@pytest.fixture
def server(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that waits for its sites."""
    server, thread = serve(config)
    yield server
    monkeypatch.setattr("fedcore.server.status.WATCHER_SECONDS", 0.0)  # nobody watches any more
    server.stop()
    thread.join(200)
    assert not thread.is_alive()


def test_a_running_server_is_found_by_address_and_by_folder(
    server: Server, fedcore: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    for target in ([server.endpoint, "--insecure"], [server.config.run_folder]):
        done = fedcore("status", *target, "--timeout=200", "--json")
        assert done.returncode == 0, done.stderr
        reply = json.loads(done.stdout)
        assert (reply["run"], reply["phase"], reply["rounds"]) == ("t", "waiting", 2)
        assert {s["site"]: s["state"] for s in reply["sites"]} == {"a": "absent", "b": "absent"}
    text = fedcore("status", server.endpoint, "--timeout=200", "--insecure").stdout
    assert "run t: waiting, round 0 of 2" in text or "run t: waiting, round 1 of 2" in text
    assert "absent" in text


def test_a_server_is_followed_at_its_pace_and_outlived(server: Server) -> None:
    seen: list[StatusReply] = []
    folder = server.config.run_folder
    with following(seen.append, folder, 3600) as tick:
        for _ in range(5):
            tick()
    assert [reply.run for reply in seen] == ["t"]
    (folder / ENDPOINT_FILE).write_text("tcp://127.0.0.1:1")  # nobody listens there
    with following(seen.append, folder, 0.01) as tick:
        tick()
    assert len(seen) == 1


def test_watching_ends_with_the_run(server: Server) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "fedcore",
        "status",
        server.endpoint,
        "--watch",
        "--timeout=200",
        "--insecure",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as watch:
        assert watch.stdout is not None
        assert "run t: waiting" in watch.stdout.readline()
        server.stop()
        _, err = watch.communicate(timeout=200)
    assert watch.returncode == 130
    assert "Traceback" not in err


def serve(config: RunConfig) -> tuple[Server, threading.Thread]:
    server = Server(config)
    (config.run_folder / ENDPOINT_FILE).write_text(server.endpoint + "\n")
    thread = threading.Thread(target=server.run)
    thread.start()
    return server, thread


RUN = """
[run]
name = "t"
rounds = 2
[participants]
sites = ["a", "b"]
[server]
listen = "tcp://127.0.0.1:0"
insecure = true
"""


@contextlib.contextmanager
def server_process(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in a process of its own until the block ends; it listens when this is entered."""
    endpoint = folder / "runs" / "t" / ENDPOINT_FILE
    endpoint.unlink(missing_ok=True)
    (folder / "run.toml").write_text(RUN)
    command = [sys.executable, "-P", "-m", "fedcore", "server", str(folder / "run.toml")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 200
            while not endpoint.is_file() or not endpoint.read_text().endswith("\n"):
                assert time.monotonic() < until
                time.sleep(0.02)
            yield process
        finally:
            process.kill()


def test_watching_goes_on_while_the_server_is_away(tmp_path: Path) -> None:
    """It is killed, and listens on another port afterwards; the run folder tells which."""
    folder = tmp_path / "runs" / "t"
    with server_process(tmp_path):
        target = find_server(folder)
        assert target is not None
        assert ask_status(target.address, 60, target.credentials).run == "t"  # it answers by now
        seen = snapshots(target, folder, 5.0)
        assert next(seen)[1] == ""
    reply, note = next(seen)
    assert (reply.run, note.partition(" for ")[0]) == ("t", f"no answer from {target.address}")
    with server_process(tmp_path) as again:
        until = time.monotonic() + 200
        while next(seen)[1]:
            assert time.monotonic() < until
        again.send_signal(signal.SIGINT)
        while next(seen)[0].phase not in ENDED:
            assert time.monotonic() < until
    seen.close()


def test_watching_goes_on_while_the_database_of_the_run_is_locked(
    reply: StatusReply, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[StatusReply | RefusedError] = [reply, RefusedError("it is locked", "busy"), reply]
    answers.append(RefusedError("this key was revoked", "revoked"))

    def ask(*_: object) -> StatusReply:
        answer = answers.pop(0)
        if isinstance(answer, RefusedError):
            raise answer
        return answer

    monkeypatch.setattr("fedcore.monitor.ask.StatusClient.ask", ask)
    seen = snapshots(Target("tcp://127.0.0.1:1"), None, 5.0)
    notes = [next(seen)[1] for _ in range(3)]
    assert (notes[0], notes[1].partition(" (for")[0], notes[2]) == ("", "it is locked", "")
    with pytest.raises(RefusedError, match="revoked"):
        next(seen)


def test_a_run_that_was_cut_off_is_read_from_its_journal(
    run_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Its summary is of the time before; the models since then are shown, too, and the whole time."""
    path = run_file(rounds=1)
    simulate(path, load_run_file(path))
    folder = tmp_path / "runs" / "t"
    before = read_past(folder)
    assert (before.phase, len(before.versions)) == ("done", 2)
    endless = ["run.rounds=1000000"]
    with pytest.raises(InterruptedError):
        simulate(path, load_run_file(path, endless), overrides=endless, tick=after(folder, 4))
    reply = read_past(folder)
    assert reply.phase == "waiting"
    assert len(reply.versions) >= 4
    assert [v.metrics["loss"] for v in reply.versions[:3]] == [0, 1, 2]
    assert reply.best_version == max(v.version for v in reply.versions if v.scored == 2)
    assert (reply.round, reply.rounds) == (reply.versions[-1].version + 1, 1_000_000)
    assert reply.elapsed > before.elapsed
    assert reply.bytes_in > before.bytes_in
    assert {site.site: site.state for site in reply.sites} == {"a": "absent", "b": "absent"}
    assert "no server works on" in reply.message


def test_the_totals_hold_what_a_server_took_before_sigterm(config: RunConfig) -> None:
    """Also what it took after its last commit."""
    before = 0.0
    for _ in range(2):
        server, thread = serve(config)
        server.interrupt("SIGTERM")
        thread.join(200)
        now = read_past(config.run_folder).elapsed
        assert now > before
        before = now


def test_a_stopped_run_is_shown_as_stopped_until_it_goes_on(config: RunConfig) -> None:
    phases = []
    for end in ("stop", "interrupt"):
        server, thread = serve(config)
        server.stop() if end == "stop" else server.interrupt("SIGTERM")
        thread.join(200)
        phases.append(read_past(config.run_folder).phase)
    assert phases == ["stopped", "waiting"]


def after(folder: Path, models: int) -> Callable[[], None]:
    """Kill the server once so many models are committed: the file of one more is there."""

    def tick() -> None:
        if len(list((folder / "models").glob("round-*.safetensors"))) > models:
            log = (folder / "logs" / "server.log").read_text()
            os.kill(int(re.findall(r"process (\d+) on", log)[-1]), signal.SIGKILL)
            raise InterruptedError

    return tick


def test_an_ended_run_is_read_from_its_summary(server: Server) -> None:
    folder = server.config.run_folder
    assert find_server(folder) == Target(server.endpoint)
    with pytest.raises(ConfigError, match="has not ended"):
        read_summary(folder)
    server.stop()
    while find_server(folder) is not None:
        pass
    reply = read_summary(folder)
    assert (reply.phase, reply.message) == ("stopped", "stopped on request")


def test_a_server_that_has_not_said_where_it_listens_is_not_found_yet(server: Server) -> None:
    folder = server.config.run_folder
    (folder / ENDPOINT_FILE).write_text("")
    assert find_server(folder) is None
    (folder / ENDPOINT_FILE).unlink()
    assert find_server(folder) is None
    (folder / ENDPOINT_FILE).write_text(server.endpoint + "\n")
    assert find_server(folder) == Target(server.endpoint)


def test_a_folder_of_a_killed_server_counts_as_not_running(server: Server) -> None:
    folder = server.config.run_folder
    server.stop()
    while find_server(folder) is not None:
        pass
    assert (folder / ENDPOINT_FILE).exists()  # nobody removed it, as after kill -9
    assert find_server(folder) is None


@pytest.mark.parametrize(
    ("target", "status", "said"),
    [
        ("tcp://127.0.0.1:1", 1, "no answer from tcp://127.0.0.1:1 within 0.2 s"),
        ("tcp://127.0.0.1:x", 2, "expected tcp://HOST:PORT"),
        ("tcp://192.0.2.1:1", 2, "--insecure is for a server on this machine"),
        ("no/such/folder", 2, "neither a run folder nor an address"),
    ],
)
def test_what_cannot_be_asked_is_explained(
    target: str, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["status", target, "--timeout", "0.2", "--insecure"])
    assert ended.value.code == status
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_run_folder_that_lost_its_journal_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    with pytest.raises(ConfigError, match="no journal .*put it back from a backup"):
        find_server(tmp_path)
