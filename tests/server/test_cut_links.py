"""A link that is cut, or on which packets vanish, costs at most a window of chunks and no update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedcore.server.budget import Budget
from fedcore.server.outcome import RunResult
from fedcore.server.service import Server
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

from ..support.relay import Flow, Relay
from ..support.runs import run_config

pytestmark = pytest.mark.timeout(600)

CHUNK = 1 << 20
CHUNKS = 24
SIZE = CHUNKS * CHUNK
SPECS = [("w", "F32", [SIZE // 4])]
WINDOW = 4  # chunks of a download, here
BESIDE = 64 << 10  # headers and heartbeats
MEMORY = 16 << 20


def values(step: int) -> np.ndarray:
    return np.arange(step, step + SIZE // 4, dtype=np.float32)


def reader(step: int) -> Callable[[str], bytes]:
    return lambda _: values(step).tobytes()


@contextmanager
def begun(tmp_path: Path) -> Iterator[tuple[Server, Future[RunResult], Relay, Session]]:
    """A server, and one site behind a relay that has joined."""
    config = run_config(tmp_path, sites=["a"], rounds=1, idle_timeout="60s", round_deadline="300s")
    small = config.server.model_copy(update={"memory": MEMORY})
    server = Server(config.model_copy(update={"server": small}))
    with ThreadPoolExecutor(1) as pool, Relay(server.endpoint) as relay:
        result = pool.submit(server.run)
        try:
            settings = SiteSettings(server=relay.address, site="a")
            with closing(Session(settings)) as session:
                assert session.is_running()
                yield server, result, relay, session
        finally:
            server.stop()


def cut_in_the_middle(relay: Relay, flow: Flow, more: int) -> None:
    """Cut the link in the middle of a chunk, once ``more`` bytes have passed that were allowed."""
    flow.until(lambda passed: passed > more - 8192)
    relay.cut()
    flow.release()


def finish(session: Session) -> None:
    while session.is_running():
        session.begin(SPECS, {}, reader(0))
        session.end_task()


def test_a_download_that_is_cut_in_the_middle_resends_at_most_a_window_to_that_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcore.site.waits.WINDOW_BYTES", WINDOW * CHUNK)
    half = SIZE // 2 + CHUNK // 2
    with begun(tmp_path) as (server, _, relay, session), ThreadPoolExecutor(1) as pool:
        relay.down.hold_after(half)
        model = pool.submit(session.begin, SPECS, {}, reader(3))
        cut_in_the_middle(relay, relay.down, half)
        assert bytes(model.result(200).tensors["w"]) == values(3).tobytes()
        sent = server.link.exchange.stats()["bytes_out"]
        assert SIZE + CHUNK <= sent <= SIZE + WINDOW * CHUNK + BESIDE


def test_an_upload_that_is_cut_in_the_middle_sends_at_most_a_window_again(tmp_path: Path) -> None:
    window = Budget.of(MEMORY, 1, spill=True).chunks // CHUNK
    assert 4 <= window < CHUNKS // 2
    half = SIZE // 2 + CHUNK // 2
    with begun(tmp_path) as (_, result, relay, session):
        session.begin(SPECS, {}, reader(3))
        exchange = session.connection.link.exchange  # type: ignore[union-attr]
        before, so_far = exchange.stats()["bytes_out"], relay.up.passed
        relay.up.hold_after(half)
        session.submit(reader(4), 1)
        cut_in_the_middle(relay, relay.up, so_far + half)
        finish(session)
        sent = exchange.stats()["bytes_out"] - before
        assert SIZE + CHUNK <= sent <= SIZE + window * CHUNK + BESIDE
        assert result.result(200).ok
    final = load_file(tmp_path / "runs/t/final/model.safetensors")["w"]
    assert np.array_equal(final, values(4))


@pytest.mark.parametrize("training", [True, False], ids=["training", "uploading"])
def test_packets_that_vanish_cost_no_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    monkeypatch.setattr("fedcore.transport.link.HEARTBEAT_MS", 100)
    with begun(tmp_path) as (_, result, relay, session):
        session.begin(SPECS, {}, reader(3))
        if training:
            relay.swallow()
        else:
            relay.up.hold_after(SIZE // 2)
        session.submit(reader(4), 1)
        if not training:
            relay.up.until(lambda passed: passed > SIZE // 2 - 8192)
            relay.swallow()
            relay.up.release()
        finish(session)
        assert result.result(200).ok
        assert relay.dials >= 2
    final = load_file(tmp_path / "runs/t/final/model.safetensors")["w"]
    assert np.array_equal(final, values(4))
