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
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import zmq
from zmq.utils import z85
from zmq.utils.monitor import parse_monitor_message

from .security import AllowList, KeyPair, fingerprint

__all__ = ["DOMAIN", "Doorkeeper", "Limits", "Secured"]

DOMAIN: Final = b"fedcore"
_ZAP: Final = "inproc://zeromq.zap.01"
_LOG_SECONDS: Final = 1.0
_MAX_BUCKETS: Final = 4096
_EVENTS: Final = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_GONE: Final = (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED)

logger = logging.getLogger("fedcore.server")


@dataclass(frozen=True)
class Limits:
    """What one key, one address and all together may ask of the door.

    Attributes:
        burst, per_second: handshakes of one key at once, and over time.
        strangers_burst, strangers_per_second: the same of all unknown keys together.
        connections: open connections in all; ``per_address`` of them from one address (loopback: no limit).
    """

    burst: int = 20
    per_second: float = 2.0
    strangers_burst: int = 50
    strangers_per_second: float = 20.0
    connections: int = 4096
    per_address: int = 256


@dataclass(frozen=True)
class Secured:
    """What makes a `ServerLink` an encrypted one: the server's pair, who may connect, and the door's limits."""

    pair: KeyPair
    allowed: AllowList
    limits: Limits = Limits()


class _Bucket:
    """So many at once, so many a second."""

    def __init__(self, burst: float, per_second: float, now: float) -> None:
        self._burst, self._rate = burst, per_second
        self._left, self._at = burst, now

    def take(self, now: float) -> bool:
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Doorkeeper:
    """Answers for one context. Make it before the socket that it guards is bound; `watch` that socket.

    A key over its rate gets no answer, so that its connection hangs until the handshake's time is over (200 to go
    in, 300 later, 400 never, in the words of ZAP). A connection over a limit is cut as soon as it is accepted.
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
        self._buckets: dict[str, _Bucket] = {}
        self._strangers = _Bucket(
            secured.limits.strangers_burst, secured.limits.strangers_per_second, clock()
        )
        self._open: dict[int, str] = {}
        self._from: dict[str, int] = {}
        self._connections = min(secured.limits.connections, _file_limit() * 7 // 8)
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

    def close(self) -> None:
        """Stop answering; call it when the socket that is guarded is closed."""
        os.write(self._quit_write, b"\0")
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
        while True:
            ready = dict(poller.poll())
            if self._quit_read in ready:
                return
            if self._events in ready:
                event = parse_monitor_message(self._events.recv_multipart())
                self._count(event["event"], event["value"])
            if self._asked in ready:
                self._answer(self._asked.recv_multipart())

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
            if not self._strangers.take(now):
                return b"300", ""
            self._say(
                "refused a key that is not on the allow-list, %s from %s",
                fingerprint(public), address,
            )  # fmt: skip
            return b"400", ""
        if public not in self._buckets and len(self._buckets) >= _MAX_BUCKETS:
            self._buckets.clear()
        bucket = self._buckets.setdefault(
            public, _Bucket(self._limits.burst, self._limits.per_second, now)
        )
        if not bucket.take(now):
            self._say("%s knocks too often, from %s: it has to wait", who.name, address)
            return b"300", ""
        return b"200", who.user

    def _count(self, event: int, number: int) -> None:
        if event in _GONE:
            address = self._open.pop(number, None)
            if address is not None:
                self._from[address] -= 1
                if not self._from[address]:
                    del self._from[address]
            return
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
            address = str(connection.getpeername()[0])
            self._count_gone_by(number)
            self._open[number] = address
            self._from[address] = self._from.get(address, 0) + 1
            if self.crowded(address):
                connection.shutdown(socket.SHUT_RDWR)

    def _count_gone_by(self, number: int) -> None:
        """A number that is accepted again was closed before, though nothing said so."""
        if number in self._open:
            self._count(zmq.EVENT_CLOSED, number)

    def crowded(self, address: str) -> bool:
        """Whether the connection just counted is one too many, by its address or in all."""
        local = address.startswith(("127.", "::ffff:127.")) or address == "::1"
        if not local and self._from[address] > self._limits.per_address:
            self._say(
                "%s has %s connections: no more of them", address, str(self._limits.per_address)
            )
            return True
        if len(self._open) > self._connections:
            self._say(
                "%s connections are open: no more, not from %s", str(self._connections), address
            )
            return True
        return False

    def _say(self, text: str, *values: str) -> None:
        """Warn at most once a second of each kind: who knocks must not fill the disk."""
        now = self._clock()
        due, left_out = self._said.get(text, (0.0, 0))
        if now < due:
            self._said[text] = (due, left_out + 1)
            return
        self._said[text] = (now + _LOG_SECONDS, 0)
        more = f" (and {left_out} more since the last such line)" if left_out else ""
        logger.warning(text + more, *values)


def _file_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft
