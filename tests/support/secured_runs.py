"""Whole runs over encrypted links: kits, sites as threads, and a server at work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedcore import protocol
from fedcore.config import parse_run
from fedcore.security.keys import Role, load_kit
from fedcore.server.outcome import RunResult
from fedcore.server.service import Server
from fedcore.server.timing import DEFAULT, Timing
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.link import Control

from .links import DEADLINE, Links

AT_ONCE = Timing(goodbye=0.0)
"""A server that waits for nobody when its run is over."""
SPECS = [("w", "F32", [5000])]
PARTIES = {
    "a": Role.SITE,
    "b": Role.SITE,
    "c": Role.SITE,
    "eye": Role.OBSERVER,
    "ops": Role.OPERATOR,
}


def server_of(
    tmp_path: Path,
    rounds: int = 2,
    keys: str = "kits/server",
    timing: Timing = DEFAULT,
    **people: Any,
) -> Server:
    values = {
        "run": {"name": "t", "rounds": rounds},
        "participants": {"sites": ["a", "b"], "round_deadline": "300s", **people},
        "server": {"listen": "tcp://127.0.0.1:0", "keys": keys},
    }
    return Server(parse_run(values, folder=tmp_path), timing=timing)


def settings(kit: Path, address: str, connect_timeout: float = DEADLINE) -> SiteSettings:
    found = load_kit(kit)
    return SiteSettings(address, found.name, found.credentials, connect_timeout=connect_timeout)


def site(kit: Path, address: str, step: float, hold: Callable[[int], None] = lambda _: None) -> int:
    """Add ``step`` in each round; ``hold`` is called with the round before its update is sent."""
    session = Session(settings(kit, address))
    trained = 0
    try:
        while session.is_running():
            model = session.begin(SPECS, {}, lambda _: bytes(20_000))
            values = np.frombuffer(model.tensors["w"], np.float32) + np.float32(step)
            session.score({"loss": 1.0}, 1)
            if model.kind == "evaluate":
                session.end_task()
                continue
            hold(model.round)
            session.submit(lambda _, values=values: values.tobytes(), 1)
            trained += 1
    finally:
        session.close()
    return trained


def models(tmp_path: Path) -> list[float]:
    folder = tmp_path / "runs/t/models"
    return [float(load_file(path)["w"][0]) for path in sorted(folder.iterdir())]


@contextmanager
def running(server: Server) -> Iterator[tuple[ThreadPoolExecutor, Future[RunResult]]]:
    """A server at work, and threads for its sites; it is stopped at the end if it has not ended."""
    with ThreadPoolExecutor(5) as pool:
        try:
            yield pool, pool.submit(server.run)
        finally:
            server.stop()


def answer(links: Links, server: Server, kit: Path, message: protocol.FromSite) -> Any:
    """Say something with a kit's key, and return the server's answer."""
    link = links.site(server.endpoint, load_kit(kit).credentials)
    link.send(message)
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        arrived = link.recv(deadline - time.monotonic())
        if isinstance(arrived, Control):
            told = protocol.decode_from_server(arrived.body)
            if not isinstance(told, protocol.Rejoin):  # that is the answer to a ping
                return told
    raise AssertionError("no answer")


def join(name: str) -> protocol.Join:
    return protocol.Join(version="test", site=name, instance="0" * 32)
