"""One ZeroMQ socket, its pump thread, and the compiled data plane behind it.

A server has a `ServerLink` (ROUTER, it listens), a site has a `SiteLink` (DEALER, it dials). Tensor chunks go
between the socket and the core (`fedcore._core.Exchange`) inside the pump thread and never appear here; what
appears here is control messages and the core's events.

With keys, a link is encrypted (CURVE), and a server's peer is ``USER NUL ROUTING-ID``: the text that the door
(`fedcore.admission`) gave the connection, which no peer can choose, and the id that the peer chose. Without keys,
a peer is its routing id alone.

The pump is `fedcore._pump`, which runs without the GIL. `FEDCORE_PUMP=python` forces the plain Python loop of
this module, which is also the fallback where the compiled one cannot find pyzmq's libzmq.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import zmq

from . import protocol
from ._core import Exchange, crc32c
from .connections import DROP, Notes, note
from .errors import BusyError, ClosedError, ConfigError
from .protocol import HEADER, MAGIC, PROTOCOL_VERSION, FromServer, FromSite, Kind

if TYPE_CHECKING:
    from .admission import Secured
    from .security import AllowList, Credentials

__all__ = [
    "Control",
    "DataEvent",
    "ServerLink",
    "SiteLink",
    "now_ms",
    "other_version",
    "pump_name",
]

_M = TypeVar("_M", FromServer, FromSite)
DataEvent = tuple[Any, ...]
"""What ``Exchange.next_event()`` returns: its kind, then what belongs to it."""

HEARTBEAT_MS: Final = 1000
SEND_QUEUE: Final = 1000
"""Messages that wait at a server for one peer to read them; further ones are lost."""
RECEIVE_QUEUE: Final = 16
"""Messages of one peer that a server's socket takes in before they are handled; then the peer has to wait."""
UNREAD_MS: Final = 30_000
"""The system ends the connection of a peer that has read nothing for so long of what was sent to it."""
MUTE_MS: Final = 10_000
"""For how long a key that sent too much is not heard."""
_MAX_FRAME: Final = protocol.MAX_CONTROL_BYTES + 1024  # encryption adds 33 bytes
_SITE_LIMITS: Final = (32 << 20, 16 << 20, 64 << 20)
"""Bytes of a site: its update's on their way, of which its one peer may have half, and of control messages."""
_LINGER_MS: Final = 1000
_IO_THREADS: Final = min(4, os.cpu_count() or 1)  # of a server: each connection belongs to one
_RECONNECT_MS: Final = (100, 2000)
_HANDSHAKE_MS: Final = 10_000
_FAILURES: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@dataclass(frozen=True)
class Control:
    """A control message: the sender as the link knows it (empty at a site) and its JSON body."""

    peer: bytes
    body: bytes


def now_ms() -> int:
    """Return the monotonic clock in milliseconds, the one that the pump hands to the core."""
    return time.monotonic_ns() // 1_000_000


def other_version(malformed: str) -> int | None:
    """Return the version of a frame that the core calls malformed; None if something else is wrong with it."""
    found = re.match(r"the protocol version is (\d+), not ", malformed)
    return int(found[1]) if found else None


def pump_name() -> str:
    """Return which pump new links use: ``"compiled"`` or ``"python"``."""
    return "python" if _compiled_pump() is None else "compiled"


def _compiled_pump() -> Any | None:
    choice = os.environ.get("FEDCORE_PUMP", "auto")
    if choice not in ("auto", "compiled", "python"):
        raise ConfigError(f"FEDCORE_PUMP={choice!r}: expected auto, compiled or python")
    if choice == "python":
        return None
    try:
        from . import _pump
    except ImportError:
        if choice == "compiled":
            raise
        return None
    return _pump


def control_frames(
    message: FromSite | FromServer, version: int | None = None
) -> tuple[bytes, bytes]:
    """Return the header and body frames of a control message; ``version`` is for a peer of another one."""
    body = protocol.encode(message)
    head = HEADER.pack(
        MAGIC,
        PROTOCOL_VERSION if version is None else version,
        Kind.CONTROL,
        0,
        0,
        protocol.NO_SET,
        0,
        0,
        len(body),
        crc32c(body),
        0,
    )
    return head[:44] + crc32c(head[:44]).to_bytes(4, "little"), body


class _Link:
    """What both ends share. `recv` belongs to one thread; `send`, `kick` and `wake` to any.

    Attributes:
        run_id: of the run that this end works in, once known; what it sends within the run names it.
    """

    run_id: str | None = None
    _router: bool
    _secure = False
    _notes: Notes | None = None
    _monitor: zmq.Socket[bytes] | None = None

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], net: zmq.Socket[bytes], pump: Any | None
    ) -> None:
        self.exchange = Exchange()
        self._pump = pump
        self._context = context
        self._net = net
        self._lock = threading.Lock()
        self._closed = False
        self._pid = os.getpid()
        self._events_next = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        name = f"inproc://fedcore-{id(self)}"
        self._commands, pump_commands = self._pair(zmq.PUSH, zmq.PULL, name + "-commands")
        pump_inbox, self._inbox = self._pair(zmq.PUSH, zmq.PULL, name + "-inbox")
        self._pump_sockets = (pump_commands, pump_inbox)
        self._thread = threading.Thread(target=self._run, name="fedcore-pump", daemon=True)
        atexit.register(self.close)  # a pump must not outlive the interpreter

    def _pair(
        self, sender: int, receiver: int, address: str
    ) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        ends = self._context.socket(sender), self._context.socket(receiver)
        for end in ends:
            end.setsockopt(zmq.SNDHWM, 0)
            end.setsockopt(zmq.RCVHWM, 0)
            end.setsockopt(zmq.LINGER, 0)
        ends[1].bind(address)
        ends[0].connect(address)
        return ends

    def _start(self) -> None:
        """Start the pump and wait until it runs: from then on it needs nothing of the interpreter."""
        self._thread.start()
        while not self._inbox.poll(1000):
            if not self._thread.is_alive():
                raise RuntimeError("the frame pump ended before it began")
        self._inbox.recv()

    def _run(self) -> None:
        commands, inbox = self._pump_sockets
        if self._pump is not None:
            self._pump.run(
                self.exchange.capsule(),
                self._net.underlying,
                commands.underlying,
                inbox.underlying,
                self._router,
                self._router and self._secure,
                *(
                    (self._notes.heard, self._notes.moved, self._notes.owners)
                    if self._notes
                    else ()
                ),
            )
        else:
            _python_pump(
                self.exchange,
                self._net,
                (commands, inbox),
                router=self._router,
                secure=self._router and self._secure,
                notes=self._notes,
            )

    def recv(self, timeout: float | None) -> Control | DataEvent | None:
        """Wait up to ``timeout`` seconds (None: for ever) for a control message or an event of the core.

        Returns None on timeout and after `wake`.
        """
        arrived = self._next()
        if arrived is not None:
            return arrived
        if self._closed:
            raise ClosedError("the link is closed")
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        if self._monitor is not None:
            poller.register(self._monitor, zmq.POLLIN)
        ready = dict(poller.poll(None if timeout is None else max(0, round(timeout * 1000))))
        if self._wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        if self._monitor is not None and self._monitor in ready:
            self._note_handshake(self._monitor.recv_multipart())
        if self._inbox in ready:
            self._inbox.recv()
            self.exchange.listening()
        return self._next()

    def _next(self) -> Control | DataEvent | None:
        """Return what waits in the exchange: events and control messages in turn, so that neither delays the
        other."""
        for _ in range(2):
            self._events_next = not self._events_next
            if self._events_next:
                event = self.exchange.next_event()
                if event is not None:
                    return event
            else:
                control = self.exchange.next_control(now_ms())
                if control is not None:
                    return Control(*control)
        return None

    def _note_handshake(self, event: list[bytes]) -> None:
        """Take note of how a handshake ended."""

    def _command(self, frames: Sequence[bytes]) -> None:
        with self._lock:
            if not self._closed:
                self._commands.send_multipart(frames)

    def _of_run(self, message: _M) -> _M:
        if isinstance(message, protocol.OfRun) and message.run_id is None and self.run_id:
            return message.model_copy(update={"run_id": self.run_id})
        return message

    def kick(self) -> None:
        """Make the pump look for frames to send, after the exchange was given something to do."""
        self._command([b"K"])

    def wake(self) -> None:
        """Make `recv` return None early; safe from any thread and from a signal handler."""
        with contextlib.suppress(OSError):
            os.write(self._wake_write, b"\0")

    def close(self) -> None:
        """Stop the pump and close the sockets; queued messages get up to a second to leave."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            atexit.unregister(self.close)
            if os.getpid() == self._pid:
                self._commands.send(b"Q")
        if os.getpid() != self._pid:
            return  # threads and sockets stayed with the parent process
        self._thread.join()
        for socket in (self._commands, self._inbox, *self._pump_sockets):
            socket.close()
        if self._monitor is not None:
            self._net.monitor(None, 0)
            self._monitor.close(linger=0)
        self._net.close(linger=_LINGER_MS)
        self._closed_net()
        self._context.term()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _closed_net(self) -> None:
        """Close what must be there for as long as the network socket is."""


class ServerLink(_Link):
    """The server's end: a ROUTER bound to ``listen`` (``tcp://host:port``, port 0 for a free one).

    Args:
        listen: the address.
        secured: the server's keys and whom it admits; None: plain text from everybody.

    Raises:
        BusyError: another process listens there.
        ConfigError: the address cannot be bound.
    """

    _router = True

    def __init__(self, listen: str, secured: Secured | None = None) -> None:
        pump = _compiled_pump()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=_IO_THREADS)
        net = context.socket(zmq.ROUTER)
        _set_common(net, listen)
        net.setsockopt(zmq.ROUTER_MANDATORY, 1)
        net.setsockopt(zmq.ROUTER_HANDOVER, 1)
        net.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        net.setsockopt(zmq.SNDHWM, SEND_QUEUE)
        net.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE)
        net.setsockopt(zmq.TCP_MAXRT, UNREAD_MS)
        self._door = None
        if secured is not None:
            from .admission import DOMAIN, Doorkeeper

            self._secure = True
            net.setsockopt(zmq.CURVE_SERVER, 1)
            net.setsockopt(zmq.CURVE_SECRETKEY, secured.pair.secret.encode())
            net.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
            self._door = Doorkeeper(context, secured)
            self._notes = self._door.notes
            self._door.watch(net)
        try:
            net.bind(listen)
        except zmq.ZMQError as error:
            net.close(linger=0)
            self._closed_net()
            context.term()
            if error.errno == zmq.EADDRINUSE:
                raise BusyError(
                    f"cannot listen on {listen}: another process uses that port; stop it or choose "
                    "another port (server.listen in the run file)"
                ) from None
            raise ConfigError(
                f"cannot listen on {listen}: {error.strerror}; expected tcp://ADDRESS:PORT with an "
                "address of this machine, such as tcp://0.0.0.0:7733"
            ) from None
        self.endpoint: str = net.getsockopt_string(zmq.LAST_ENDPOINT)
        super().__init__(context, net, pump)
        self._start()

    @property
    def secure(self) -> bool:
        """Whether connections are encrypted and peers known by their keys."""
        return self._secure

    def admit(self, allowed: AllowList) -> None:
        """Let in those of another allow-list from now on; connections that stand are not touched (see `block`)."""
        assert self._door is not None
        self._door.allowed = allowed

    def block(self, user: str, blocked: bool = True) -> None:
        """Hear nothing more from the connections of a user, as `Identity.user` names it, and cut them as they
        speak; or hear them again."""
        self.exchange.block(user.encode(), blocked)
        if blocked:
            self.look()

    def mute(self, peer: bytes) -> None:
        """Hear nothing from a peer's key for `MUTE_MS`, and cut its connections as they speak."""
        self.exchange.mute(peer, now_ms() + MUTE_MS)
        self.look()

    def look(self) -> None:
        """For a while, look for connections that are not heard any more, and cut them."""
        if self._door is not None:
            self._door.look()

    def send(self, peer: bytes, message: FromServer, version: int | None = None) -> None:
        """Queue a control message for ``peer``; a peer that is gone does not get it.

        ``version`` is for a `protocol.Refused` to a peer of another protocol version, which reads no other frames.
        """
        routing = peer.partition(b"\0")[2] if self._secure else peer
        self._command([b"S", routing, *control_frames(self._of_run(message), version)])

    def _closed_net(self) -> None:
        if self._door is not None:
            self._door.close()


class SiteLink(_Link):
    """A site's end: a DEALER that dials ``server`` and keeps redialling with backoff (0.1 to 2 s).

    ``identity`` is 16 random bytes, the same for the life of the process. The pump pings the server each
    second. Nothing is raised for a server that is not there: ask ``exchange.last_heard(b"")``.

    Attributes:
        refused: why the server will never take this link's handshake, noticed by `recv`; else empty.
        hint: what a handshake that failed points to; empty again once one succeeds.
    """

    _router = False

    def __init__(
        self, server: str, identity: bytes, credentials: Credentials | None = None
    ) -> None:
        pump = _compiled_pump()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        net = context.socket(zmq.DEALER)
        _set_common(net, server)
        net.setsockopt(zmq.ROUTING_ID, identity)
        net.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS[0])
        net.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MS[1])
        if credentials is not None:
            self._secure = True
            net.setsockopt(zmq.CURVE_SERVERKEY, credentials.server_key.encode())
            net.setsockopt(zmq.CURVE_PUBLICKEY, credentials.pair.public.encode())
            net.setsockopt(zmq.CURVE_SECRETKEY, credentials.pair.secret.encode())
        monitor = f"inproc://fedcore-handshakes-{id(self)}"
        net.monitor(monitor, _FAILURES)
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.setsockopt(zmq.RCVHWM, 0)
        self._monitor.connect(monitor)
        self.refused = self.hint = ""
        try:
            net.connect(server)
        except zmq.ZMQError as error:
            net.monitor(None, 0)
            self._monitor.close(linger=0)
            net.close(linger=0)
            context.term()
            raise ConfigError(
                f"cannot dial {server!r}: {error.strerror}; expected tcp://HOST:PORT"
            ) from None
        self.server = server
        super().__init__(context, net, pump)
        self.exchange.set_limits(*_SITE_LIMITS)
        self.exchange.heartbeat(HEARTBEAT_MS)
        self._start()

    def send(self, message: FromSite) -> None:
        """Queue a control message for the server."""
        self._command([b"S", b"", *control_frames(self._of_run(message))])

    def silent_ms(self) -> int | None:
        """Return for how long nothing came from the server, or None if nothing ever did."""
        heard = self.exchange.last_heard(b"")
        return None if heard is None else max(0, now_ms() - heard)

    def _note_handshake(self, event: list[bytes]) -> None:
        kind = int.from_bytes(event[0][:2], sys.byteorder)
        if kind == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.hint = ""
        elif kind == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self.refused = (
                f"the server at {self.server} does not admit this key; ask its operator to admit the public key "
                "(`fedcore admit`), or whether it was revoked"
            )
        elif kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            self.refused = self._mismatch()
        else:
            self.hint = (
                f"what listens at {self.server} ended the handshake: it has another key than server_key in the "
                "kit, or does not speak encrypted"
                if self._secure
                else self._mismatch()
            )

    def _mismatch(self) -> str:
        if self._secure:
            return (
                f"what listens at {self.server} does not speak encrypted; is it the right server?"
            )
        return (
            f"the server at {self.server} wants an encrypted connection; set FEDCORE_KIT to the kit that its "
            "operator made for this site"
        )


def _set_common(net: zmq.Socket[bytes], address: str) -> None:
    net.setsockopt(zmq.SNDHWM, 0)  # what is sent was asked for: windows bound it, not the socket
    net.setsockopt(zmq.MAXMSGSIZE, _MAX_FRAME)
    net.setsockopt(zmq.LINGER, _LINGER_MS)
    if "[" in address:
        net.setsockopt(zmq.IPV6, 1)


def _python_pump(
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
    inbox.send(b"E")  # it runs
    while True:
        wait = exchange.tick(now_ms())
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
        if exchange.has_event():
            inbox.send(b"E")
        try:
            ready = dict(poller.poll(None if wait < 0 else wait))
        except zmq.ContextTerminated:
            return
        if exchange.wake_fd in ready:
            exchange.clear_wake()
        if commands in ready and not _python_commands(net, commands, router):
            return
        if net in ready:
            _python_frames(exchange, net, router, secure, notes)


def _python_commands(net: zmq.Socket[bytes], commands: zmq.Socket[bytes], router: bool) -> bool:
    while True:
        try:
            verb, *frames = commands.recv_multipart(zmq.DONTWAIT)
        except zmq.Again:
            return True
        if verb == b"Q":
            return False
        if verb == b"S":
            with contextlib.suppress(zmq.ZMQError):
                net.send_multipart(frames if router else frames[1:], zmq.DONTWAIT)


def _python_frames(
    exchange: Exchange,
    net: zmq.Socket[bytes],
    router: bool,
    secure: bool,
    notes: Notes | None,
) -> None:
    for _ in range(64):
        try:
            frames = net.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return
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
