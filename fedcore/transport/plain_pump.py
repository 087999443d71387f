"""The frame pump in plain Python: the reference for ``fedcore._pump``, and the fallback where it can't be had."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import zmq

from fedcore.security.connections import DROP, Notes, note
from fedcore.security.sockets import moved_bytes

if TYPE_CHECKING:
    from fedcore._core import Exchange

__all__ = ["now_ms", "run_pump"]

_LOOK_MS: Final = 1000
"""So often it is looked at how much a site's connection has received."""


def now_ms() -> int:
    """Return the monotonic clock in milliseconds, the one that the pump hands to the core."""
    return time.monotonic_ns() // 1_000_000


def run_pump(
    exchange: Exchange,
    net: zmq.Socket[bytes],
    ends: tuple[zmq.Socket[bytes], zmq.Socket[bytes]],
    *,
    router: bool,
    secure: bool,
    notes: Notes | None,
) -> None:
    """Do what ``fedcore._pump.run`` does, in Python: the reference and the fallback."""
    commands, inbox = ends
    poller = zmq.Poller()
    poller.register(net, zmq.POLLIN)
    poller.register(commands, zmq.POLLIN)
    if exchange.wake_fd >= 0:
        poller.register(exchange.wake_fd, zmq.POLLIN)
    dial = _Dial()
    inbox.send(b"E")  # it runs
    while True:
        wait = exchange.tick(now_ms())
        _send_frames(exchange, net, router, secure)
        if exchange.has_event():
            inbox.send(b"E")
        if dial.endpoint:
            dial.look(exchange)
            if exchange.silent(now_ms()):
                dial.go(net, dial.endpoint, exchange)
                continue  # there is something to ask for
        try:
            ready = dict(poller.poll(None if wait < 0 else wait))
        except zmq.ContextTerminated:
            return
        if exchange.wake_fd in ready:
            exchange.clear_wake()
        if commands in ready and not _take_commands(net, commands, router, dial, exchange):
            return
        if net in ready:
            number = _take_frames(exchange, net, router, secure, notes)
            dial.number = dial.number if number is None else number


def _send_frames(exchange: Exchange, net: zmq.Socket[bytes], router: bool, secure: bool) -> None:
    while (out := exchange.next_out(now_ms())) is not None:
        peer, header, body = out
        frames: list[Any] = [header] if body is None else [header, body]
        routing_id = peer.partition(b"\0")[2] if secure else peer
        try:
            net.send_multipart(
                [routing_id, *frames] if router else frames, zmq.DONTWAIT, copy=False
            )
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                exchange.unreachable(peer)
        del out, body, frames  # a chunk is on its way for as long as anyone has it


@dataclass
class _Dial:
    """A site's connection: where to, the file of the last message, and when that was looked at."""

    endpoint: str = ""
    number: int = -1
    looked_ms: int = 0

    def go(self, net: zmq.Socket[bytes], endpoint: str, exchange: Exchange) -> None:
        """Let go of the connection, if there is one, and connect to ``endpoint``, whose address is a number.

        What waits for the old connection is dropped: libzmq would go on dialling to send it, see ``_pump.pyx``.
        """
        if self.endpoint:
            linger = net.getsockopt(zmq.LINGER)
            net.setsockopt(zmq.LINGER, 0)
            with contextlib.suppress(zmq.ZMQError):
                net.disconnect(self.endpoint)
            net.setsockopt(zmq.LINGER, linger)
        self.endpoint, self.number = endpoint, -1
        net.setsockopt(zmq.IPV6, int("[" in endpoint))
        with contextlib.suppress(zmq.ZMQError):
            net.connect(endpoint)
        exchange.dialled(now_ms())

    def look(self, exchange: Exchange) -> None:
        """Note how much has moved over the connection: a long message is none before its end."""
        if self.number >= 0 and now_ms() - self.looked_ms >= _LOOK_MS:
            self.looked_ms = now_ms()
            exchange.moved(*moved_bytes(self.number), self.looked_ms)


def _take_commands(
    net: zmq.Socket[bytes],
    commands: zmq.Socket[bytes],
    router: bool,
    dial: _Dial,
    exchange: Exchange,
) -> bool:
    while True:
        try:
            verb, *frames = commands.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return True
        if verb == b"Q":
            return False
        if verb == b"D":
            dial.go(net, frames[0].decode(), exchange)
        if verb == b"S":
            with contextlib.suppress(zmq.ZMQError):
                net.send_multipart(frames if router else frames[1:], zmq.DONTWAIT)
            if not router:
                exchange.sent(sum(map(len, frames)), now_ms())


def _take_frames(
    exchange: Exchange,
    net: zmq.Socket[bytes],
    router: bool,
    secure: bool,
    notes: Notes | None,
) -> int | None:
    """Hand over what has come; returns the file of a site's connection, if something has."""
    number = None
    for _ in range(64):
        try:
            frames = net.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            break
        if not router:
            number = int(frames[0].get("__fd"))
        peer = frames.pop(0).bytes if router else b""
        user = b""
        if secure:
            user = str(frames[0].get("User-Id")).encode() if frames else b""
            peer = user + b"\0" + peer
        if not 1 <= len(frames) <= 2:  # counted by its bytes and logged as malformed
            exchange.deliver(now_ms(), peer, b"", b"".join(frame.bytes for frame in frames))
            if notes is not None and frames:
                note(notes, int(frames[0].get("__fd")), user, DROP)
            continue
        body = frames[1].buffer if len(frames) == 2 else None
        verdict = exchange.deliver(now_ms(), peer, frames[0].bytes, body)
        if notes is not None:
            note(notes, int(frames[0].get("__fd")), user, verdict)
    return number
