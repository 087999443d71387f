"""The door of an encrypted server: which keys may connect, how often, and from where.

ZeroMQ asks about each handshake (ZAP, RFC 27) and tells of each connection (its socket monitor); one thread
answers and counts. It sees handshakes only, never a frame of a connection that stands.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

import zmq
from zmq.utils import z85

from .connections import Connections, Limits, Notes
from .keys import AllowList, KeyPair, fingerprint
from .rate_limit import TokenBucket
from .sockets import received_bytes

__all__ = ["DOMAIN", "Doorkeeper", "Limits", "Secured"]

DOMAIN: Final = b"fedcore"
_ZAP: Final = "inproc://zeromq.zap.01"
_LOG_SECONDS: Final = 1.0
_SWEEP_SECONDS: Final = 0.05
_UNFINISHED_SECONDS: Final = 0.25
"""So often all connections are looked at, for messages without end; less often where there are thousands."""
SILENCE_SECONDS: Final = 10.0
"""So often all connections are looked at, for those that are silent."""
_WATCH_SECONDS: Final = 60.0
MAX_BUCKETS: Final = 4096
_MAX_FILES: Final = 1 << 20
_BATCH: Final = 256
_EVENTS: Final = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_EVENT: Final = struct.Struct("=hi")
"""The event and its connection's number, as zmq_socket_monitor sends them. pyzmq's parser would load asyncio."""
_GONE: Final = (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED)

logger = logging.getLogger("fedcore.server")


@dataclass(frozen=True)
class Secured:
    """What makes a `ServerLink` an encrypted one: the server's pair, who may connect, and the door's limits."""

    pair: KeyPair
    allowed: AllowList
    limits: Limits = field(default_factory=Limits)


class Doorkeeper:
    """Answers for one context. Make it before the socket that it guards is bound; `watch` that socket.

    A key over its rate gets no answer, so that its connection hangs until the handshake's time is over (200 to go
    in, 300 later, 400 never, in the words of ZAP). A connection over a limit is cut as soon as it is accepted, and
    while there are connections that have not proved themselves, they are looked at every 50 ms; all are looked at
    four times a second, for messages without end, and every 10 s, for those that are silent.

    Attributes:
        notes: where the pump notes of each connection, by its file number, that it was understood or may go.
        allowed: whom it lets in, from the next handshake on.
        connections: those that are open.
        buckets: the rate limit of each key that has knocked lately.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        secured: Secured,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.allowed = secured.allowed
        self._limits = secured.limits
        self._clock = clock
        self._context = context
        self._asked = context.socket(zmq.ROUTER)
        self._asked.setsockopt(zmq.LINGER, 0)
        self._asked.setsockopt(zmq.RCVHWM, 0)
        self._asked.setsockopt(zmq.SNDHWM, 0)
        self._asked.bind(_ZAP)
        self._events: zmq.Socket[bytes] | None = None
        limits = secured.limits
        self.buckets: dict[str, TokenBucket] = {}
        self._unknown = TokenBucket(limits.unknown_burst, limits.unknown_per_second, clock())
        files = min(_file_limit(), _MAX_FILES)
        self.notes = Notes.of(files)
        most = min(limits.connections, _file_limit() * 7 // 8)
        self.connections = Connections(limits, most, self.notes, received_bytes)
        self._watch_until = 0.0
        self._said: dict[str, tuple[float, int]] = {}
        self._quit_read, self._quit_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="fedcore-door", daemon=True)

    def watch(self, net: zmq.Socket[bytes]) -> None:
        """Begin to answer, and to count ``net``'s connections."""
        address = f"inproc://fedcore-door-{id(self)}"
        net.monitor(address, _EVENTS)
        self._events = self._context.socket(zmq.PAIR)
        self._events.setsockopt(zmq.RCVHWM, 0)
        self._events.setsockopt(zmq.LINGER, 0)
        self._events.connect(address)
        self._thread.start()

    def look(self) -> None:
        """For a while, look for connections that are not heard any more, and cut them."""
        self._watch_until = self._clock() + _WATCH_SECONDS
        os.write(self._quit_write, b"L")

    def close(self) -> None:
        """Stop answering; call it when the socket that is guarded is closed."""
        os.write(self._quit_write, b"Q")
        if self._thread.ident is not None:
            self._thread.join()
        self._asked.close()
        if self._events is not None:
            self._events.close()
        os.close(self._quit_read)
        os.close(self._quit_write)

    # --- the thread ---

    def _run(self) -> None:
        assert self._events is not None
        poller = zmq.Poller()
        for source in (self._asked, self._events, self._quit_read):
            poller.register(source, zmq.POLLIN)
        swept = looked = counted = self._clock()
        while True:
            ready = dict(poller.poll(self._patience_ms()))
            if self._quit_read in ready and b"Q" in os.read(self._quit_read, 4096):
                return
            if self._events in ready:
                self._take_events(self._events)
            if self._asked in ready:
                self._answer(self._asked.recv_multipart())
            now = self._clock()
            if now >= swept + _SWEEP_SECONDS:
                swept = now
                for number, why in self.connections.sweep(now):
                    self.cut(number, why)
            if now >= counted + self._unfinished_seconds():
                counted = now
                for number, why in self.connections.sweep_unfinished():
                    self.cut(number, why)
            if now >= looked + SILENCE_SECONDS:
                looked = now
                for number, why in self.connections.sweep_silent(now):
                    self.cut(number, why)

    def _patience_ms(self) -> int | None:
        watched = self.connections.unproved or self._clock() < self._watch_until
        if not watched and not len(self.connections):
            return None
        return round((_SWEEP_SECONDS if watched else self._unfinished_seconds()) * 1000)

    def _unfinished_seconds(self) -> float:
        return max(_UNFINISHED_SECONDS, len(self.connections) / 4000)

    def _take_events(self, events: zmq.Socket[bytes]) -> None:
        """Count all that is told, so that a connection is known before its key is asked about."""
        with contextlib.suppress(zmq.Again):
            for _ in range(_BATCH):
                event, number = _EVENT.unpack(events.recv_multipart(zmq.DONTWAIT)[0])
                self.count(event, number)

    def _answer(self, frames: list[bytes]) -> None:
        """Answer one request: envelope, empty, version, id, domain, address, identity, mechanism, credentials."""
        if len(frames) < 8 or frames[1] != b"" or frames[2] != b"1.0":
            return
        envelope, _, version, request, domain, address, _, mechanism, *given = frames
        code, user = b"400", ""
        if domain == DOMAIN and mechanism == b"CURVE" and len(given) == 1 and len(given[0]) == 32:
            code, user = self.decide(
                z85.encode(given[0]).decode(), address.decode("ascii", "replace")
            )
        self._asked.send_multipart([envelope, b"", version, request, code, b"", user.encode(), b""])

    def decide(self, public: str, address: str) -> tuple[bytes, str]:
        """Return the answer to a key that knocks, and by what name the link knows its connection."""
        now = self._clock()
        who = self.allowed.keys.get(public)
        if who is None:
            if not self._unknown.take(now):
                return b"300", ""
            self._say(
                "refused a key that is not on the allow-list, %s from %s",
                fingerprint(public), address,
            )  # fmt: skip
            return b"400", ""
        if public not in self.buckets and len(self.buckets) >= MAX_BUCKETS:
            self.buckets.clear()
        bucket = self.buckets.setdefault(
            public, TokenBucket(self._limits.burst, self._limits.per_second, now)
        )
        if not bucket.take(now):
            self._say("%s knocks too often, from %s: it has to wait", who.name, address)
            return b"300", ""
        self.connections.shown(address, now)
        return b"200", who.user

    def count(self, event: int, number: int) -> None:
        """Count a connection, by its file number, that libzmq says has come or gone."""
        if event in _GONE:
            self.connections.closed(number)
            return
        with contextlib.suppress(OSError), _connection(number) as connection:
            address = str(connection.getpeername()[0])
            surplus = self.connections.opened(number, address, self._clock())
            if surplus is not None:
                self.cut(*surplus)

    def cut(self, number: int, why: str) -> None:
        """End a connection; libzmq closes it then. Its number may have been taken by another one meanwhile."""
        with contextlib.suppress(OSError), _connection(number) as connection:
            address = str(connection.getpeername()[0])
            connection.shutdown(socket.SHUT_RDWR)
            self._say("cut a connection from %s, which %s", address, why)

    def _say(self, text: str, *values: str) -> None:
        """Warn at most once a second of each kind: who knocks must not fill the disk."""
        now = self._clock()
        due, left_out = self._said.get(text, (-_LOG_SECONDS, 0))
        if now < due:
            self._said[text] = (due, left_out + 1)
            return
        self._said[text] = (now + _LOG_SECONDS, 0)
        more = f" (and {left_out} more since the last such line)" if left_out else ""
        logger.warning(text + more, *values)


@contextlib.contextmanager
def _connection(number: int) -> Iterator[socket.socket]:
    """A connection of libzmq's by its number; OSError if that is no connection any more."""
    own = os.dup(number)
    try:
        connection = socket.socket(fileno=own)
    except OSError:
        os.close(own)
        raise
    with connection:
        yield connection


def _file_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft
