"""Every queue between the socket and the server has a bound, and who fills one delays nobody else."""

from __future__ import annotations

import select
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import zmq

from fedcore import protocol, transport
from fedcore._core import Exchange, MappedFile, crc32c
from fedcore.protocol import HEADER, MAGIC, PROTOCOL_VERSION, Kind
from fedcore.transport import ServerLink, control_frames

CHUNK = 64 << 10
SET = bytes(range(16))


def get(first: int, count: int) -> bytes:
    head = HEADER.pack(MAGIC, PROTOCOL_VERSION, Kind.GET, 0, 0, SET, first, count, 0, 0, 0)[:44]
    return head + crc32c(head).to_bytes(4, "little")


def publish(exchange: Exchange, path: Path, chunks: int) -> None:
    exchange.publish(SET, MappedFile.create(str(path), chunks * CHUNK), 0, chunks * CHUNK, CHUNK)


def frames(exchange: Exchange) -> list[tuple[bytes, bytes, memoryview | None]]:
    return list(iter(lambda: exchange.next_out(0), None))


def test_a_peer_that_sends_more_than_is_handled_delays_itself_alone() -> None:
    exchange = Exchange()
    for number in range(50):
        exchange.deliver(0, b"eager", *control_frames(protocol.Problem(message=str(number))))
    exchange.deliver(0, b"calm", *control_frames(protocol.StatusRequest()))
    order = [peer for peer, _ in iter(exchange.next_control, None)]
    assert order[:3] == [b"eager", b"calm", b"eager"]
    assert order.count(b"eager") == 50


def test_control_messages_beyond_the_bounds_are_lost_and_that_is_told_once() -> None:
    exchange = Exchange()
    exchange.set_limits(outgoing=1 << 20, control_per_peer=3000, control=5000)
    message = control_frames(protocol.Problem(message="x" * 900))
    for _ in range(9):
        exchange.deliver(0, b"eager", *message)
    kind, peer, waiting = exchange.next_event() or ("", b"", "")
    assert (kind, peer) == ("flooded", b"eager")
    assert "3 control messages" in waiting
    assert exchange.next_event() is None
    for peer in (b"one", b"two", b"three"):
        exchange.deliver(0, peer, *message)
    assert len(list(iter(exchange.next_control, None))) == 5  # of 5000 bytes in all
    exchange.deliver(0, b"eager", *message)
    assert exchange.next_control() is not None


def test_what_waits_of_a_peer_can_be_thrown_away() -> None:
    exchange = Exchange()
    for peer in (b"a", b"b", b"a"):
        exchange.deliver(0, peer, *control_frames(protocol.Alive()))
    exchange.discard(b"a")
    assert [peer for peer, _ in iter(exchange.next_control, None)] == [b"b"]


def test_a_peer_that_does_not_read_leaves_room_for_the_others(tmp_path: Path) -> None:
    exchange = Exchange()
    exchange.set_limits(outgoing=8 * CHUNK, control_per_peer=1 << 20, control=1 << 20)
    publish(exchange, tmp_path / "set", 64)
    exchange.deliver(0, b"stuck", get(0, 64), None)
    stuck = frames(exchange)
    assert 0 < len(stuck) < 8
    exchange.deliver(0, b"swift", get(32, 32), None)
    served = 0
    while got := frames(exchange):
        assert exchange.outgoing_bytes <= 8 * CHUNK
        assert {peer for peer, _, _ in got} == {b"swift"}
        served += len(got)
        del got
    assert served == 32


def test_a_chunk_that_goes_to_many_peers_counts_once(tmp_path: Path) -> None:
    exchange = Exchange()
    exchange.set_limits(outgoing=2 * CHUNK, control_per_peer=1 << 20, control=1 << 20)
    publish(exchange, tmp_path / "set", 4)
    for number in range(50):
        exchange.deliver(0, b"site-%d" % number, get(1, 1), None)
    got = frames(exchange)
    assert len(got) == 50
    assert exchange.outgoing_bytes == CHUNK
    del got
    assert exchange.outgoing_bytes == 0


def test_what_was_held_back_goes_on_when_something_has_gone(tmp_path: Path) -> None:
    exchange = Exchange()
    exchange.set_limits(outgoing=2 * CHUNK, control_per_peer=1 << 20, control=1 << 20)
    publish(exchange, tmp_path / "set", 8)
    exchange.deliver(0, b"site", get(0, 8), None)
    got = frames(exchange)
    assert len(got) < 8
    assert not select.select([exchange.wake_fd], [], [], 0)[0]
    got.pop()
    assert select.select([exchange.wake_fd], [], [], 0)[0]
    exchange.clear_wake()
    assert len(frames(exchange)) == 1


def test_the_system_ends_the_connection_of_a_peer_that_reads_nothing(
    pump: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "UNREAD_MS", 500)
    link = ServerLink("tcp://127.0.0.1:0")
    context: zmq.Context[Any] = zmq.Context()
    peer = context.socket(zmq.DEALER)
    try:
        chunks = 1024
        publish(link.exchange, tmp_path / "set", chunks)
        peer.setsockopt(zmq.ROUTING_ID, uuid4().bytes)
        peer.setsockopt(zmq.RCVHWM, 1)
        peer.setsockopt(zmq.RCVBUF, 4096)
        peer.setsockopt(zmq.LINGER, 0)
        peer.setsockopt(zmq.RECONNECT_IVL, -1)
        peer.connect(link.endpoint)
        peer.send(get(0, chunks))
        until = time.monotonic() + 20
        most = 0
        while not (most and link.exchange.outgoing_bytes == 0):
            assert time.monotonic() < until, "what nobody reads is kept"
            most = max(most, link.exchange.outgoing_bytes)
            time.sleep(0.01)
    finally:
        peer.close(linger=0)
        context.term()
        link.close()
