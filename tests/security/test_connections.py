"""Which connections are cut, decided without sockets: by number, by network, and while they prove no key."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import pytest

from fedcore.security.connections import (
    CUT,
    GRACE_LOOKS,
    HEARD,
    MUTED,
    Connections,
    Limits,
    Notes,
    network_of,
    note,
)


@dataclass
class World:
    """Connections with a clock, numbers and bytes that the test makes up."""

    limits: Limits
    most: int = 1000
    now: float = 0.0
    heard: bytearray = field(default_factory=lambda: bytearray(100_000))
    received: dict[int, int] = field(default_factory=dict)
    last: int = 9
    cut: list[int] = field(default_factory=list)
    why: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = len(self.heard)
        self.notes = Notes(self.heard, bytearray(count), array("I", bytes(4 * count)))
        self.connections = Connections(
            self.limits, self.most, self.notes, lambda number: self.received.get(number, 0)
        )

    def open(self, address: str = "192.0.2.7", *, proved: bool = False) -> int:
        self.last += 1
        surplus = self.connections.opened(self.last, address, self.now)
        if proved:
            self.heard[self.last] = HEARD
        self.note([surplus] if surplus else [])
        return self.last

    def sweep(self) -> None:
        self.note(list(self.connections.sweep(self.now)))

    def note(self, cut: list[tuple[int, str]]) -> None:
        self.cut += [number for number, _ in cut]
        self.why += [why for _, why in cut]


def test_a_stranger_that_sends_much_is_cut_and_a_key_holder_that_sends_as_much_is_not() -> None:
    world = World(Limits(unproved_bytes=1000))
    loud, site, calm = world.open(), world.open(proved=True), world.open()
    world.received = {loud: 1001, site: 1 << 40, calm: 1000}
    world.sweep()
    assert world.cut == [loud]
    assert "1000 bytes before a message of it was understood" in world.why[0]


def test_for_each_key_that_was_shown_one_connection_from_there_may_send_a_chunk_first() -> None:
    world = World(Limits(unproved_bytes=1000, admitted_bytes=50_000, admitted_seconds=75))
    site, stranger = world.open(), world.open()
    elsewhere = world.open("198.51.100.1")
    world.connections.shown("192.0.2.7", world.now)
    world.received = dict.fromkeys((site, stranger, elsewhere), 2000)
    world.sweep()
    assert world.cut == [stranger, elsewhere]
    world.received[site] = 50_000
    world.now += 74
    world.sweep()
    assert world.cut == [stranger, elsewhere]
    world.received[site] = 50_001
    world.sweep()
    assert world.cut == [stranger, elsewhere, site]
    assert "50000 bytes before" in world.why[-1]


def test_a_chunk_that_comes_first_has_its_time_and_a_key_that_was_shown_is_forgotten() -> None:
    world = World(Limits())
    slow, late = world.open(), world.open("198.51.100.1")
    world.connections.shown("192.0.2.7", world.now)
    world.connections.shown("198.51.100.1", world.now - 16)
    world.received = {slow: 1 << 20, late: 1 << 20}
    world.sweep()
    assert world.cut == [late]
    world.now += 76
    world.sweep()
    assert world.cut == [late, slow]


def test_what_connections_may_send_first_is_bounded_in_all_and_for_each_network() -> None:
    world = World(Limits())
    opened = [world.open(f"192.0.2.{1 + i // 10}") for i in range(50)]
    for i in range(50):
        world.connections.shown(f"192.0.2.{1 + i // 10}", world.now)
    world.received = dict.fromkeys(opened, 1 << 20)
    world.sweep()
    stayed = [number for number in opened if number not in world.cut]
    assert len(stayed) == 32
    assert {(number - opened[0]) // 10 for number in stayed} == {0, 1, 2, 3}


def test_strangers_take_no_room_from_a_connection_that_may_be_a_keys() -> None:
    world = World(Limits(unproved=3))
    site = world.open()
    world.connections.shown("192.0.2.7", world.now)
    world.received = {site: 1 << 20}
    world.sweep()
    for _ in range(6):
        world.now += 3
        world.open()
    assert len(world.cut) == 4
    assert site not in world.cut


def test_a_connection_that_proves_no_key_is_cut_in_time() -> None:
    world = World(Limits(unproved_seconds=15))
    silent, site = world.open(), world.open()
    world.now += 14
    world.heard[site] = HEARD
    world.sweep()
    assert world.cut == []
    world.now += 2
    world.sweep()
    assert world.cut == [silent]
    assert world.connections.unproved == 0


def test_a_key_that_said_too_much_is_cut_when_it_was_told_so_and_one_that_is_revoked_at_once() -> (
    None
):
    world = World(Limits())
    loud, calmed, gone = (world.open(proved=True) for _ in range(3))
    world.heard[loud] = world.heard[calmed] = world.heard[gone] = MUTED
    world.sweep()
    assert world.connections.unproved == 0
    world.heard[calmed] = HEARD
    world.heard[gone] = CUT
    world.sweep()
    assert world.cut == [gone]
    world.heard[calmed] = MUTED
    looks = 2
    while len(world.cut) == 1:
        world.sweep()
        looks += 1
    assert (world.cut, looks) == ([gone, loud], GRACE_LOOKS + 1)


HANDLED, TAKEN, DROP, UNHEARD, TOO_MUCH = 0, 1, 3, 4, 5


@pytest.mark.parametrize(
    ("verdicts", "noted"),
    [
        ([DROP], 0),
        ([HANDLED], HEARD),
        ([TAKEN, DROP], HEARD),
        ([HANDLED, TOO_MUCH], MUTED),
        ([HANDLED, TOO_MUCH, TOO_MUCH], MUTED),
        ([HANDLED, TOO_MUCH, HANDLED], HEARD),
        ([HANDLED, TOO_MUCH, UNHEARD], CUT),
        ([TOO_MUCH], CUT),
        ([TOO_MUCH, TOO_MUCH], CUT),
        ([UNHEARD], CUT),
    ],
)
def test_a_connection_that_was_never_heard_has_no_time_to_be_told(
    verdicts: list[int], noted: int
) -> None:
    notes = Notes.of(3)
    for verdict in verdicts:
        note(notes, 1, b"site/a/1", verdict)
        note(notes, 3, b"site/b/2", verdict)
    assert list(notes.heard) == [0, noted, 0]
    assert list(notes.moved) == [0, 1, 0]
    assert [owner > 0 for owner in notes.owners] == [False, True, False]


def test_connections_of_a_key_that_are_silent_are_cut_and_a_slow_one_is_not() -> None:
    world = World(Limits(silent_seconds=60))
    slow, silent, gone = (world.open(proved=True) for _ in range(3))
    world.connections.closed(gone)
    world.received = {silent: 500}
    for second in range(0, 71, 10):
        world.now = second
        world.received[slow] = second  # a byte a second
        world.note(list(world.connections.sweep_silent(world.now)))
    assert world.cut == [silent]
    assert world.why == ["was silent for 60 s"]


def test_a_message_that_has_no_end_is_cut_and_those_that_come_one_after_the_other_are_not() -> None:
    world = World(Limits(unfinished_bytes=1000, unfinished=2500))
    endless, site = world.open(proved=True), world.open(proved=True)
    for look in range(11):
        world.received = {endless: 100 * look, site: 900 * look}
        world.notes.moved[site] = look % 2
        world.note(list(world.connections.sweep_unfinished()))
    assert world.cut == []
    world.received[endless] += 1
    world.note(list(world.connections.sweep_unfinished()))
    assert world.cut == [endless]
    assert "of a message that has no end" in world.why[0]


def test_messages_without_end_are_bounded_in_all_and_the_longest_goes_first() -> None:
    world = World(Limits(unfinished_bytes=1000, unfinished=2500))
    opened = [world.open(proved=True) for _ in range(5)]
    world.note(list(world.connections.sweep_unfinished()))
    world.received = dict(zip(opened, (600, 700, 900, 800, 500), strict=True))
    world.note(list(world.connections.sweep_unfinished()))
    assert world.cut == [opened[2], opened[3]]


def test_messages_without_end_are_bounded_for_each_key_whatever_its_connections() -> None:
    world = World(Limits(unfinished_bytes=1000, unfinished=100_000))
    opened = [world.open(proved=True) for _ in range(6)]
    for number, owner in zip(opened, (7, 7, 7, 7, 8, 0), strict=True):
        world.notes.owners[number] = owner
    world.note(list(world.connections.sweep_unfinished()))
    world.received = dict(zip(opened, (400, 300, 500, 200, 1000, 1000), strict=True))
    world.note(list(world.connections.sweep_unfinished()))
    assert world.cut == [opened[2]]
    world.received[opened[1]] += 101
    world.note(list(world.connections.sweep_unfinished()))
    assert world.cut == [opened[2], opened[1]]


def test_a_number_that_is_used_again_is_another_keys() -> None:
    world = World(Limits(unfinished_bytes=1000))
    first = world.open(proved=True)
    world.notes.owners[first] = 7
    world.connections.closed(first)
    world.last = first - 1
    assert (world.open(), world.notes.owners[first]) == (first, 0)


def test_where_the_system_does_not_tell_what_came_nothing_is_taken_for_silent() -> None:
    world = World(Limits(silent_seconds=60))
    site = world.open(proved=True)
    world.received = {site: -1}
    for _ in range(20):
        world.now += 10
        world.sweep()
        world.note(list(world.connections.sweep_silent(world.now)))
        world.note(list(world.connections.sweep_unfinished()))
    assert world.cut == []


def test_the_oldest_stranger_makes_room_for_a_newcomer() -> None:
    world = World(Limits(unproved=3))
    site = world.open(proved=True)
    strangers = [world.open() for _ in range(3)]
    world.now += 2
    newcomer = world.open()
    assert world.cut == [strangers[0]]
    assert site != newcomer
    assert len(world.connections) == 4


def test_strangers_without_end_cost_a_bounded_number_of_handshakes() -> None:
    world = World(Limits(unproved=256), most=10_000)
    opened = 0
    for _ in range(10_000):  # a thousand a second
        world.now += 0.001
        world.open(f"198.51.{opened % 100}.{opened % 250}")
        opened += 1
    lived = opened - len([n for n, why in zip(world.cut, world.why, strict=True) if why])
    spared = [n for n in world.cut if n > 9 + 256]
    assert lived == 256
    assert opened - len(spared) <= 256 * (1 + 10 / 2)


def test_the_network_with_the_most_strangers_pays_for_a_newcomer() -> None:
    world = World(Limits(unproved=4, per_network=100))
    other = world.open("198.51.100.1")
    crowd = [world.open(f"2001:db8::{i}") for i in range(3)]
    world.now += 2
    world.open("198.51.100.2")
    assert world.cut == [crowd[0]]
    assert world.connections.address(other) == "198.51.100.1"


def test_strangers_never_crowd_out_a_newcomer_with_a_key_for_long() -> None:
    world = World(Limits(), most=5)
    sites = [world.open(f"198.51.100.{i}", proved=True) for i in range(3)]
    for _ in range(50):
        world.open()
    assert len(world.connections) == 5
    world.now += 2
    newcomer = world.open("198.51.100.9", proved=True)
    world.sweep()
    assert all(world.connections.address(n) for n in (*sites, newcomer))


def test_a_key_holder_that_came_since_the_last_look_is_not_counted_as_a_stranger() -> None:
    world = World(Limits(unproved=2))
    for _ in range(10):
        world.open(proved=True)
    assert world.cut == []


def test_a_newcomer_whose_number_is_noted_as_proved_by_the_connection_before_it_is_dealt_with() -> (
    None
):
    class AlwaysHeard(bytearray):
        def __getitem__(self, number: Any) -> Any:
            return HEARD

    for limits, most in ((Limits(per_network=1), 1000), (Limits(unproved=50), 1)):
        world = World(limits, most=most, heard=AlwaysHeard(100))
        first, second = world.open(), world.open()
        assert (first, world.cut) == (10, [second])


def test_a_network_has_its_share_of_connections_and_of_arrivals() -> None:
    world = World(Limits(per_network=3, arrivals=5, arrivals_per_second=1, unproved=50))
    for _ in range(3):
        world.open(proved=True)
    assert world.cut == []
    fourth = world.open()
    assert world.cut == [fourth]
    fifth = world.open("192.0.2.7")
    assert world.cut == [fourth, fifth]
    sixth = world.open()
    assert (world.cut[-1], world.why[-1]) == (sixth, "opens connections too often")
    assert world.open("192.0.2.8") not in world.cut
    world.now += 1
    seventh = world.open()
    assert (world.cut[-1], world.why[-1]) == (seventh, "has more than 3 connections")
    assert len(world.connections) == 4


def test_this_machines_own_connections_have_no_limits_of_a_network() -> None:
    world = World(Limits(per_network=3, arrivals=3, unproved=1000))
    for _ in range(100):
        world.open("127.0.0.1")
        world.open("::1")
    assert world.cut == []


def test_a_connection_whose_peer_is_not_heard_any_more_is_cut() -> None:
    world = World(Limits())
    muted, other = world.open(proved=True), world.open(proved=True)
    world.sweep()
    world.heard[muted] = CUT
    world.sweep()
    assert world.cut == [muted]
    assert world.connections.address(other) is not None


def test_a_number_that_is_used_again_is_another_connection() -> None:
    world = World(Limits(unproved_seconds=10))
    first = world.open(proved=True)
    world.sweep()
    world.connections.closed(first)
    assert len(world.connections) == 0
    world.last = first - 1
    assert world.open("198.51.100.1") == first
    world.now += 11
    world.sweep()
    assert world.cut == [first]
    assert len(world.connections) == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_this_machines_own_addresses_have_no_limits_of_a_network(address: str) -> None:
    world = World(Limits(per_network=3, arrivals=5, arrivals_per_second=1, unproved=50))
    for _ in range(20):
        world.open(address, proved=True)
    assert world.cut == []


@pytest.mark.parametrize("sites", [1, 3, 128, 5000])
def test_all_sites_may_come_from_one_network_at_once(sites: int) -> None:
    world = World(Limits.of(sites), most=10**6)
    opened = [world.open() for _ in range(2 * sites)]
    world.received = dict.fromkeys(opened, 2000)  # a handshake
    world.sweep()
    assert world.cut == []


@pytest.mark.parametrize(
    ("address", "network", "local"),
    [
        ("192.0.2.7", "192.0.2.7", False),
        ("127.9.9.9", "127.9.9.9", True),
        ("::1", "::/64", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("::ffff:192.0.2.7", "192.0.2.7", False),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64", False),
        ("fe80::1%eth0", "fe80::/64", False),
        ("nonsense", "nonsense", False),
    ],
)
def test_an_ipv6_network_counts_as_one_address(address: str, network: str, local: bool) -> None:
    assert network_of(address) == (network, local)
