"""How often a key may knock, what a stranger may send, and what the log says of it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from fedcore import protocol
from fedcore._core import FrameMalformed
from fedcore.protocol import control_frames
from fedcore.security import door as admission
from fedcore.security.connections import Connections, Limits
from fedcore.security.door import Doorkeeper
from fedcore.security.keys import Credentials, KeyPair
from fedcore.transport.link import Control

from ..support.links import DEADLINE, Links, Parties, wait
from ..support.relay import Relay


class Door:
    """A doorkeeper that guards nothing, with a clock that the test drives."""

    def __init__(self, parties: Parties, limits: Limits) -> None:
        self.now = 0.0
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.keeper = Doorkeeper(self.context, parties.secured(limits), lambda: self.now)

    def knock(self, public: str) -> bytes:
        return self.keeper.decide(public, "192.0.2.7")[0]


@pytest.fixture
def door(parties: Parties) -> Iterator[Door]:
    found = Door(parties, Limits(burst=3, per_second=0.5, unknown_burst=2, unknown_per_second=1))
    yield found
    found.keeper.close()
    found.context.term()


def test_a_key_that_knocks_too_often_waits_and_others_do_not(
    door: Door, parties: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    north, south = parties.keys["north"].public, parties.keys["south"].public
    assert [door.knock(north) for _ in range(5)] == [b"200"] * 3 + [b"300"] * 2
    assert door.knock(south) == b"200"
    door.now += 2.0
    assert [door.knock(north) for _ in range(2)] == [b"200", b"300"]
    assert "north knocks too often, from 192.0.2.7" in caplog.text


def test_strangers_are_refused_then_left_to_wait_and_cost_a_log_line_a_second(
    door: Door, parties: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    answers = []
    for _ in range(1000):
        answers.append(door.knock(KeyPair.generate().public if len(answers) < 5 else "0" * 40))
        door.now += 0.01
    assert answers[:3] == [b"400", b"400", b"300"]
    assert 10 <= answers.count(b"400") <= 12
    assert len([r for r in caplog.records if "not on the allow-list" in r.message]) <= 11
    assert door.knock(parties.keys["north"].public) == b"200"


def test_what_is_remembered_of_keys_is_bounded(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "MAX_BUCKETS", 2)
    everyone = Parties()
    for i in range(9):
        everyone.add(f"s{i}")
    door.keeper.allowed = everyone.allowed
    assert {door.knock(pair.public) for pair in everyone.keys.values()} == {b"200"}
    assert len(door.keeper.buckets) <= 2


def test_a_number_that_is_no_connection_any_more_leaves_no_file_open(
    door: Door, tmp_path: Path
) -> None:
    with (tmp_path / "file").open("wb") as other:
        lowest = os.dup(other.fileno())
        os.close(lowest)
        door.keeper.count(zmq.EVENT_ACCEPTED, other.fileno())
        door.keeper.cut(other.fileno(), "is a file")
        again = os.dup(other.fileno())
        os.close(again)
    assert again == lowest


def dial(endpoint: str) -> socket.socket:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(0.2)
    return connection


def until_over(connections: list[socket.socket], count: int) -> int:
    """Wait until so many of the connections have been ended by the other side; returns how many have."""
    until = time.monotonic() + DEADLINE
    while (ended := sum(map(over, connections))) < count and time.monotonic() < until:
        pass
    return ended


def test_connections_over_the_limit_are_cut_and_the_others_go_on(
    pump: str, links: Links, parties: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    server = links.server(parties.secured(Limits(connections=5)))
    north = links.site(server.endpoint, parties.credentials("north"))
    north.send(protocol.Problem(message="first"))
    wait(server, lambda m: isinstance(m, Control))
    with caplog.at_level(logging.WARNING, "fedcore.server"):
        idle = [dial(server.endpoint) for _ in range(12)]
        assert until_over(idle, 8) == 8
    assert "cut a connection from 127.0.0.1, which is one of more than 5 connections" in caplog.text
    north.send(protocol.Problem(message="still here"))
    wait(server, lambda m: isinstance(m, Control) and b"still here" in m.body)
    south = links.site(server.endpoint, parties.credentials("south"))  # while the door is full
    south.send(protocol.Problem(message="let in"))
    wait(server, lambda m: isinstance(m, Control) and b"let in" in m.body)
    for connection in idle:
        connection.close()


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
MIB = 1 << 20


def test_a_stranger_can_not_fill_the_servers_memory(
    pump: str, links: Links, parties: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    """libzmq takes in whatever length is announced before it knows who speaks."""
    server = links.server(parties.secured())
    north = links.site(server.endpoint, parties.credentials("north"))
    north.send(protocol.Problem(message="first"))
    wait(server, lambda m: isinstance(m, Control))
    with caplog.at_level(logging.WARNING, "fedcore.server"):
        for _ in range(20):
            stranger = dial(server.endpoint)
            with contextlib.suppress(OSError):
                stranger.sendall(GREETING + b"\x06" + (7 * MIB).to_bytes(8, "big"))
                for _ in range(16):
                    stranger.sendall(bytes(MIB // 16))
            assert until_over([stranger], 1) == 1  # it is cut long before its message has come
            stranger.close()
    assert "sent 16384 bytes before a message of it was understood" in caplog.text
    north.send(protocol.Problem(message="still here"))
    wait(server, lambda m: isinstance(m, Control) and b"still here" in m.body)


@pytest.mark.parametrize("length", [2 << 30, (1 << 63) - 1, (1 << 64) - 1])
def test_a_length_that_no_frame_has_ends_the_connection(
    links: Links, parties: Parties, length: int
) -> None:
    server = links.server(parties.secured())
    stranger = dial(server.endpoint)
    stranger.sendall(GREETING + b"\x06" + length.to_bytes(8, "big"))
    assert until_over([stranger], 1) == 1


def test_a_connection_that_never_says_who_it_is_is_cut(
    links: Links, parties: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    server = links.server(parties.secured(Limits(unproved_seconds=0.3)))
    north = links.site(server.endpoint, parties.credentials("north"))
    north.send(protocol.Problem(message="first"))
    wait(server, lambda m: isinstance(m, Control))
    with caplog.at_level(logging.WARNING, "fedcore.server"):
        half_open = [dial(server.endpoint) for _ in range(3)]
        half_open[1].sendall(GREETING[:10])
        half_open[2].sendall(GREETING)
        assert until_over(half_open, 3) == 3
    assert "proved no key in 0.3 s" in caplog.text
    assert "127.0.0.1" in caplog.text
    north.send(protocol.Problem(message="still here"))
    wait(server, lambda m: isinstance(m, Control) and b"still here" in m.body)


def test_a_key_that_is_muted_is_cut_and_heard_again_later(
    pump: str, links: Links, parties: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    server = links.server(parties.secured())
    north = links.site(server.endpoint, parties.credentials("north"))
    north.send(protocol.Problem(message="first"))
    arrived = wait(server, lambda m: isinstance(m, Control))
    assert isinstance(arrived, Control)
    with caplog.at_level(logging.WARNING, "fedcore.server"):
        server.mute(arrived.peer)
        north.send(protocol.Problem(message="not heard"))
        until = time.monotonic() + DEADLINE
        while "is not heard any more" not in caplog.text:
            assert time.monotonic() < until
            assert server.recv(0.05) is None
    server.exchange.mute(arrived.peer, 0)
    north.send(protocol.Problem(message="heard"))
    wait(server, lambda m: isinstance(m, Control) and b'"heard"' in m.body)


def test_a_connection_with_a_key_that_says_nothing_any_more_is_cut(
    links: Links,
    parties: Parties,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(admission, "SILENCE_SECONDS", 0.05)
    server = links.server(parties.secured(Limits(silent_seconds=0.3)))
    with dealer(server.endpoint, parties.credentials("north")) as silent:
        silent.send_multipart(control_frames(protocol.Alive()))
        wait(server, lambda m: isinstance(m, Control))
        until = time.monotonic() + DEADLINE
        while "was silent for 0.3 s" not in caplog.text:
            assert time.monotonic() < until
            time.sleep(0.02)


@contextlib.contextmanager
def dealer(endpoint: str, keys: Credentials) -> Iterator[zmq.Socket[bytes]]:
    """A socket that speaks with a key and does what it is told to alone."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    found = context.socket(zmq.DEALER)
    found.setsockopt(zmq.CURVE_SERVERKEY, keys.server_key.encode())
    found.setsockopt(zmq.CURVE_PUBLICKEY, keys.pair.public.encode())
    found.setsockopt(zmq.CURVE_SECRETKEY, keys.pair.secret.encode())
    found.connect(endpoint)
    try:
        yield found
    finally:
        found.close(linger=0)
        context.term()


def test_a_message_of_any_number_of_parts_does_not_fill_the_servers_memory(
    pump: str, links: Links, parties: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    """libzmq keeps all parts of a message until the last one has come."""
    server = links.server(parties.secured(Limits(unfinished_bytes=4 * MIB)))
    south = links.site(server.endpoint, parties.credentials("south"))
    south.send(protocol.Problem(message="first"))
    wait(server, lambda m: isinstance(m, Control))
    with dealer(server.endpoint, parties.credentials("north")) as hostile:
        hostile.send_multipart(control_frames(protocol.Alive()))
        wait(server, lambda m: isinstance(m, Control))
        part = zmq.Frame(bytes(MIB), copy=False)
        hostile.send_multipart([part] * 1500, copy=False)
        until = time.monotonic() + DEADLINE
        while "of a message that has no end" not in caplog.text:
            assert time.monotonic() < until
            arrived = server.recv(0.05)
            assert not isinstance(arrived, FrameMalformed), "it came whole"
    south.send(protocol.Problem(message="still here"))
    wait(server, lambda m: isinstance(m, Control) and b"still here" in m.body)


class Cuts:
    """What a door cuts for a message without end, and how often it has looked at all connections."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.why: list[str] = []
        self.looks = 0
        cut, look = Doorkeeper.cut, Connections.sweep_unfinished

        def note_cut(door: Doorkeeper, number: int, why: str) -> None:
            self.why += [why] if "no end" in why else []
            cut(door, number, why)

        def note_look(connections: Connections) -> list[tuple[int, str]]:
            found = list(look(connections))
            self.looks += 1
            return found

        patch.setattr(Doorkeeper, "cut", note_cut)
        patch.setattr(Connections, "sweep_unfinished", note_look)

    def look_again(self) -> None:
        """Wait until the door has seen all that had come when this was called."""
        seen, until = self.looks, time.monotonic() + DEADLINE
        while self.looks < seen + 3:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_live_connections_of_a_key_share_its_bound_for_messages_that_have_no_end(
    pump: str, links: Links, parties: Parties, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = Cuts(monkeypatch)
    server = links.server(parties.secured(Limits(unfinished_bytes=4 * MIB)))
    parts = [zmq.Frame(bytes(MIB // 4), copy=False)] * 14  # of one message, less than the bound

    with contextlib.ExitStack() as stack:

        def begin(name: str, size: int) -> Relay:
            """Let the first ``size`` bytes of a long message come over a new connection of a key."""
            way = stack.enter_context(Relay(server.endpoint))
            hostile = stack.enter_context(dealer(way.address, parties.credentials(name)))
            hostile.send_multipart(control_frames(protocol.Alive()))
            wait(server, lambda m: isinstance(m, Control))
            cuts.look_again()  # from here on it counts
            way.up.hold_after(size)
            before = way.up.passed
            hostile.send_multipart(parts, copy=False)
            way.up.until(lambda passed: passed > before + size - 8192)
            cuts.look_again()
            return way

        other = begin("south", 13 * MIB // 4)
        begin("north", 13 * MIB // 4)
        assert cuts.why == []
        shorter = begin("north", 5 * MIB // 2)
        assert cuts.why == ["sent 3 MiB of a message that has no end"]
        for way in (shorter, other):
            way.up.release()
        whole: set[bytes] = set()
        until = time.monotonic() + DEADLINE
        while len(whole) < 2:
            assert time.monotonic() < until
            arrived = server.recv(0.05)
            if isinstance(arrived, FrameMalformed):  # it came whole
                whole.add(arrived.peer.partition(b"\0")[0])
    assert {user.split(b"/")[1] for user in whole} == {b"north", b"south"}
    assert len(cuts.why) == 1


def over(connection: socket.socket) -> bool:
    """Whether the other end has closed this connection."""
    try:
        while connection.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return True
