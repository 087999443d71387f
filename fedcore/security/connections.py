"""The open connections of an encrypted server: from where, since when, and which of them have proved themselves.

A connection is *unproved* until a message of it was understood, which takes a key on the allow-list. Unproved ones
are few, short-lived and may send little: libzmq takes in whatever length a peer announces. After a link broke,
an honest site's first message is the chunk that was under way: for each key of the list that was shown from a
network, one connection from there may send so much. Sans I/O: numbers, addresses and the clock come in, and what
to cut goes out.
"""

from __future__ import annotations

import ipaddress
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from mmap import mmap
from typing import Final
from zlib import crc32

from .rate_limit import TokenBucket

__all__ = ["CUT", "DROP", "HEARD", "MUTED", "Connections", "Limits", "Notes", "note"]

HEARD: Final = 1
"""What the pump notes of a connection: a message of it was understood."""
CUT: Final = 2
"""What the pump notes of a connection: its peer is not heard any more, so that it may go."""
MUTED: Final = 3
"""What the pump notes of a connection: it was heard and said too much, which its peer is being told."""
DROP, _UNHEARD, _MUTED = 3, 4, 5  # verdicts of the core, as in csrc/transfer/sink.h
GRACE_LOOKS: Final = 20
"""So often a muted connection is looked at before it is cut; the door looks every 50 ms."""
_MAX_NETWORKS: Final = 4096


@dataclass(frozen=True)
class Limits:
    """What one key, one network and all together may ask of the door. A network is an IPv4 address or an IPv6 /64;
    for this machine's own there are no limits per network, as a relay on it speaks for others.

    Attributes:
        burst, per_second: handshakes of one key at once, and over time.
        unknown_burst, unknown_per_second: the same of all unknown keys together.
        connections: open connections in all; ``per_network`` of them from one network.
        arrivals, arrivals_per_second: connections that one network may open at once, and over time.
        unproved: connections of which nothing was understood yet, in all.
        unproved_bytes, unproved_seconds: what such a connection may send, and how long it may be there.
        silent_seconds: for how long any connection may send nothing; a site says something each second.
        unfinished_bytes: what the connections of a key may send of messages that are not whole yet, and what waits
            before them; ``unfinished`` of all together, more than what is asked of all sites.
        admitted: of these, how many may send a chunk first, after a key of the list was shown from their network,
            which may have a quarter of them; ``admitted_bytes`` in ``admitted_seconds``.
        unproved_spared: for how many seconds at least one makes no room for a newcomer, which is cut then: a
            handshake costs more than to refuse it.
    """

    burst: int = 20
    per_second: float = 2.0
    unknown_burst: int = 50
    unknown_per_second: float = 20.0
    connections: int = 4096
    per_network: int = 256
    arrivals: int = 128
    arrivals_per_second: float = 16.0
    unproved: int = 256
    unproved_bytes: int = 16 << 10
    unproved_seconds: float = 15.0
    silent_seconds: float = 60.0
    unfinished_bytes: int = 64 << 20
    unfinished: int = 384 << 20
    admitted: int = 32
    admitted_bytes: int = 4 << 20
    admitted_seconds: float = 75.0
    unproved_spared: float = 2.0

    @classmethod
    def of(cls, sites: int, memory: int = 256 << 20) -> Limits:
        """Return limits that so many sites never meet, even if all of them come from one network at once.

        ``memory`` is what a server may ask of all sites together.
        """
        return cls(
            connections=max(4096, 4 * sites),
            per_network=max(256, 2 * sites),
            arrivals=max(128, 4 * sites),
            arrivals_per_second=max(16.0, sites / 2),
            unproved=max(256, 2 * sites),
            unfinished=memory + (128 << 20),
        )


@dataclass(frozen=True)
class Notes:
    """What the pump notes of each connection, by its file number; equally long.

    Attributes:
        heard: `HEARD`, `CUT` or `MUTED`.
        moved: 1 when a message of it was whole, until the door has seen that.
        owners: a checksum of the user whose connection it is.
    """

    heard: bytearray
    moved: bytearray
    owners: memoryview | array[int]

    @classmethod
    def of(cls, count: int) -> Notes:
        """Make them for so many connections; the owners' pages take memory as they are used."""
        return cls(bytearray(count), bytearray(count), memoryview(mmap(-1, 4 * count)).cast("I"))


def note(notes: Notes, number: int, user: bytes, verdict: int) -> None:
    """Note of a connection what the core made of a message of it, as the compiled pump does."""
    heard = notes.heard
    if not 0 <= number < len(heard):
        return
    notes.moved[number] = 1
    notes.owners[number] = crc32(user)
    if verdict == DROP:
        return
    if verdict == _MUTED and heard[number] in (HEARD, MUTED):
        heard[number] = MUTED
    elif verdict in (_UNHEARD, _MUTED):  # who was never heard there is told nothing there
        heard[number] = CUT
    else:
        heard[number] = HEARD


@dataclass
class _Open:
    address: str
    network: str
    local: bool
    since: float
    heard: float
    received: int = 0
    whole_at: int = (
        -1
    )  # bytes received when it was seen that a message was whole; negative: not known yet
    admitted: bool = False


class Connections:
    """Which connections are open, and which must be cut.

    Args:
        limits: see `Limits`.
        most: open connections in all.
        notes: what the pump writes.
        received: how many bytes a connection has received; negative where that is not known.
    """

    def __init__(
        self, limits: Limits, most: int, notes: Notes, received: Callable[[int], int]
    ) -> None:
        self._limits = limits
        self._most = most
        self._heard, self._moved, self._owners = notes.heard, notes.moved, notes.owners
        self._received = received
        self._open: dict[int, _Open] = {}
        self._networks: Counter[str] = Counter()
        self._unproved: dict[int, _Open] = {}  # the oldest first
        self._muted: dict[int, int] = {}  # how often each was found so
        self._arrivals: dict[str, TokenBucket] = {}
        self._shown: dict[str, list[float]] = {}  # when a key of the list was shown, by network

    def __len__(self) -> int:
        return len(self._open)

    @property
    def unproved(self) -> int:
        """How many have proved nothing, as of the last look."""
        return len(self._unproved)

    def opened(self, number: int, address: str, now: float) -> tuple[int, str] | None:
        """Note a connection that was accepted; returns which one has to go for it, and why."""
        self.closed(number)  # a number that is accepted again was closed before
        network, local = network_of(address)
        if number < len(self._heard):
            self._heard[number] = self._moved[number] = self._owners[number] = 0
        self._open[number] = self._unproved[number] = _Open(address, network, local, now, now)
        self._networks[network] += 1
        limits = self._limits
        if not local:
            if not self._may_arrive(network, now):
                return self._cut(number, "opens connections too often")
            if self._networks[network] > limits.per_network:
                return self._cut_for(
                    number, network, f"has more than {limits.per_network} connections"
                )
        if len(self._unproved) > limits.unproved:
            return self._cut_for(
                number, None, f"is one of more than {limits.unproved} that prove no key"
            )
        if len(self._open) > self._most:
            return self._cut_for(number, None, f"is one of more than {self._most} connections")
        return None

    def closed(self, number: int) -> None:
        """Note a connection that is gone, whoever ended it."""
        gone = self._open.pop(number, None)
        self._unproved.pop(number, None)
        self._muted.pop(number, None)
        if gone is not None:
            self._networks[gone.network] -= 1
            if not self._networks[gone.network]:
                del self._networks[gone.network]

    def address(self, number: int) -> str | None:
        """Return where a connection comes from, if it is open."""
        found = self._open.get(number)
        return None if found is None else found.address

    def shown(self, address: str, now: float) -> None:
        """Note that a key of the list was shown from there, by a connection of which no number is known."""
        network, _ = network_of(address)
        if network not in self._shown and len(self._shown) >= _MAX_NETWORKS:
            self._shown.clear()
        self._shown.setdefault(network, []).append(now)
        del self._shown[network][: -self._limits.admitted]

    def sweep(self, now: float) -> Iterator[tuple[int, str]]:
        """Look at all; yields what to cut, and why."""
        limits = self._limits
        for number, found in list(self._unproved.items()):
            if self._note(number) in (HEARD, MUTED):
                del self._unproved[number]
                continue
            if self._received(number) > limits.unproved_bytes and not found.admitted:
                found.admitted = self._may_send_more(found, now)
            most, seconds = (
                (limits.admitted_bytes, limits.admitted_seconds)
                if found.admitted
                else (limits.unproved_bytes, limits.unproved_seconds)
            )
            if self._received(number) > most:
                yield self._cut(number, f"sent {most} bytes before a message of it was understood")
            elif now - found.since > seconds:
                yield self._cut(number, f"proved no key in {seconds:g} s")
        for number in list(self._open):
            noted = self._note(number)
            if noted != MUTED:
                self._muted.pop(number, None)
            if noted == CUT or (noted == MUTED and self._is_told(number)):
                yield self._cut(number, "is not heard any more")

    def sweep_silent(self, now: float) -> Iterator[tuple[int, str]]:
        """Look for those that send nothing any more, of which one key could collect any number."""
        for number, found in list(self._open.items()):
            received = self._received(number)
            if received != found.received:
                found.received, found.heard = received, now
            elif received >= 0 and now - found.heard > self._limits.silent_seconds:
                yield self._cut(number, f"was silent for {self._limits.silent_seconds:g} s")

    def sweep_unfinished(self) -> Iterator[tuple[int, str]]:
        """Look at what came of each connection since a message of it was whole.

        libzmq keeps the parts of a message, however many, until the last one has come.
        """
        waiting: dict[int, int] = {}
        for number, found in self._open.items():
            if number >= len(self._moved) or self._moved[number]:
                if number < len(self._moved):
                    self._moved[number] = 0
                found.whole_at = -1
            elif found.whole_at < 0:
                found.whole_at = self._received(number)
            else:
                waiting[number] = self._received(number) - found.whole_at
        total = sum(waiting.values())
        shares = Counter[int]()
        for number, size in waiting.items():
            shares[self._owner(number)] += size
        for number in sorted(waiting, key=lambda number: -waiting[number]):
            size, owner = waiting[number], self._owner(number)
            if shares[owner] <= self._limits.unfinished_bytes and total <= self._limits.unfinished:
                continue
            total -= size
            shares[owner] -= size
            yield self._cut(number, f"sent {size >> 20} MiB of a message that has no end")

    # --- deciding ---

    def _is_told(self, number: int) -> bool:
        """Whether what a muted peer is told had its time to leave; in looks, as a machine that stands still for a
        second sends nothing in it."""
        looks = self._muted[number] = self._muted.get(number, 0) + 1
        return looks > GRACE_LOOKS

    def _may_send_more(self, found: _Open, now: float) -> bool:
        """Whether a connection may be the one that a key was shown by; no other one may be it then."""
        limits = self._limits
        shown = self._shown.get(found.network, [])
        while shown and now - shown[0] > limits.unproved_seconds:
            del shown[0]
        admitted = [other for other in self._unproved.values() if other.admitted]
        share = sum(other.network == found.network for other in admitted)
        if (
            not shown
            or len(admitted) >= limits.admitted
            or (share >= limits.admitted // 4 and not found.local)
        ):
            return False
        del shown[0]
        return True

    def _note(self, number: int) -> int:
        """Return what the pump noted; numbers beyond its notes are taken for proved."""
        return self._heard[number] if number < len(self._heard) else HEARD

    def _owner(self, number: int) -> int:
        """Return whose a connection is, as a number; one of which nothing was understood is its own."""
        return self._owners[number] or -1 - number

    def _may_arrive(self, network: str, now: float) -> bool:
        if network not in self._arrivals and len(self._arrivals) >= _MAX_NETWORKS:
            self._arrivals.clear()
        limits = self._limits
        return self._arrivals.setdefault(
            network, TokenBucket(limits.arrivals, limits.arrivals_per_second, now)
        ).take(now)

    def _cut_for(self, newcomer: int, network: str | None, why: str) -> tuple[int, str] | None:
        """Cut the oldest unproved connection of a network, or of the one that has the most, or else the newcomer.

        None if it turns out that some have proved themselves meanwhile, and there is room.
        """
        # The number may be noted for the connection that had it before: the newcomer stays.
        for number in [
            n for n in self._unproved if n != newcomer and self._note(n) in (HEARD, MUTED)
        ]:
            del self._unproved[number]
        if network is None:
            if len(self._unproved) <= self._limits.unproved and len(self._open) <= self._most:
                return None
            of = Counter(found.network for found in self._unproved.values() if not found.admitted)
            network = max(of, key=lambda name: of[name])
        oldest = next(
            n
            for n, found in self._unproved.items()
            if found.network == network and not found.admitted
        )
        now = self._unproved[newcomer].since
        spared = now - self._unproved[oldest].since < self._limits.unproved_spared
        return self._cut(newcomer if spared else oldest, why)

    def _cut(self, number: int, why: str) -> tuple[int, str]:
        self.closed(number)
        return number, why


def network_of(address: str) -> tuple[str, bool]:
    """Return the network that an address counts for, and whether it is this machine's own."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address, False
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is None:
            network = ipaddress.ip_network((found, 64), strict=False)
            return str(network), found.is_loopback
        found = found.ipv4_mapped
    return str(found), found.is_loopback
