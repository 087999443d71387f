"""What has arrived when a round's deadline passes counts, in whatever order it is read."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore import protocol
from fedcore._core import Layout
from fedcore.config import parse_run
from fedcore.layout import layout_hash, table
from fedcore.model_file import create_model
from fedcore.server import service
from fedcore.server.rounds.rounds import Phase
from fedcore.server.service import Server
from fedcore.transport.link import Control

LAYOUT = Layout([("w", "F32", [1000])], protocol.DEFAULT_CHUNK_BYTES)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of three sites, two of which a round needs, whose first global model exists."""
    create_model(tmp_path / "start.safetensors", LAYOUT).file.sync()
    config = {
        "run": {"name": "t", "rounds": 3},
        "model": {"initial": "start.safetensors"},
        "participants": {"sites": ["a", "b", "c"], "min_results": 2, "round_deadline": "1h"},
        "server": {"listen": "tcp://127.0.0.1:0", "insecure": True},
    }
    made = Server(parse_run(config, folder=tmp_path))
    try:
        made._next_look = float("inf")  # these sites send no heartbeats
        made._begin()
        yield made
    finally:
        made._versions.close()
        made._access.close()
        made._link.close()
        made._store.close()


def hear(server: Server, patch: pytest.MonkeyPatch, *messages: Control) -> None:
    """Step through messages that wait, in this order, as if nothing else ever came."""
    waiting = list(messages)
    patch.setattr(server._link, "recv", lambda _: waiting.pop(0) if waiting else None)
    while waiting and not server._rounds.over:
        server._step()


def peer(site: str) -> bytes:
    return site.encode() * 16


def says(site: str, message: protocol.FromSite) -> Control:
    return Control(peer(site), protocol.encode(message))


def joins(*sites: str) -> list[Control]:
    return [
        says(site, message)
        for site in sites
        for message in (
            protocol.Join(version="0", site=site, instance=uuid.uuid4().hex),
            protocol.Declare(tensors=table(LAYOUT)),
        )
    ]


def ready(site: str) -> Control:
    return says(
        site,
        protocol.Ready(
            round=1,
            sets=[protocol.NamedSet(id=peer(site).hex(), layout=layout_hash(LAYOUT))],
            weight=1,
        ),
    )


def test_a_quorum_that_is_met_on_the_deadlines_tick_closes_the_round(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear(server, monkeypatch, *joins("a", "b", "c"))
    assert server._rounds.phase is Phase.TRAINING
    server._rounds.deadline_seconds = 0  # it passes now, while two updates wait to be heard
    hear(server, monkeypatch, ready("b"), ready("a"))
    assert server._rounds.phase is Phase.AGGREGATING
    assert [p.site for p in server._rounds.collecting] == ["a", "b"]


def test_a_round_below_its_quorum_when_the_deadline_passes_ends_the_run(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear(server, monkeypatch, *joins("a", "b", "c"))
    server._rounds.deadline_seconds = 0
    hear(server, monkeypatch, ready("b"))
    assert server._rounds.over


def test_who_sends_without_end_does_not_put_a_deadline_off(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear(server, monkeypatch, *joins("a", "b", "c"), ready("a"))
    server._rounds.deadline_seconds = 0
    monkeypatch.setattr(server._link, "recv", lambda _: says("b", protocol.Alive()))
    server._step()
    assert server._rounds.over


def test_a_site_is_noticed_when_it_has_been_silent_for_too_long_and_not_only_at_the_next_look(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    hear(server, monkeypatch, *joins("a", "b", "c"))
    heard = {peer("a"): 10_000, peer("b"): 7_400, peer("c"): 7_000}
    busy = {peer("c"): 10_900}  # chunks of it may be on their way
    clock = [10_300]
    waited: list[float] = []

    class Data:
        last_heard = staticmethod(heard.get)
        busy_until = staticmethod(lambda site: busy.get(site, 0))
        forget = staticmethod(lambda site: None)

    def wait(seconds: float) -> None:
        waited.append(round(seconds, 2))

    monkeypatch.setattr(server._link, "exchange", Data())
    monkeypatch.setattr(service, "now_ms", lambda: clock[0])
    monkeypatch.setattr(service.time, "monotonic", lambda: clock[0] / 1000)
    monkeypatch.setattr(server._link, "recv", wait)
    server._rounds.deadline_seconds = 1e9
    server._next_look = 0.0
    for now in (10_300, 10_300, 10_402, 10_402):
        clock[0] = now
        server._step()
    assert waited == [0.0, 0.1, 0.0, 0.5]  # b was heard 2.9 s before, and may be silent for 3
    states = {member.name: member.state for member in server._rounds.roster}
    assert [states[name].value for name in "abc"] == ["training", "lost", "training"]
