"""The connections of many sites to one server, with one data plane, driven by one thread.

A `fedcore.transport.link.SiteLink` has threads of its own, for one connection. Here a site has a socket and
nothing else, about 32 KiB, so that one process can hold a thousand of them. All sets and pulls lie in one
`Exchange`, which knows the server at the other end of a site's socket by the site's name. A connection is plain
text, and the server's name is not resolved again: this is for virtual sites in the network of their server.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Final

import zmq

from fedcore._core import Exchange
from fedcore.protocol import FromSite, Kind, control_frames, frame_header

from .dialling import Server
from .link import HEARTBEAT_MS, Control, DataEvent, now_ms
from .open_files import require_free_files

__all__ = ["ManyLinks"]

_FILES: Final = 3  # of a site: its socket's two, and one to spare
_AT_ONCE: Final = 64
_RECONNECT_MS: Final = (100, 2000)
_LINGER_MS: Final = 1000


class ManyLinks:
    """The sockets of many sites. All methods belong to one thread.

    Args:
        server: address of the server, ``tcp://HOST:PORT``.
        names: of the sites, with the random id of each one's process (16 bytes).

    Attributes:
        exchange: publishes what the sites offer and pulls what they ask for; a peer is a site's name.

    Raises:
        ConfigError: the address is malformed, or this process may have too few files open.
    """

    def __init__(self, server: str, names: Iterable[tuple[str, bytes]]) -> None:
        Server.of(server)
        names = list(names)
        require_free_files(_FILES * len(names), "the sites' connections")
        self.exchange = Exchange()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, len(names) + 1)
        self._poller = zmq.Poller()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._names: dict[zmq.Socket[bytes], str] = {}
        self._next_ping_ms = now_ms() + HEARTBEAT_MS
        for name, identity in names:
            self._sockets[name] = socket = self._dial(server, identity)
            self._names[socket] = name
            self._poller.register(socket, zmq.POLLIN)
        if self.exchange.wake_fd >= 0:
            self._poller.register(self.exchange.wake_fd, zmq.POLLIN)

    def _dial(self, server: str, identity: bytes) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, identity)
        socket.setsockopt(zmq.SNDHWM, 0)  # what is sent was asked for: windows bound it
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS[0])
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MS[1])
        socket.setsockopt(zmq.IPV6, int("[" in server))
        socket.connect(server)
        return socket

    def send(self, name: str, message: FromSite) -> None:
        """Send a control message of a site."""
        with contextlib.suppress(zmq.ZMQError):  # it is lost, as where the connection is cut
            self._sockets[name].send_multipart(control_frames(message), zmq.DONTWAIT)

    def step(self, seconds: float) -> Iterator[tuple[str, Control] | DataEvent]:
        """Send what is due, wait up to so many seconds for something to arrive, and yield what has come.

        That is a site's name and a control message for it, or an event of the core.
        """
        now = now_ms()
        wait = self.exchange.tick(now)
        self._send_frames()
        self._ping(now)
        timeout = min(round(seconds * 1000), self._next_ping_ms - now)
        ready = self._poller.poll(max(0, timeout if wait < 0 else min(timeout, wait)))
        for source, _ in ready:
            if isinstance(source, zmq.Socket):
                self._take_frames(self._names[source], source)
                yield from self._arrived()  # what came for one site waits for no other's
            else:
                self.exchange.clear_wake()
        yield from self._arrived()

    def _arrived(self) -> Iterator[tuple[str, Control] | DataEvent]:
        now = now_ms()
        while (control := self.exchange.next_control(now)) is not None:
            yield control[0].decode(), Control(b"", control[1])
        while (event := self.exchange.next_event()) is not None:
            yield event

    def _send_frames(self) -> None:
        while (out := self.exchange.next_out(now_ms())) is not None:
            peer, header, body = out
            frames: list[Any] = [header] if body is None else [header, body]
            with contextlib.suppress(zmq.ZMQError):
                self._sockets[peer.decode()].send_multipart(frames, zmq.DONTWAIT, copy=False)
            del out, body, frames  # a chunk is on its way for as long as anyone has it

    def _take_frames(self, name: str, socket: zmq.Socket[bytes]) -> None:
        for _ in range(_AT_ONCE):
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            if len(frames) > 2:  # counted and logged as malformed
                self.exchange.deliver(now_ms(), name.encode(), b"", None)
                continue
            body = frames[1].buffer if len(frames) == 2 else None
            self.exchange.deliver(now_ms(), name.encode(), frames[0].bytes, body)

    def _ping(self, now: int) -> None:
        """Show the server each second that the sites are there."""
        if now < self._next_ping_ms:
            return
        self._next_ping_ms = now + HEARTBEAT_MS
        ping = frame_header(Kind.PING)
        for socket in self._sockets.values():
            with contextlib.suppress(zmq.ZMQError):
                socket.send(ping, zmq.DONTWAIT)

    def close(self) -> None:
        """Close the sockets; messages get up to a second to leave."""
        for socket in self._sockets.values():
            socket.close()
        self._context.term()
