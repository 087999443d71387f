"""How often a key may knock, how many connections an address may hold, and what the log says of it."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Iterator

import pytest
import zmq

from fedcore import admission, protocol
from fedcore.admission import Doorkeeper, Limits
from fedcore.security import KeyPair
from fedcore.transport import Control

from .conftest import DEADLINE, Links, Parties, wait


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
    found = Door(
        parties, Limits(burst=3, per_second=0.5, strangers_burst=2, strangers_per_second=1)
    )
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


def test_an_address_holds_no_more_than_its_share_and_this_machine_what_it_likes(
    door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    limit = Limits().per_address
    door.keeper._from |= {"192.0.2.7": limit + 1, "192.0.2.8": limit, "127.0.0.1": limit + 1}
    crowded = [a for a in door.keeper._from if door.keeper.crowded(a)]
    assert crowded == ["192.0.2.7"]
    assert f"192.0.2.7 has {limit} connections" in caplog.text


def test_what_is_remembered_of_keys_is_bounded(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission, "_MAX_BUCKETS", 2)
    everyone = Parties()
    for i in range(9):
        everyone.add(f"s{i}")
    door.keeper.allowed = everyone.allowed
    assert {door.knock(pair.public) for pair in everyone.keys.values()} == {b"200"}
    assert len(door.keeper._buckets) <= 2


def test_connections_over_the_limit_are_cut_and_the_others_go_on(
    links: Links, parties: Parties, caplog: pytest.LogCaptureFixture
) -> None:
    server = links.server(parties.secured(Limits(connections=5)))
    host, _, port = server.endpoint.removeprefix("tcp://").rpartition(":")
    north = links.site(server.endpoint, parties.credentials("north"))
    north.send(protocol.Problem(message="first"))
    wait(server, lambda m: isinstance(m, Control))
    with caplog.at_level(logging.WARNING, "fedcore.server"):
        idle = [socket.create_connection((host, int(port))) for _ in range(12)]
        ended = 0
        until = time.monotonic() + DEADLINE
        for connection in idle:
            connection.settimeout(0.2)
        while ended < 8 and time.monotonic() < until:
            ended = sum(map(over, idle))
    assert ended == 8
    assert re.search("5 connections are open: no more, not from 127.0.0.1", caplog.text)
    north.send(protocol.Problem(message="still here"))
    wait(server, lambda m: isinstance(m, Control) and b"still here" in m.body)
    for connection in idle:
        connection.close()


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
