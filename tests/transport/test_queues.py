"""Every queue between the socket and the server has a bound, and who fills one delays nobody else."""

from __future__ import annotations

import select
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import zmq

from fedcore import protocol
from fedcore._core import (
    Collector,
    CollectorOptions,
    ConnectionsExceeded,
    Exchange,
    Layout,
    MappedFile,
    PeerUnknown,
    RateExceeded,
)
from fedcore.protocol import Kind, control_frames, read_header
from fedcore.protocol import frame_header as header
from fedcore.security.door import Secured
from fedcore.security.keys import AllowList, Credentials, KeyPair
from fedcore.transport import link as transport
from fedcore.transport.link import Control, ServerLink, SiteLink

from ..support.links import wait

CHUNK = 64 << 10
SET = bytes(range(16))


def get(first: int, count: int) -> bytes:
    return header(Kind.GET, SET, first, count)


def publish(exchange: Exchange, path: Path, chunks: int) -> None:
    exchange.publish(SET, MappedFile.create(str(path), chunks * CHUNK), 0, chunks * CHUNK, CHUNK)


def frames(exchange: Exchange) -> list[tuple[bytes, bytes, memoryview | None]]:
    return list(iter(lambda: exchange.next_out(0), None))


def handed_out(exchange: Exchange, now_ms: int = 0) -> list[tuple[bytes, bytes]]:
    return list(iter(lambda: exchange.next_control(now_ms), None))


def test_a_peer_that_sends_more_than_is_handled_delays_itself_alone() -> None:
    exchange = Exchange()
    for number in range(50):
        exchange.deliver(0, b"eager", *control_frames(protocol.Problem(message=str(number))))
    exchange.deliver(0, b"calm", *control_frames(protocol.StatusRequest()))
    order = [peer for peer, _ in handed_out(exchange)]
    assert order[:3] == [b"eager", b"calm", b"eager"]
    assert order.count(b"eager") == 50


def test_control_messages_beyond_the_bounds_are_lost_and_that_is_told_once() -> None:
    exchange = Exchange()
    exchange.set_limits(outgoing=1 << 20, control_per_peer=3000, control=5000)
    message = control_frames(protocol.Problem(message="x" * 900))
    for _ in range(9):
        exchange.deliver(0, b"eager", *message)
    event = exchange.next_event()
    assert isinstance(event, RateExceeded)
    assert event.peer == b"eager"
    assert "3 control messages" in event.message
    assert exchange.next_event() is None
    for peer in (b"one", b"two", b"three"):
        exchange.deliver(0, peer, *message)
    assert len(handed_out(exchange)) == 5  # of 5000 bytes in all
    exchange.deliver(0, b"eager", *message)
    assert exchange.next_control(0) is not None


def test_what_waits_of_a_peer_can_be_thrown_away() -> None:
    exchange = Exchange()
    for peer in (b"a", b"b", b"a"):
        exchange.deliver(0, peer, *control_frames(protocol.Alive()))
    exchange.discard(b"a")
    assert [peer for peer, _ in handed_out(exchange)] == [b"b"]


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
        until = time.monotonic() + 200
        most = 0
        while not (most and link.exchange.outgoing_bytes == 0):
            assert time.monotonic() < until, "what nobody reads is kept"
            most = max(most, link.exchange.outgoing_bytes)
            time.sleep(0.01)
    finally:
        peer.close(linger=0)
        context.term()
        link.close()


def paced() -> Exchange:
    exchange = Exchange()
    exchange.set_limits(outgoing=1 << 20, control_per_peer=8 << 20, control=16 << 20, paced=True)
    return exchange


def ping() -> bytes:
    return header(Kind.PING)


def events(exchange: Exchange) -> list[tuple[Any, ...]]:
    return [e for e in iter(exchange.next_event, None) if not isinstance(e, PeerUnknown)]


UNHEARD, MUTED = 4, 5
BURST, RATE = 2000, 1000


def test_a_key_that_says_more_than_its_rate_waits_and_others_do_not() -> None:
    exchange = paced()
    message = control_frames(protocol.Alive())
    handled = 0
    for _ in range(3):  # its connections share one rate
        for number in range(800):
            exchange.deliver(0, b"site/a/1\0%d" % (number % 3), *message)
        handled += len(handed_out(exchange))
    assert handled == BURST
    exchange.deliver(0, b"site/b/2\0x", *message)
    assert [peer for peer, _ in handed_out(exchange)] == [b"site/b/2\0x"]
    assert len(handed_out(exchange, 100)) == RATE // 10
    assert len(handed_out(exchange, 10_000)) == 400 - RATE // 10
    assert events(exchange) == []


def test_a_key_that_says_much_at_once_waits_by_its_bytes() -> None:
    exchange = paced()
    message = control_frames(protocol.Declare(tensors=[("w" * 1000, "F32", [1])] * 4000))
    size = len(message[1])
    assert 4_000_000 < size < protocol.MAX_CONTROL_BYTES
    seconds = 0
    handled = []
    for _ in range(20):
        exchange.deliver(seconds * 1000, b"site/a/1\0x", *message)
        handled += handed_out(exchange, seconds * 1000)
    assert len(handled) == (32 << 20) // size + 1
    assert not handed_out(exchange, 1000)
    assert handed_out(exchange, 10_000)


def test_what_waits_counts_for_a_key_and_not_for_each_connection() -> None:
    exchange = paced()
    message = control_frames(protocol.Alive())
    for number in range(5000):
        exchange.deliver(0, b"site/a/1\0%d" % (number % 30), *message)
    (event,) = events(exchange)
    assert isinstance(event, RateExceeded)
    assert event.peer.partition(b"\0")[0] == b"site/a/1"
    assert "1024 control messages" in event.message


def test_keys_that_fill_the_queue_leave_room_for_a_first_message_of_another() -> None:
    exchange = paced()
    big = control_frames(protocol.Declare(tensors=[("w" * 1000, "F32", [1])] * 4000))
    for key in range(20):
        exchange.deliver(0, b"site/k%d/1\0x" % key, *big)
    exchange.deliver(0, b"site/a/1\0x", *control_frames(protocol.StatusRequest()))
    assert b"site/a/1\0x" in [peer for peer, _ in handed_out(exchange)]


def declared(size: int) -> tuple[bytes, bytes]:
    """Return a message of nearly so many bytes."""
    per_tensor = (
        len(control_frames(protocol.Declare(tensors=[("w" * 1000, "F32", [1])] * 9))[1]) / 9
    )
    return control_frames(
        protocol.Declare(tensors=[("w" * 1000, "F32", [1])] * int(size / per_tensor))
    )


def test_a_key_whose_message_finds_the_queue_filled_by_others_is_not_blamed() -> None:
    exchange = paced()
    for key in range(300):
        exchange.deliver(0, b"site/k%d/1\0x" % key, *declared(110_000))
    assert 140 < len(handed_out(exchange)) < 160
    assert events(exchange) == []


def test_keys_beyond_their_rate_leave_half_of_the_queue_to_those_who_keep_to_it() -> None:
    exchange = paced()
    big = declared((4 << 20) - 2000)
    for peer in (b"site/a/1\0x", b"site/b/2\0x"):
        for _ in range(9):
            exchange.deliver(0, peer, *big)
            handed_out(exchange)
        for _ in range(2):
            exchange.deliver(0, peer, *big)
    assert handed_out(exchange) == []
    exchange.deliver(0, b"site/c/3\0x", *declared(40_000))
    assert [peer for peer, _ in handed_out(exchange)] == [b"site/c/3\0x"]


def test_a_key_has_so_many_connections_and_no_more_and_silent_ones_make_room() -> None:
    exchange = paced()
    verdicts = [exchange.deliver(0, b"site/a/1\0%d" % number, ping(), None) for number in range(40)]
    assert verdicts == [0] * 32 + [UNHEARD] * 8
    assert events(exchange) == [
        ConnectionsExceeded(b"site/a/1\x0032", "more than 32 connections at once")
    ]
    assert exchange.deliver(0, b"site/b/2\0x", ping(), None) == 0
    assert exchange.deliver(9000, b"site/a/1\x000", ping(), None) == 0
    assert exchange.deliver(11_000, b"site/a/1\x0050", ping(), None) == 0
    assert exchange.deliver(11_000, b"site/a/1\x000", ping(), None) == 0


@pytest.mark.parametrize(
    ("frame", "count"),
    [(ping(), 20_000), (get(0, 1), 20_000), (b"x" * 48, 5000)],
    ids=["pings", "requests", "malformed frames"],
)
def test_a_key_that_sends_frames_without_end_is_named_and_not_heard(
    frame: bytes, count: int
) -> None:
    exchange = paced()
    verdicts = [exchange.deliver(0, b"site/a/1\0x", frame, None) for _ in range(count + 1000)]
    while exchange.next_out(0) is not None:
        pass
    assert verdicts.index(MUTED) == count
    assert set(verdicts[count:]) == {MUTED}
    assert exchange.deliver(0, b"site/b/2\0x", ping(), None) == 0
    assert exchange.deliver(1000, b"site/a/1\0x", frame, None) != MUTED
    floods = [event for event in events(exchange) if isinstance(event, RateExceeded)]
    assert [event.peer for event in floods] == [b"site/a/1\0x"]


def test_a_flood_that_goes_on_is_told_once_and_another_one_later_again() -> None:
    exchange = paced()
    for _ in range(20_000):
        exchange.deliver(0, b"site/a/1\0x", ping(), None)
    for now in range(1, 3000):
        for _ in range(10):  # twice the rate
            exchange.deliver(now, b"site/a/1\0x", ping(), None)
        while exchange.next_out(now) is not None:
            pass
    assert [type(event) for event in events(exchange)] == [RateExceeded]
    for _ in range(20_001):
        exchange.deliver(60_000, b"site/a/1\0x", ping(), None)
    assert [type(event) for event in events(exchange)] == [RateExceeded]


def test_chunks_that_nobody_asked_for_have_the_rate_of_other_frames() -> None:
    exchange = paced()
    layout = Layout([("w", "F32", [CHUNK // 2])], CHUNK)
    out = MappedFile.anonymous(layout.total_bytes)
    exchange.start(
        Collector(layout, [(b"site/a/1\0x", SET, 1)], out, 0, None, CollectorOptions(64 << 20))
    )
    head = header(Kind.CHUNK, SET, 1000, body=b"x")
    verdicts = [exchange.deliver(0, b"site/a/1\0x", head, b"x") for _ in range(21_000)]
    assert verdicts.index(MUTED) == 20_000


def chunk(size: int, index: int = 0) -> tuple[bytes, bytes]:
    body = bytes(size)
    return header(Kind.CHUNK, SET, index, body=body), body


@pytest.mark.parametrize(
    "frame",
    [chunk(1 << 20), (b"x" * 48, bytes(1 << 20)), (b"", bytes(1 << 20))],
    ids=["chunks", "malformed frames", "messages that are none"],
)
def test_what_nobody_asked_for_is_counted_by_its_bytes(frame: tuple[bytes, bytes]) -> None:
    exchange = Exchange()
    exchange.set_limits(1 << 20, 1 << 20, 1 << 20, paced=True, unasked=64 << 20)
    verdicts = [exchange.deliver(0, b"site/a/1\0x", *frame) for _ in range(70)]
    assert verdicts.index(MUTED) == 65
    assert exchange.deliver(0, b"site/a/1\0y", ping(), None) == MUTED
    assert exchange.deliver(0, b"site/b/2\0x", ping(), None) == 0
    (flood,) = [event for event in events(exchange) if isinstance(event, RateExceeded)]
    assert flood == RateExceeded(b"site/a/1\0x", "more than 64 MiB that nobody asked for")
    verdicts = [exchange.deliver(1000, b"site/a/1\0x", *frame) for _ in range(20)]
    assert verdicts.index(MUTED) == 16  # a second's worth


def test_chunks_that_were_asked_for_have_no_bound_of_bytes() -> None:
    exchange = Exchange()
    exchange.set_limits(1 << 20, 1 << 20, 1 << 20, paced=True, unasked=1 << 20)
    layout = Layout([("w", "I8", [16 << 20])], 1 << 20)
    out = MappedFile.anonymous(layout.total_bytes)
    exchange.start(
        Collector(layout, [(b"site/a/1\0x", SET, 1)], out, 0, None, CollectorOptions(64 << 20))
    )
    verdicts = []
    while (request := exchange.next_out(0)) is not None:
        asked = read_header(request[1])
        for index in range(asked.index, asked.index + asked.count):
            verdicts.append(exchange.deliver(0, b"site/a/1\0x", *chunk(1 << 20, index)))
    assert (len(verdicts), MUTED in verdicts) == (16, False)


@pytest.mark.parametrize("pump", ["compiled", "python"])
def test_a_message_of_too_many_parts_is_counted_by_its_bytes(
    pump: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDCORE_PUMP", pump)
    pair, own = KeyPair.generate(), KeyPair.generate()
    allowed = AllowList.of([("a", "site", own.public)])
    server = ServerLink("tcp://127.0.0.1:0", Secured(pair, allowed))
    server.exchange.set_limits(1 << 20, 1 << 20, 1 << 20, paced=True, unasked=1 << 20)
    site = SiteLink(server.endpoint, bytes(16), Credentials(pair.public, own))
    try:
        for _ in range(2):  # once the second one is here, the first one has opened the door
            site.send(protocol.Alive())
        for _ in range(2):
            wait(server, lambda arrived: isinstance(arrived, Control))
        # Many times more than the bound, so that what its rate forgives meanwhile does not matter.
        site.command([b"S", b"", ping(), *[bytes(1 << 20)] * 64])
        site.command([b"S", b"", ping()])
        arrived: Any = None
        until = time.monotonic() + 200
        while not isinstance(arrived, RateExceeded) and time.monotonic() < until:
            site.command([b"S", b"", ping()])
            arrived = server.recv(0.5)
        assert isinstance(arrived, RateExceeded)
        assert arrived.message == "more than 1 MiB that nobody asked for"
    finally:
        site.close()
        server.close()


def test_in_plain_text_frames_of_any_number_of_names_leave_nothing_behind() -> None:
    exchange = Exchange()
    for number in range(10_000):
        exchange.deliver(0, b"%d" % number, b"x" * 48, None)
    assert exchange.stats()["owners"] == 0


def test_a_muted_key_is_heard_on_none_of_its_connections_until_its_time_is_over() -> None:
    exchange = paced()
    alive = control_frames(protocol.Alive())
    for peer in (b"site/a/1\0x", b"site/a/1\0y", b"site/b/2\0x"):
        exchange.deliver(0, peer, *alive)
    exchange.mute(b"site/a/1\0x", 500)
    assert [peer for peer, _ in handed_out(exchange)] == [b"site/b/2\0x"]
    assert exchange.deliver(499, b"site/a/1\0y", *alive) == MUTED
    assert exchange.deliver(499, b"site/b/2\0x", *alive) == 0
    assert exchange.deliver(500, b"site/a/1\0y", *alive) == 0


def test_a_key_that_is_muted_and_then_revoked_has_no_more_time() -> None:
    exchange = paced()
    alive = control_frames(protocol.Alive())
    exchange.mute(b"site/a/1\0x", 500)
    assert exchange.deliver(1, b"site/a/1\0x", *alive) == MUTED
    exchange.block(b"site/a/1", True)
    assert exchange.deliver(2, b"site/a/1\0x", *alive) == UNHEARD


def test_what_is_known_of_owners_is_forgotten_with_their_connections() -> None:
    exchange = paced()
    most = 0
    for number in range(100_000):  # a hundred a second
        exchange.deliver(number * 10, b"site/%d/1\0x" % number, ping(), None)
        exchange.next_out(0)
        if number % 1000 == 0:
            most = max(most, exchange.stats()["owners"])
    assert 60_000 < most < 75_000
    assert exchange.stats()["owners"] < 40_000


def test_requests_beyond_those_that_may_wait_are_refused_as_busy(tmp_path: Path) -> None:
    exchange = Exchange()
    publish(exchange, tmp_path / "set", 4)
    for _ in range(1024 + 76):
        exchange.deliver(0, b"eager", get(0, 1), None)
    exchange.deliver(0, b"calm", get(1, 1), None)
    heads = [(peer, read_header(header)) for peer, header, _ in frames(exchange)]
    replies = [(peer, head.kind, head.count) for peer, head in heads]
    busy = [reply for reply in replies if reply[1] == Kind.REFUSE]
    assert busy == [(b"eager", Kind.REFUSE, 3)] * 76
    assert replies.index((b"calm", Kind.CHUNK, 0)) < 80
