"""The encrypted connections of many sites to one server, with one data plane, driven by one thread.

As `fedcore.transport.many_links.ManyLinks`, but each site has a socket of libzmq, which has the encryption: 50 to
100 KiB. It redials by itself, to the address that the server's name stood for when it was dialled.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import zmq

from fedcore._core import Exchange
from fedcore.errors import RefusedError
from fedcore.protocol import FromSite, Kind, control_frames, frame_header

from .dialling import Server
from .link import HEARTBEAT_MS, MAX_FRAME, Control, DataEvent, now_ms
from .many_links import arrivals
from .open_files import require_free_files

if TYPE_CHECKING:
    from fedcore.security.keys import Credentials

__all__ = ["ManySecuredLinks"]

_FILES_BESIDE: Final = 16
_FILES_OF_SITE: Final = 4
_SOCKETS_OF_SITE: Final = 3
_MESSAGES_AT_ONCE: Final = 64
_REDIAL_MS: Final = (100, 2000)
_LINGER_MS: Final = 1000


class ManySecuredLinks:
    """The encrypted connections of many sites. All methods belong to one thread.

    Args:
        server: address of the server, ``tcp://HOST:PORT``.
        names: of the sites, with the random id of each one's process (16 bytes).
        keys: what each site dials with, by its name.

    Attributes:
        exchange: publishes what the sites offer and pulls what they ask for; a peer is a site's name.

    Raises:
        ConfigError: the address is malformed, or this process may have too few files open.
    """

    def __init__(
        self, server: str, names: Iterable[tuple[str, bytes]], keys: Mapping[str, Credentials]
    ) -> None:
        self._server = Server.of(server)
        sites = dict(names)
        require_free_files(len(sites) * _FILES_OF_SITE + _FILES_BESIDE, "the sites' connections")
        self.exchange = Exchange()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, len(sites) * _SOCKETS_OF_SITE + _FILES_BESIDE)
        self._poller = zmq.Poller()
        if self.exchange.wake_fd >= 0:
            self._poller.register(self.exchange.wake_fd, zmq.POLLIN)
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._names: dict[zmq.Socket[bytes], str] = {}
        self._monitors: dict[zmq.Socket[bytes], str] = {}
        for number, (name, identity) in enumerate(sites.items()):
            self._dial(number, name, identity, keys[name])
        self._next_ping_ms = now_ms() + HEARTBEAT_MS

    def _dial(self, number: int, name: str, identity: bytes, keys: Credentials) -> None:
        net = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.SNDHWM, 0),  # what is sent was asked for
            (zmq.MAXMSGSIZE, MAX_FRAME),
            (zmq.LINGER, _LINGER_MS),
            (zmq.RECONNECT_IVL, _REDIAL_MS[0]),
            (zmq.RECONNECT_IVL_MAX, _REDIAL_MS[1]),
            (zmq.IPV6, int("[" in self._server.address)),
        ):
            net.setsockopt(option, value)
        net.setsockopt(zmq.ROUTING_ID, identity)
        net.setsockopt(zmq.CURVE_SERVERKEY, keys.server_key.encode())
        net.setsockopt(zmq.CURVE_PUBLICKEY, keys.pair.public.encode())
        net.setsockopt(zmq.CURVE_SECRETKEY, keys.pair.secret.encode())
        monitor = f"inproc://site-{number}"
        net.monitor(monitor, zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        events = self._context.socket(zmq.PAIR)
        events.connect(monitor)
        net.connect(self._server.address)
        self._sockets[name], self._names[net], self._monitors[events] = net, name, name
        self._poller.register(net, zmq.POLLIN)
        self._poller.register(events, zmq.POLLIN)

    def send(self, name: str, message: FromSite) -> None:
        """Send a control message of a site; it may be lost where there is no connection."""
        if not self._context.closed:
            _put(self._sockets[name], control_frames(message))

    def step(self, seconds: float) -> Iterator[tuple[str, Control] | DataEvent]:
        """Send what is due, wait up to so many seconds for something to arrive, and yield what has come.

        That is a site's name and a control message for it, or an event of the core.

        Raises:
            RefusedError: the server does not admit a site's key.
        """
        now = now_ms()
        wait = self.exchange.tick(now)
        self._send_frames()
        if now >= self._next_ping_ms:
            self._next_ping_ms = now + HEARTBEAT_MS
            for net in self._names:
                _put(net, [frame_header(Kind.PING)])
        timeout = min(round(seconds * 1000), self._next_ping_ms - now, wait if wait >= 0 else 1000)
        for ready, _ in self._poller.poll(max(0, timeout)):
            if not isinstance(ready, zmq.Socket):
                self.exchange.clear_wake()
            elif ready in self._names:
                self._read(ready)
                yield from arrivals(
                    self.exchange
                )  # what came for one site does not wait for another's
            else:
                self._refuse(ready)
        yield from arrivals(self.exchange)

    def _read(self, net: zmq.Socket[bytes]) -> None:
        peer = self._names[net].encode()
        for _ in range(_MESSAGES_AT_ONCE):
            try:
                frames = net.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            if len(frames) > 2:  # counted and logged as malformed
                self.exchange.deliver(now_ms(), peer, b"", None)
            else:
                body = frames[1] if len(frames) == 2 else None
                self.exchange.deliver(now_ms(), peer, frames[0], body)

    def _refuse(self, events: zmq.Socket[bytes]) -> None:
        event, _ = events.recv_multipart()
        if int.from_bytes(event[:2], sys.byteorder) == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            name = self._monitors[events]
            text = f"the server at {self._server.address} does not admit the key of {name}"
            raise RefusedError(text, "key")

    def _send_frames(self) -> None:
        while (out := self.exchange.next_out(now_ms())) is not None:
            peer, header, body = out
            _put(self._sockets[peer.decode()], [header] if body is None else [header, body])
            del out, body  # a chunk is on its way for as long as anyone has it

    def close(self) -> None:
        """Close the connections; messages get up to a second to leave."""
        if self._context.closed:
            return
        for net in self._names:
            net.monitor(None, 0)
            net.close()
        for events in self._monitors:
            events.close(linger=0)
        self._context.term()


def _put(net: zmq.Socket[bytes], frames: Sequence[bytes | memoryview]) -> None:
    """Send a message, or drop it where a socket takes none, as after a refusal: all sites share the thread."""
    with contextlib.suppress(zmq.Again):
        net.send_multipart(frames, zmq.DONTWAIT, copy=False)
