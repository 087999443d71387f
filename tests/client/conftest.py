"""A run of one site, in which this process takes part."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

import fedcore.client
from fedcore.client.torch import forget_site
from fedcore.config import parse_run
from fedcore.server.outcome import RunResult
from fedcore.server.service import Server

ROUNDS = 3


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Future[RunResult]]:
    """A server for one site, and this process as that site."""
    config = parse_run(
        {
            "run": {"name": "t", "rounds": ROUNDS},
            "participants": {"sites": ["a"], "round_deadline": "300s", "idle_timeout": "60s"},
            "selection": {"metric": "val_loss", "mode": "min"},
            "server": {"listen": "tcp://127.0.0.1:0", "insecure": True},
        },
        folder=tmp_path,
    )
    server = Server(config)
    monkeypatch.setenv("FEDCORE_SERVER", server.endpoint)
    monkeypatch.setenv("FEDCORE_SITE", "a")
    monkeypatch.setenv("FEDCORE_INSECURE", "1")
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(server.run)
        try:
            yield result
        finally:
            fedcore.client.shutdown()
            forget_site()
            server.stop()
