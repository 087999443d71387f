"""Nothing polls: rounds follow one another though no timer ever ends a wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedcore.server.service import Server
from fedcore.server.timing import Timing
from fedcore.site import connection, progress
from fedcore.transport import link as transport
from fedcore.transport.link import Control, DataEvent

from ..support.runs import run_config, site

ROUNDS = 20
NEVER = 3600.0
GOODBYE = 0.2  # how long a server whose run is over waits for the sites to leave, at a time


def test_every_wait_of_a_run_is_ended_by_what_it_waits_for(
    pump: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heartbeats would end waits, too, so there are none."""
    receive = transport.Link.recv

    def patient(link: transport.Link, timeout: float | None) -> Control | DataEvent | None:
        return receive(link, NEVER if timeout is None or timeout > GOODBYE else timeout)

    monkeypatch.setattr(transport.Link, "recv", patient)
    monkeypatch.setattr(transport, "HEARTBEAT_MS", round(1000 * NEVER))
    monkeypatch.setattr(connection, "CHECK_SECONDS", NEVER)
    monkeypatch.setattr(progress, "IDLE_SECONDS", NEVER)
    config = run_config(
        tmp_path, sites=["a", "b"], rounds=ROUNDS, idle_timeout="1h", round_deadline="5h"
    )
    server, ended = Server(config, timing=Timing(check=NEVER)), queue.SimpleQueue[tuple[str, Any]]()
    parts: dict[str, Callable[[], Any]] = {
        "server": lambda: server.run().ok,
        "a": lambda: site(server.endpoint, "a", 1),
        "b": lambda: site(server.endpoint, "b", 3),
    }
    for name, part in parts.items():  # who waits for ever is not waited for
        threading.Thread(
            target=lambda name=name, part=part: ended.put((name, part())), daemon=True
        ).start()
    try:
        found = dict(ended.get(timeout=200) for _ in parts)
    finally:
        server.stop()
    assert found == {"server": True, "a": ROUNDS, "b": ROUNDS}
