"""The small DEALER that virtual sites have speaks with a real ROUTER."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
import zmq

from fedcore.errors import ProtocolError
from fedcore.transport.many_links import ManyLinks
from fedcore.transport.zmtp import Incoming, message, opening

IDENTITY = bytes(range(16))
SIZES = (0, 1, 255, 256, 70_000)
LONGEST = 70_000


@pytest.fixture
def router() -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as made:
        made.setsockopt(zmq.RCVTIMEO, 10_000)
        made.setsockopt(zmq.LINGER, 0)
        made.bind("tcp://127.0.0.1:*")
        yield made


def dial(router: zmq.Socket[bytes]) -> socket.socket:
    port = int(router.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
    net = socket.create_connection(("127.0.0.1", port), timeout=200)
    net.sendall(opening(IDENTITY))
    return net


def test_frames_of_all_sizes_reach_a_router_and_come_back(router: zmq.Socket[bytes]) -> None:
    frames = [bytes([number]) * size for number, size in enumerate(SIZES)]
    with dial(router) as net:
        incoming, came = Incoming(LONGEST), list[list[bytes]]()
        while not incoming.ready:
            came += incoming.feed(net.recv(10_000))
        net.sendall(b"".join(message(frames)) * 2)
        assert router.recv_multipart() == [IDENTITY, *frames]
        router.send_multipart(router.recv_multipart())
        while not came:
            came += incoming.feed(net.recv(10_000))
    assert came == [frames]


def test_bytes_may_come_one_by_one_and_many_messages_at_once() -> None:
    greeting = opening(b"x")  # a peer's begins alike
    frames = [b"a" * 300, b"", b"b"]
    stream = greeting + b"".join(message(frames)) + b"".join(message([b"c"]))
    incoming = Incoming(LONGEST)
    single = [found for byte in stream for found in incoming.feed(bytes([byte]))]
    assert single == list(Incoming(LONGEST).feed(stream)) == [frames, [b"c"]]


def test_a_frame_that_is_too_long_is_refused_before_it_comes() -> None:
    head, _ = message([bytes(LONGEST + 1)])
    incoming = Incoming(LONGEST)
    with pytest.raises(ProtocolError, match="frame of 70,001 bytes"):
        list(incoming.feed(opening(b"x") + bytes(head)))


def test_a_message_without_end_is_refused() -> None:
    begun = b"".join(message([b"a"] * 9)[:-2])
    incoming = Incoming(LONGEST)
    with pytest.raises(ProtocolError, match="over 8 frames"):
        list(incoming.feed(opening(b"x") + begun * 2))


def test_a_server_that_wants_keys_is_no_server_for_plain_connections() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as secured:
        secured.setsockopt(zmq.CURVE_SERVER, 1)
        secured.setsockopt(zmq.CURVE_SECRETKEY, zmq.curve_keypair()[1])
        secured.bind("tcp://127.0.0.1:*")
        address = secured.getsockopt_string(zmq.LAST_ENDPOINT)
        with closing(ManyLinks(address, [("a", IDENTITY)])) as links:
            events = iter(lambda: list(links.step(0.1)), None)
            with pytest.raises(ProtocolError, match="encrypted"):
                all(event == [] for event in events)


@pytest.mark.parametrize("peer", [b"HTTP/1.1 400 Bad Request\r\n".ljust(64), b"\xff" * 64])
def test_something_that_is_no_server_is_named(peer: bytes) -> None:
    with pytest.raises(ProtocolError, match="does not speak ZMTP"):
        list(Incoming(LONGEST).feed(peer))
