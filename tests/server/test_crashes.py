"""Real processes killed at the worst moments: what was committed stays, and the run ends with the same bytes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedcore import protocol
from fedcore.config import load_run_file
from fedcore.monitor.ask import StatusClient
from fedcore.protocol import SiteStatus
from fedcore.server.service import Server

pytestmark = pytest.mark.timeout(60)

WEIGHTS = {"a": 3, "b": 5, "c": 7}
IDLE_SECONDS = 3.0

# Tells the test when a round's training begins, and trains once the test says so.
SITE = f"""
import atexit, os, sys
import numpy as np
import fedcore.client as fl
from fedcore.client.current import get_session

name = os.environ["FEDCORE_SITE"]
atexit.register(lambda: print("outcome:", fl.outcome(), file=sys.stderr))
fl.init({{"w": np.zeros(300_000, np.float32)}})
while fl.is_running():
    w = fl.receive()["w"]
    score = {{"loss": float(np.abs(w).mean())}}
    if fl.is_evaluate():
        fl.send(metrics=score)
        continue
    task = get_session().model
    print(task.round, flush=True)
    if not sys.stdin.readline():
        sys.exit("the test has ended")
    noise = np.random.default_rng([task.seed, *name.encode()]).normal(size=w.size)
    update = np.tanh(w + noise).astype(np.float32)
    np.save(f"{{name}}-{{task.round}}.npy", update)
    fl.send({{"w": update}}, weight={WEIGHTS}[name], metrics=score)
"""


class Site:
    """A site's process that trains when it is told to."""

    def __init__(self, folder: Path, name: str, address: str) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(folder / "site.py")],
                cwd=folder,
                env={
                    **os.environ,
                    "FEDCORE_SERVER": address,
                    "FEDCORE_SITE": name,
                    "FEDCORE_INSECURE": "1",
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                preexec_fn=heed_signals,  # noqa: PLW1509
            )

    def reached(self, round_: int) -> None:
        """Wait for the training of a round to begin."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{round_}\n", self.log.read_text()

    def says(self, text: str) -> None:
        """Wait for a text in its log."""
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def go(self, rounds: int = 1) -> None:
        """Let it train in the round at hand, and in more that follow."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n" * rounds)
        self.process.stdin.flush()


class Federation:
    """A run's processes on a fixed port, so that a server that is started again is found again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = folder / "runs" / "t"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self.started: list[subprocess.Popen[str]] = []
        (folder / "site.py").write_text(SITE)

    def write(self, rounds: int = 3, linger: str = "100ms", **people: object) -> None:
        values = {"round_deadline": "50s", "idle_timeout": f"{IDLE_SECONDS:g}s", **people}
        section = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
        (self.folder / "run.toml").write_text(
            f'[run]\nname = "t"\nseed = 7\nrounds = {rounds}\n[participants]\n{section}\n'
            f'[selection]\nmetric = "loss"\nmode = "max"\n[server]\nlisten = "{self.address}"\ninsecure = true\n'
            f'linger = "{linger}"\n'
        )

    def server(self, prepare: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        with (self.folder / "server.log").open("ab") as log:
            # These tests ask the server for its status but do not watch it: it need not stay for them.
            command = (
                "from fedcore.server import status; status._WATCHER_SECONDS = 0.0; "
                + "from fedcore.cli.app import server_main; server_main()"
            )
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", command, str(self.folder / "run.toml")],
                stdout=log,
                stderr=log,
                text=True,
                preexec_fn=prepare or heed_signals,  # noqa: PLW1509
            )
        self.started.append(process)
        return process

    def site(self, name: str) -> Site:
        site = Site(self.folder, name, self.address)
        self.started.append(site.process)
        return site

    def until(self, condition: Callable[[Mapping[str, SiteStatus]], bool]) -> float:
        """Ask the server until ``condition`` holds of its sites; returns the seconds that it took."""
        began = time.monotonic()
        with StatusClient(self.address) as client:
            while not condition({site.site: site for site in client.ask(20).sites}):
                time.sleep(0.02)
        return time.monotonic() - began

    def models(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self.run / "models").iterdir())}

    def participants(self) -> list[list[str]]:
        versions = json.loads((self.run / "summary.json").read_text())["versions"]
        return [list(version["participants"]) for version in versions]

    def mean(self, round_: int, *names: str) -> np.ndarray:
        """Return the exact mean of what the named sites sent."""
        total = sum(
            WEIGHTS[name] * np.load(self.folder / f"{name}-{round_}.npy").astype(np.float64)
            for name in names
        )
        return (total / sum(WEIGHTS[name] for name in names)).astype(np.float32)

    def model(self, version: int) -> np.ndarray:
        return load_file(self.run / "models" / f"round-{version:04d}.safetensors")["w"]

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()


def heed_signals() -> None:
    """Undo the ignored SIGINT of a shell's background jobs, and the ignored SIGHUP of nohup."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def ignore_hangup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The models of a run of sites a and b in which nothing happens."""
    made = Federation(tmp_path_factory.mktemp("undisturbed"))
    try:
        made.write(sites=["a", "b"])
        server = made.server()
        for name in ("a", "b"):
            made.site(name).go(3)
        assert server.wait() == 0, (made.folder / "server.log").read_text()
        return made.models()
    finally:
        made.end()


@pytest.mark.parametrize("delivered", [False, True], ids=["all train", "one has delivered"])
def test_a_killed_server_goes_on_and_ends_with_the_same_bytes(
    federation: Federation, undisturbed: dict[str, bytes], delivered: bool
) -> None:
    federation.write(sites=["a", "b"])
    server, sites = federation.server(), [federation.site("a"), federation.site("b")]
    for site in sites:
        site.reached(1)
        site.go()
    for site in sites:
        site.reached(2)
    if delivered:
        sites[0].go()
        federation.until(lambda states: states["a"].state == "delivered")
    server.kill()
    server.wait()
    # What a crash between the rename and the journal's transaction would leave.
    (federation.run / "models" / "round-0002.safetensors").write_bytes(b"half a commit")

    again = federation.server()
    # A site that trains says nothing of its own accord for minutes: it must be known again all the same.
    federation.until(lambda states: states["b"].state == "training")
    assert list(federation.models()) == ["round-0000.safetensors", "round-0001.safetensors"]
    if not delivered:
        sites[0].go()
    sites[1].go()
    for site in sites:
        site.reached(3)
        site.go()
    assert again.wait() == 0, (federation.folder / "server.log").read_text()
    assert [site.process.wait() for site in sites] == [0, 0]
    assert "goes on after round 1" in (federation.folder / "server.log").read_text()
    assert federation.models() == undisturbed
    assert (federation.run / "final" / "model.safetensors").read_bytes() == undisturbed[
        "round-0003.safetensors"
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_ended_by_a_signal_is_waited_for_and_goes_on_with_the_same_bytes(
    federation: Federation, undisturbed: dict[str, bytes], number: signal.Signals
) -> None:
    federation.write(sites=["a", "b"])
    server, sites = federation.server(), [federation.site("a"), federation.site("b")]
    for site in sites:
        site.reached(1)
        site.go()
    for site in sites:
        site.reached(2)
    sites[0].go()
    federation.until(lambda states: states["a"].state == "delivered")
    server.send_signal(number)
    assert server.wait() == 128 + number
    for site in sites:
        site.says(f"has stopped because it was ended by {number.name}; waiting for it")
    log = (federation.folder / "server.log").read_text()
    assert f"ended by {number.name}; the run goes on once the server is started again" in log
    assert "best model" not in log
    again = federation.server()
    sites[1].go()
    for site in sites:
        site.go()
    assert again.wait() == 0, (federation.folder / "server.log").read_text()
    assert [site.process.wait() for site in sites] == [0, 0]
    assert federation.models() == undisturbed


def test_a_server_started_under_nohup_outlives_its_terminal(
    federation: Federation, undisturbed: dict[str, bytes]
) -> None:
    federation.write(sites=["a", "b"])
    server = federation.server(ignore_hangup)
    sites = [federation.site("a"), federation.site("b")]
    for site in sites:
        site.reached(1)
    server.send_signal(signal.SIGHUP)
    for site in sites:
        site.go(3)
    assert server.wait() == 0, (federation.folder / "server.log").read_text()
    assert federation.models() == undisturbed


def test_a_site_that_dies_with_the_server_is_not_waited_for_until_the_deadline(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    federation.write(2, sites=["a", "b", "c"], min_results=2, idle_timeout="1s")
    first, sites = federation.server(), [federation.site(name) for name in "abc"]
    for site in sites:
        site.reached(1)
        site.go()
    for site in sites:
        site.reached(2)
    for process in (first, sites[2].process):
        process.kill()
        process.wait()
    sites[0].go()
    sites[1].go()
    monkeypatch.setattr(protocol, "RETURN_SECONDS", 1.0)
    caplog.set_level("INFO")
    began = time.monotonic()
    assert Server(load_run_file(federation.folder / "run.toml")).run().ok
    assert time.monotonic() - began < 30
    assert "expecting a, b, c back within 2 s" in caplog.text
    assert "c is lost: it did not come back" in caplog.text
    assert federation.participants() == [[], ["a", "b", "c"], ["a", "b"]]
    assert np.array_equal(federation.model(2), federation.mean(2, "a", "b"))


def test_the_sites_chosen_for_a_round_stay_chosen_when_the_server_is_killed(
    federation: Federation,
) -> None:
    federation.write(1, sites=["a", "b", "c"], sample=2, round_deadline="1h", idle_timeout="1s")
    server, sites = federation.server(), {name: federation.site(name) for name in "abc"}
    chosen: list[str] = []

    def two_train(states: Mapping[str, SiteStatus]) -> bool:
        chosen[:] = [name for name in "abc" if states[name].state == "training"]
        return len(chosen) == 2

    federation.until(two_train)
    first, second = chosen
    (other,) = set("abc") - {first, second}
    sites[first].reached(1)
    sites[first].go()
    federation.until(lambda states: states[first].state == "delivered")
    sites[other].process.send_signal(signal.SIGSTOP)  # a new choice would wait for it
    server.kill()
    server.wait()
    again = federation.server()
    federation.until(lambda states: states[first].state == "delivered")
    sites[second].reached(1)
    sites[second].go()
    federation.until(lambda states: not any(s.state == "training" for s in states.values()))
    sites[other].process.send_signal(signal.SIGCONT)
    assert again.wait() == 0, (federation.folder / "server.log").read_text()
    assert federation.participants() == [[], [first, second]]
    assert np.array_equal(federation.model(1), federation.mean(1, first, second))


def test_a_killed_site_is_noticed_and_the_mean_is_that_of_the_others(
    federation: Federation,
) -> None:
    federation.write(2, sites=["a", "b", "c"], min_results=2)
    server = federation.server()
    sites = {name: federation.site(name) for name in "abc"}
    for site in sites.values():
        site.reached(1)
        site.go()
    for site in sites.values():
        site.reached(2)
    sites["a"].go()
    sites["b"].go()
    federation.until(
        lambda states: (
            [states[name].state for name in "abc"] == ["delivered", "delivered", "training"]
        )
    )
    sites["c"].process.kill()
    killed = time.monotonic()
    assert server.wait() == 0
    assert time.monotonic() - killed < 20
    summary = json.loads((federation.run / "summary.json").read_text())
    silent = re.fullmatch(r"nothing heard for (\d+\.\d) s", summary["sites"]["c"]["message"])
    assert silent is not None
    assert IDLE_SECONDS <= float(silent[1]) < IDLE_SECONDS + 1.5
    assert federation.participants() == [[], ["a", "b", "c"], ["a", "b"]]
    assert np.array_equal(federation.model(1), federation.mean(1, "a", "b", "c"))
    assert np.array_equal(federation.model(2), federation.mean(2, "a", "b"))


def test_a_killed_site_that_is_started_again_takes_part_in_a_later_round(
    federation: Federation,
) -> None:
    federation.write(3, sites=["a", "b", "c"], min_results=2, idle_timeout="2s")
    server = federation.server()
    sites = {name: federation.site(name) for name in "abc"}
    for site in sites.values():
        site.reached(1)
    sites["c"].process.kill()
    sites["a"].go()
    sites["b"].go()
    sites["a"].reached(2)
    sites["b"].reached(2)
    back = federation.site("c")
    back.reached(2)
    for site in (sites["a"], sites["b"], back):
        site.go(2)
    assert server.wait() == 0
    assert federation.participants() == [[], ["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]
    assert np.array_equal(federation.model(3), federation.mean(3, "a", "b", "c"))


def test_a_killed_site_that_is_started_again_at_once_gets_its_place_back(
    federation: Federation,
) -> None:
    federation.write(1, sites=["a", "b"], idle_timeout="2s")
    server, a, b = federation.server(), federation.site("a"), federation.site("b")
    a.reached(1)
    b.reached(1)
    # The server can't tell a process that was just killed from one that is there. This one is killed late, so that
    # however slowly the next one starts, the server has not noticed yet.
    again = federation.site("b")
    again.says("site b is still held by an earlier connection")
    b.process.kill()
    b.process.wait()
    again.reached(1)
    assert again.log.read_text().count("site b is still held by an earlier connection") == 1
    a.go()
    again.go()
    assert server.wait() == 0
    assert federation.participants() == [[], ["a", "b"]]
    log = (federation.folder / "server.log").read_text()
    assert log.count("refused b: another process takes part") == 1


def test_ctrl_c_at_the_server_keeps_the_last_round_and_the_sites_end_in_peace(
    federation: Federation,
) -> None:
    federation.write(sites=["a", "b"])
    server, sites = federation.server(), [federation.site("a"), federation.site("b")]
    for site in sites:
        site.reached(1)
        site.go()
    for site in sites:
        site.reached(2)
    server.send_signal(signal.SIGINT)
    for site in sites:
        site.go()
    assert server.wait() == 130
    assert [site.process.wait() for site in sites] == [0, 0]
    assert list(federation.models()) == ["round-0000.safetensors", "round-0001.safetensors"]
    final = load_file(federation.run / "final" / "model.safetensors")
    assert np.array_equal(final["w"], federation.mean(1, "a", "b"))


def test_ctrl_c_at_a_site_is_known_at_once(federation: Federation) -> None:
    federation.write(1, sites=["a", "b"], min_results=1, idle_timeout="40s")
    server, a, b = federation.server(), federation.site("a"), federation.site("b")
    a.reached(1)
    b.reached(1)
    a.go()
    federation.until(lambda states: states["a"].state == "delivered")
    b.process.send_signal(signal.SIGINT)
    assert b.process.wait() == -signal.SIGINT
    interrupted = time.monotonic()
    assert server.wait() == 0
    assert time.monotonic() - interrupted < 10
    assert federation.participants() == [[], ["a"]]
