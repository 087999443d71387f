"""The connections of many sites to one server, with one data plane, driven by one thread.

A `fedcore.transport.link.SiteLink` has threads and buffers of its own, for one connection. Here a site has a TCP
connection and a few hundred bytes, so that one process can hold thousands. All sets and pulls lie in one
`Exchange`, which knows the server at the other end of a site's connection by the site's name. Connections are
plain text, and the server's name is not resolved again: this is for virtual sites in the network of their server.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Final

from typing_extensions import Buffer

from fedcore._core import Exchange
from fedcore.errors import ConfigError, ProtocolError
from fedcore.protocol import FromSite, Kind, control_frames, frame_header

from .dialling import Server
from .link import HEARTBEAT_MS, MAX_FRAME, Control, DataEvent, now_ms
from .open_files import require_free_files
from .zmtp import Incoming, message, opening

__all__ = ["ManyLinks", "arrivals"]

_FILES_BESIDE: Final = 8
_READ_BYTES: Final = 256 << 10
_PARTS_AT_ONCE: Final = 64
_REDIAL_MS: Final = (100, 2000)
_TURNED_AWAY: Final = 4
_LINGER_SECONDS: Final = 1.0


def arrivals(exchange: Exchange) -> Iterator[tuple[str, Control] | DataEvent]:
    """Yield what has come for the sites of one exchange: messages with the site's name, then events."""
    now = now_ms()
    while (control := exchange.next_control(now)) is not None:
        yield control[0].decode(), Control(b"", control[1])
    while (event := exchange.next_event()) is not None:
        yield event


class _Wire:
    """One site's connection, or the wait for another one."""

    __slots__ = (
        "delay_ms",
        "dialled",
        "identity",
        "incoming",
        "name",
        "net",
        "outgoing",
        "redial_ms",
        "turned_away",
        "up",
    )  # fmt: skip

    def __init__(self, name: str, identity: bytes) -> None:
        self.name, self.identity = name, identity
        self.net: socket.socket | None = None
        self.dialled = False  # and connected: the handshake is under way, or done
        self.up = False  # it takes messages
        self.redial_ms, self.delay_ms = 0, _REDIAL_MS[0]
        self.turned_away = 0  # connections in a row that ended in their handshake
        self.incoming = Incoming(MAX_FRAME)
        self.outgoing: deque[Buffer] = deque()


class ManyLinks:
    """The connections of many sites. All methods belong to one thread.

    Args:
        server: address of the server, ``tcp://HOST:PORT``.
        names: of the sites, with the random id of each one's process (16 bytes).

    Attributes:
        exchange: publishes what the sites offer and pulls what they ask for; a peer is a site's name.

    Raises:
        ConfigError: the address is malformed or unknown, or this process may have too few files open.
    """

    def __init__(self, server: str, names: Iterable[tuple[str, bytes]]) -> None:
        where = Server.of(server)
        try:
            found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise ConfigError(f"cannot dial {server}: {error.strerror}") from None
        self._family: int = found[0][0]
        self._address: Any = found[0][4]
        self._wires = {name: _Wire(name, identity) for name, identity in names}
        require_free_files(len(self._wires) + _FILES_BESIDE, "the sites' connections")
        self.exchange = Exchange()
        self._selector = selectors.DefaultSelector()
        if self.exchange.wake_fd >= 0:
            self._selector.register(self.exchange.wake_fd, selectors.EVENT_READ)
        self._read_into = memoryview(bytearray(_READ_BYTES))
        self._next_ping_ms = now_ms() + HEARTBEAT_MS
        self._down = set(self._wires.values())
        self._redial(now_ms())

    def send(self, name: str, message_: FromSite) -> None:
        """Send a control message of a site; it is lost where there is no connection."""
        self._put(self._wires[name], control_frames(message_))

    def step(self, seconds: float) -> Iterator[tuple[str, Control] | DataEvent]:
        """Send what is due, wait up to so many seconds for something to arrive, and yield what has come.

        That is a site's name and a control message for it, or an event of the core.

        Raises:
            ProtocolError: what listens at the address is no server that takes plain connections, or its frames are
                longer than any of a server.
        """
        now = now_ms()
        wait = self.exchange.tick(now)
        self._send_frames()
        self._ping(now)
        self._redial(now)
        timeout = min(round(seconds * 1000), self._next_ping_ms - now, wait if wait >= 0 else 1000)
        if self._down:
            timeout = min(timeout, _REDIAL_MS[0])
        for key, events in self._selector.select(max(0, timeout) / 1000):
            wire = key.data
            if wire is None:
                self.exchange.clear_wake()
                continue
            if events & selectors.EVENT_WRITE:
                self._on_writable(wire)
            if events & selectors.EVENT_READ and wire.dialled:
                self._read(wire)
                yield from arrivals(
                    self.exchange
                )  # what came for one site does not wait for another's
        yield from arrivals(self.exchange)

    # --- frames ---

    def _send_frames(self) -> None:
        while (out := self.exchange.next_out(now_ms())) is not None:
            peer, header, body = out
            self._put(self._wires[peer.decode()], [header] if body is None else [header, body])
            del out, body  # a chunk is on its way for as long as anyone has it

    def _ping(self, now: int) -> None:
        """Show the server each second that the sites are there."""
        if now < self._next_ping_ms:
            return
        self._next_ping_ms = now + HEARTBEAT_MS
        ping = [frame_header(Kind.PING)]
        for wire in self._wires.values():
            if not wire.outgoing:
                self._put(wire, ping)

    def _put(self, wire: _Wire, frames: Iterable[Buffer]) -> None:
        if wire.net is None:
            return
        idle = wire.up and not wire.outgoing
        wire.outgoing.extend(message(list(frames)))
        if idle:
            self._flush(wire)

    def _flush(self, wire: _Wire) -> None:
        """Send what the connection takes, and watch for when it takes more."""
        assert wire.net is not None
        try:
            while wire.outgoing:
                parts = [
                    wire.outgoing.popleft() for _ in range(min(len(wire.outgoing), _PARTS_AT_ONCE))
                ]
                sent = 0
                try:
                    sent = wire.net.sendmsg(parts)
                finally:
                    wire.outgoing.extendleft(reversed(_after(parts, sent)))
        except BlockingIOError:
            self._watch(wire, selectors.EVENT_READ | selectors.EVENT_WRITE)
            return
        except OSError:
            self._drop(wire)
            return
        self._watch(wire, selectors.EVENT_READ)

    def _read(self, wire: _Wire) -> None:
        assert wire.net is not None
        try:
            size = wire.net.recv_into(self._read_into)
        except BlockingIOError:
            return
        except OSError:
            size = 0
        if not size:
            self._drop(wire)
            return
        peer, now = wire.name.encode(), now_ms()
        for frames in wire.incoming.feed(self._read_into[:size]):
            if len(frames) > 2:  # counted and logged as malformed
                self.exchange.deliver(now, peer, b"", None)
            else:
                self.exchange.deliver(now, peer, frames[0], frames[1] if len(frames) == 2 else None)
        if wire.incoming.ready and not wire.up:
            wire.up, wire.delay_ms, wire.turned_away = True, _REDIAL_MS[0], 0
            self._flush(wire)

    # --- connections ---

    def _redial(self, now: int) -> None:
        for wire in [wire for wire in self._down if wire.redial_ms <= now]:
            self._down.discard(wire)
            net = socket.socket(self._family, socket.SOCK_STREAM)
            net.setblocking(False)
            net.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            net.connect_ex(self._address)  # how it ends is seen once the socket can be written to
            wire.net, wire.incoming = net, Incoming(MAX_FRAME)
            self._selector.register(net, selectors.EVENT_WRITE, wire)

    def _on_writable(self, wire: _Wire) -> None:
        assert wire.net is not None
        if wire.up:
            self._flush(wire)
        elif wire.net.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._drop(wire)
        else:
            wire.dialled = True
            self._watch(wire, selectors.EVENT_READ)
            try:
                wire.net.sendall(opening(wire.identity))
            except OSError:
                self._drop(wire)

    def _watch(self, wire: _Wire, events: int) -> None:
        assert wire.net is not None
        if self._selector.get_key(wire.net).events != events:
            self._selector.modify(wire.net, events, wire)

    def _drop(self, wire: _Wire) -> None:
        """Let go of a connection; what was to be sent over it is lost.

        Raises:
            ProtocolError: that was the last of several that the server has closed at once.
        """
        wire.turned_away += wire.dialled and not wire.up
        wire.dialled = wire.up = False
        net, wire.net = wire.net, None
        assert net is not None
        self._selector.unregister(net)
        net.close()
        wire.outgoing.clear()
        wire.redial_ms = now_ms() + wire.delay_ms
        wire.delay_ms = min(2 * wire.delay_ms, _REDIAL_MS[1])
        self._down.add(wire)
        if wire.turned_away >= _TURNED_AWAY:
            raise ProtocolError(
                "the server closes each connection at once; it may want encrypted ones, and these are plain text"
            )

    def close(self) -> None:
        """Close the connections; messages get up to a second to leave."""
        until = now_ms() + round(_LINGER_SECONDS * 1000)
        for wire in self._wires.values():
            if wire.net is None:
                continue
            if wire.up and wire.outgoing:
                wire.net.settimeout(max(0.0, (until - now_ms()) / 1000))
                with contextlib.suppress(OSError):
                    for part in wire.outgoing:
                        wire.net.sendall(part)
            self._selector.unregister(wire.net)
            wire.net.close()
        self._selector.close()


def _after(parts: list[Buffer], sent: int) -> list[Buffer]:
    """Return what is left of parts of which so many bytes were sent."""
    for number, part in enumerate(parts):
        size = memoryview(part).nbytes
        if sent < size:
            return [memoryview(part).cast("B")[sent:] if sent else part, *parts[number + 1 :]]
        sent -= size
    return []
