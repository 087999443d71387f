"""Servers and sites in processes of their own, which a test kills and starts again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from fedcore.monitor.ask import StatusClient
from fedcore.protocol import SiteStatus

from .ports import free_address

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


# These tests ask the server for its status but do not watch it: it need not stay for them. A signal has the
# deadline of its round pass, so that no test depends on how fast it gets to the point where that matters.
SERVER = """
import signal
from fedcore.server import status
from fedcore.server.rounds.rounds import Rounds

def pass_deadline(*_):
    Rounds.deadline = property(lambda rounds: None if rounds.over else rounds._started)

status.WATCHER_SECONDS = 0.0
signal.signal(signal.SIGUSR1, pass_deadline)
from fedcore.cli.app import server_main
server_main()
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
        self.address = free_address()
        self.started: list[subprocess.Popen[str]] = []
        (folder / "site.py").write_text(SITE)

    def write(self, rounds: int = 3, linger: str = "100ms", **people: object) -> None:
        values = {"round_deadline": "1h", "idle_timeout": f"{IDLE_SECONDS:g}s", **people}
        section = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
        (self.folder / "run.toml").write_text(
            f'[run]\nname = "t"\nseed = 7\nrounds = {rounds}\n[participants]\n{section}\n'
            f'[selection]\nmetric = "loss"\nmode = "max"\n[server]\nlisten = "{self.address}"\ninsecure = true\n'
            f'linger = "{linger}"\n'
        )

    def server(self, prepare: Callable[[], None] | None = None) -> subprocess.Popen[str]:
        with (self.folder / "server.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", SERVER, str(self.folder / "run.toml")],
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

    def until(self, condition: Callable[[Mapping[str, SiteStatus]], bool]) -> None:
        """Ask the server until ``condition`` holds of its sites."""
        with StatusClient(self.address) as client:
            while not condition({site.site: site for site in client.ask(200).sites}):
                time.sleep(0.02)

    def pass_deadline(self, server: subprocess.Popen[str]) -> None:
        """Have the deadline of the round pass that a server is in."""
        with StatusClient(self.address) as client:
            client.ask(200)  # its handler of the signal is there
            server.send_signal(signal.SIGUSR1)
            client.ask(200)  # it goes through its loop once more

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
