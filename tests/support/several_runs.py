"""Two runs on one port: their run files and sites, a server of both, and a peer that sends what a test wants."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fedcore import protocol
from fedcore._core import Collector, CollectorDone, CollectorOptions, SourceRejected
from fedcore.config import parse_run
from fedcore.model_file import create_model
from fedcore.security.keys import Role
from fedcore.server.host import Host
from fedcore.server.outcome import RunResult
from fedcore.server.run import Run
from fedcore.server.run_log import OfRun
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.link import Control, SiteLink

from .links import wait
from .processes import heed_signals

DEADLINE = 200.0
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
    settings = SiteSettings(address, name, run=run, connect_timeout=200, idle_timeout=patience)
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
