"""Where a site's link dials: the addresses that its server has, and that its names stand for, one after the other.

libzmq would resolve a name on the thread that moves all frames, and would stand still with it. Here names are
resolved on threads of their own, and the link is given numeric addresses. A name is resolved anew whenever an
attempt fails or a connection ends, so that a server that moves with its name is found again.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import zmq

from fedcore.errors import ConfigError

__all__ = ["HANDSHAKES", "Dialler", "Route", "Server"]

HANDSHAKES: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_DISCONNECTED
)
"""The events of a site's socket that a `Dialler` goes by."""

_LOOKUP_SECONDS: Final = 1.0
"""A name is resolved at most so often."""
_SLOW_SECONDS: Final = 2.0
"""After so long without an answer of the name server, that is said."""
_GIVEN_UP_SECONDS: Final = 0.5
"""How long an address is left alone whose answer is no handshake: libzmq does not dial it again by itself."""
_CYCLE_SECONDS: Final = (0.1, 2.0)
"""How long all addresses are left alone once each of them has failed: at first, and at most."""


@dataclass(frozen=True)
class Server:
    """A server's address, ``tcp://HOST:PORT``, taken apart.

    Attributes:
        host: a name or a number; an IPv6 address without its brackets.
        numeric: whether it is a number, which needs no name server.
    """

    address: str
    host: str
    port: int
    numeric: bool

    @classmethod
    def of(cls, address: str) -> Server:
        """Take an address apart.

        Raises:
            ConfigError: it is no ``tcp://HOST:PORT``.
        """
        found = re.fullmatch(
            r"tcp://(?:\[([0-9A-Fa-f:.]+(?:%[^\s\]]+)?)\]|([^\s\[\]/:]+)):([0-9]{1,5})", address
        )
        if found is None or not 1 <= int(found[3]) <= 65535:
            raise ConfigError(
                f"cannot dial {address!r}: expected tcp://HOST:PORT with a port from 1 to 65535, and an IPv6 "
                "address in brackets, as in tcp://[fd00::1]:7733"
            )
        host = found[1] or found[2]
        try:
            ipaddress.ip_address(host)
        except ValueError:
            if found[1]:
                raise ConfigError(f"cannot dial {address!r}: {host} is no IPv6 address") from None
            return cls(address, host, int(found[3]), numeric=False)
        return cls(address, host, int(found[3]), numeric=True)

    @classmethod
    def all_of(cls, addresses: str) -> list[Server]:
        """Take the addresses of one server apart, which commas separate.

        Raises:
            ConfigError: one of them is no ``tcp://HOST:PORT``.
        """
        return [cls.of(address) for address in addresses.split(",")]

    def endpoint(self, number: str) -> str:
        """Return where one of its addresses is dialled."""
        return f"tcp://[{number}]:{self.port}" if ":" in number else f"tcp://{number}:{self.port}"


@dataclass
class Route:
    """Which address is dialled next. Sans I/O: what happened comes in, with the clock, and an address goes out.

    Attributes:
        found: all addresses, as the names were resolved last.
        current: the address that is dialled at present; None before the first.
    """

    found: list[str] = field(default_factory=list)
    current: str | None = None
    _tried: set[str] = field(default_factory=set)
    _pause: float = _CYCLE_SECONDS[0]
    _paused_until: float = 0.0

    def resolved(self, found: list[str], connected: bool) -> str | None:
        """Take what the names stand for now; returns the address to go over to, or None to stay."""
        self.found = found
        if self.current in found or connected:
            return None
        self._tried.clear()
        self.current = found[0]
        return self.current

    def failed(self, now: float) -> str | None:
        """Note that there is no connection to the current address; returns another one, or None to stay.

        libzmq goes on dialling an address that is stayed with.
        """
        if self.current is None or now < self._paused_until:
            return None
        self._tried.add(self.current)
        for address in self.found:
            if address not in self._tried:
                self.current = address
                return address
        self._tried.clear()
        self._paused_until = now + self._pause
        self._pause = min(2 * self._pause, _CYCLE_SECONDS[1])
        return None

    def connected(self) -> None:
        """Note that the current address answers."""
        self._tried.clear()
        self._pause = _CYCLE_SECONDS[0]


class _Lookup:
    """One question to the resolver, on a thread that nobody waits for: it can't be interrupted."""

    def __init__(self, server: Server, done: Callable[[], None]) -> None:
        self.server = server
        self.since = time.monotonic()
        self.ended = False
        self.found: list[str] = []
        self.error = ""
        self._done = done
        threading.Thread(
            target=self._run, args=(server,), name="fedcore-lookup", daemon=True
        ).start()

    def _run(self, server: Server) -> None:
        try:
            rows = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
            self.found = list(dict.fromkeys(str(row[4][0]) for row in rows))
            self.error = "" if self.found else "it has no address"
        except (OSError, UnicodeError) as error:
            self.error = getattr(error, "strerror", None) or str(error)
        self.ended = True
        self._done()


class Dialler:
    """Follows what becomes of a site's connection, and has the link dial.

    Args:
        servers: the addresses of the server, the first to be tried first.
        monitor: where libzmq tells of the connection; the dialler's own.
        dial: called with each endpoint to dial in place of the last one.
        connected: called each time that a handshake has succeeded.
        retried: called each time that libzmq dials again by itself: a connection has ended, or an attempt failed.
        changed: called when one of the attributes below has changed.
        secure: whether the link is encrypted.

    Attributes:
        refused: why the server will never take this link's handshake; else empty.
        unresolved: why no name of the server's stands for an address at present; else empty.
        up: whether there is a connection.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        monitor: zmq.Socket[bytes],
        *,
        dial: Callable[[str], None],
        connected: Callable[[], None],
        retried: Callable[[], None],
        changed: Callable[[], None],
        secure: bool,
    ) -> None:
        self.refused = self.unresolved = self._failure = ""
        self.up = False
        self._servers = servers
        self._address = ",".join(server.address for server in servers)
        self._names = [server for server in servers if not server.numeric]
        self._numbers = {server: [server.host] for server in servers if server.numeric}
        self._monitor = monitor
        self._dial, self._connected, self._changed = dial, connected, changed
        self._retried = retried
        self._secure = secure
        self._route = Route()
        self._endpoint = self._left = ""
        self._broke_off = False
        self._redial_at: float | None = None
        self._lookups: list[_Lookup] = []
        self._looked_up = -_LOOKUP_SECONDS
        self._lock = threading.Lock()
        self._closed = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, name="fedcore-dial", daemon=True)

    @property
    def hint(self) -> str:
        """What the last failure points to; empty once a handshake has succeeded."""
        if self.unresolved or self._failure:
            return self.unresolved or self._failure
        if self._route.current is None:
            hosts = " and ".join(server.host for server in self._names)
            return f"the name server (DNS) has not answered for {hosts} yet"
        return ""

    @property
    def dials(self) -> bool:
        """Whether there is an address to dial."""
        return self._route.current is not None

    def start(self) -> None:
        """Begin: a numeric address is dialled before this returns."""
        if self._numbers:
            self._go(self._route.resolved(self._endpoints(), connected=False))
        self._thread.start()

    def close(self) -> None:
        """Stop, without waiting for a name server."""
        with self._lock:
            self._closed = True
            os.write(self._wake_write, b"Q")
        self._thread.join()
        with self._lock:
            os.close(self._wake_read)
            os.close(self._wake_write)
        self._monitor.close(linger=0)

    # --- the thread ---

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        while not self._closed:
            if self._unknown():
                self._look_up()
            if self._redial_at is not None and time.monotonic() >= self._redial_at:
                self._redial_at = None
                self._dial(self._endpoint)
            ready = dict(poller.poll(self._patience_ms()))
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
            before = (self.refused, self._failure, self.unresolved, self.up)
            if self._monitor in ready:
                event, endpoint = self._monitor.recv_multipart()
                if endpoint.decode() != self._left:
                    self._note(int.from_bytes(event[:2], sys.byteorder))
            self._take_lookups()
            if before != (self.refused, self._failure, self.unresolved, self.up):
                self._changed()

    def _patience_ms(self) -> int | None:
        """Return when to go on though nothing has happened: a slow name server is to be named, or asked again."""
        if self._lookups:
            until = None if self.unresolved else self._lookups[0].since + _SLOW_SECONDS
        else:
            until = self._looked_up + _LOOKUP_SECONDS if self._unknown() else None
        if self._redial_at is not None:
            until = self._redial_at if until is None else min(until, self._redial_at)
        return None if until is None else max(0, round(1000 * (until - time.monotonic())) + 1)

    def _note(self, event: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._failure = self.unresolved = ""
            self._redial_at = None
            self.up = True
            self._route.connected()
            self._connected()
            return
        broke_off, self._broke_off = self._broke_off, event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        if event in (zmq.EVENT_CONNECT_RETRIED, zmq.EVENT_DISCONNECTED):
            self._retried()
            given_up = event == zmq.EVENT_DISCONNECTED and not (self.up or broke_off)
            self.up = False
            if given_up and not self.refused:
                self._give_up()
            if event == zmq.EVENT_CONNECT_RETRIED:
                self._go_on()
                self._name_addresses()
                self._look_up()
            return
        tried = self._dialled_address()
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self.refused = (
                f"the server at {tried} does not admit this key; ask its operator to admit the "
                "public key (`fedcore admit`), or whether it was revoked"
            )
            return
        why = self._mismatch(tried)
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and len(self._servers) == 1:
            self.refused = why
            return
        if event != zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and self._secure:
            why = (
                f"what listens at {tried} ended the handshake: it has another key than server_key in the kit, or "
                "does not speak encrypted"
            )
        if len(self._servers) > 1:  # another one may be the server
            self._go_on()
        self._failure = why

    def _give_up(self) -> None:
        """Go on after an answer that is no handshake, as that of another program: libzmq does not."""
        why = f"what listens at {self._dialled_address()} is no server of fedcore"
        self._redial_at = time.monotonic() + _GIVEN_UP_SECONDS
        self._go_on()
        self._look_up()
        self._failure = why

    def _mismatch(self, address: str) -> str:
        if self._secure:
            return f"what listens at {address} does not speak encrypted; is it the right server?"
        return (
            f"the server at {address} wants an encrypted connection; set FEDCORE_KIT to the kit that its "
            "operator made for this site"
        )

    def _name_addresses(self) -> None:
        if self._failure or not self._names or not self._route.found:
            return
        named = "; ".join(
            f"{server.host} is {', '.join(self._numbers[server])}, and nothing answers on port {server.port} there"
            for server in self._names
            if self._numbers.get(server)
        )
        self._failure = f"{named}; is fedcore-server running, and is the port open?"

    def _look_up(self) -> None:
        """Ask what the names stand for, unless questions are open or were answered just now."""
        now = time.monotonic()
        if self._lookups or now < self._looked_up + _LOOKUP_SECONDS:
            return
        self._looked_up = now
        self._lookups = [_Lookup(server, self._wake) for server in self._names]

    def _take_lookups(self) -> None:
        for lookup in list(self._lookups):
            host = lookup.server.host
            if not lookup.ended:
                slow = time.monotonic() >= lookup.since + _SLOW_SECONDS
                if slow and not self.up and self._route.current is None:
                    self._cannot(f"cannot resolve {host}: the name server (DNS) does not answer")
                continue
            self._lookups.remove(lookup)
            if lookup.found:
                self.unresolved = ""
                self._numbers[lookup.server] = lookup.found
                self._go(self._route.resolved(self._endpoints(), self.up))
            elif not self.up and not self._others(lookup.server):
                self._cannot(f"cannot resolve {host}: {lookup.error}")

    def _unknown(self) -> bool:
        """Whether there is a name that has never been resolved while there is no connection."""
        return not self.up and any(server not in self._numbers for server in self._names)

    def _others(self, server: Server) -> bool:
        """Whether there are addresses besides those of one name."""
        return any(numbers for other, numbers in self._numbers.items() if other != server)

    def _endpoints(self) -> list[str]:
        """Return where to dial, in the order of the server's addresses."""
        found = (
            server.endpoint(number)
            for server in self._servers
            for number in self._numbers.get(server, [])
        )
        return list(dict.fromkeys(found))

    def _dialled_address(self) -> str:
        """Return the address of the server's that is dialled at present."""
        for server in self._servers:
            if self._endpoint in map(server.endpoint, self._numbers.get(server, [])):
                return server.address
        return self._address

    def _cannot(self, why: str) -> None:
        self.unresolved = f"{why}; is the server's name right, and does DNS know it here?"

    def _go_on(self) -> None:
        """Dial the next address."""
        self._go(self._route.failed(time.monotonic()))

    def _go(self, endpoint: str | None) -> None:
        if endpoint is not None:
            self._left, self._endpoint = self._endpoint, endpoint
            self._failure = ""
            self._redial_at = None
            self._dial(endpoint)

    def _wake(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):
            if not self._closed:
                os.write(self._wake_write, b"L")
