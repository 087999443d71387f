"""One ZeroMQ socket, its pump thread, and the compiled data plane behind it.

A server has a `ServerLink` (ROUTER, it listens), a site has a `SiteLink` (DEALER, it dials). Tensor chunks go
between the socket and the core (`fedcore._core.Exchange`) inside the pump thread and never appear here; what
appears here is control messages and the core's events.

With keys, a link is encrypted (CURVE), and a server's peer is ``USER NUL ROUTING-ID``: the text that the door
(`fedcore.security.door`) gave the connection, which no peer can choose, and the id that the peer chose. Without
keys, a peer is its routing id alone.

The pump is `fedcore._pump`, which runs without the GIL. `FEDCORE_PUMP=python` forces
`fedcore.transport.plain_pump`, which is also the fallback where the compiled one cannot find pyzmq's libzmq. What
a site dials is up to `fedcore.transport.dialling`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import zmq

from fedcore import protocol
from fedcore._core import (
    CollectorDone,
    ConnectionsExceeded,
    Exchange,
    FrameMalformed,
    NoRoom,
    OutputBroken,
    PeerUnknown,
    RateExceeded,
    RuleFailed,
    SetDamaged,
    SourceRejected,
    SourceStalled,
)
from fedcore.errors import BusyError, ClosedError, ConfigError
from fedcore.protocol import FromServer, FromSite, control_frames
from fedcore.security.connections import Notes
from fedcore.security.keys import is_loopback

from .dialling import HANDSHAKES, Dialler, Server
from .open_files import require_free_files
from .plain_pump import now_ms, run_pump
from .proxy import PROXY_ENV, Proxy
from .tunnel import Tunnel

if TYPE_CHECKING:
    from fedcore.security.door import Doorkeeper, Secured
    from fedcore.security.keys import AllowList, Credentials

__all__ = [
    "CollectorEvent",
    "Control",
    "DataEvent",
    "End",
    "ServerLink",
    "SiteLink",
    "now_ms",
    "other_version",
    "pump_name",
]

_M = TypeVar("_M", FromServer, FromSite)
CollectorEvent = CollectorDone | SourceRejected | SourceStalled | OutputBroken | RuleFailed | NoRoom
"""What a collector comes to: each has its number as ``collector``."""
DataEvent = (
    CollectorEvent | SetDamaged | FrameMalformed | PeerUnknown | RateExceeded | ConnectionsExceeded
)
"""What ``Exchange.next_event()`` returns."""

HEARTBEAT_MS: Final = 1000
SEND_QUEUE: Final = 1000
"""Messages that wait at a server for one peer to read them; further ones are lost."""
RECEIVE_QUEUE: Final = 16
"""Messages of one peer that a server's socket takes in before they are handled; then the peer has to wait."""
UNREAD_MS: Final = 30_000
"""The system ends the connection of a peer that has read nothing for so long of what was sent to it."""
MUTE_MS: Final = 10_000
"""For how long a key that sent too much is not heard."""
MAX_FRAME: Final = protocol.MAX_CONTROL_BYTES + 1024  # encryption adds 33 bytes
"""Bytes of the longest frame that a link takes."""
SITE_LIMITS: Final = (32 << 20, 16 << 20, 64 << 20)
"""Bytes of a site: its update's on their way, of which its one peer may have half, and of control messages."""
_LINGER_MS: Final = 1000
IO_THREADS: Final = min(4, os.cpu_count() or 1)  # of a server: each connection belongs to one
RECONNECT_MS: Final = (100, 2000)
HANDSHAKE_MS: Final = 10_000
SITE_HANDSHAKE_MS: Final = 8000
CONNECT_MS: Final = 3000
"""How long a site waits for an address to take its connection, before it dials again."""
UNACKNOWLEDGED_MS: Final = 5000
"""The system ends the connection of a site when nothing of what was sent is acknowledged for so long."""
_TUNNEL_FILES: Final = 8  # the listener, two connections, and two that end
_SITE_FILES: Final = 32  # that a link opens, and those of a site's work folder
_WAITING: Final = 64  # control messages of a site that wait for a connection; the oldest are lost


@dataclass(frozen=True)
class Control:
    """A control message: the sender as the link knows it (empty at a site) and its JSON body."""

    peer: bytes
    body: bytes


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
        from fedcore import _pump
    except ImportError:
        if choice == "compiled":
            raise
        return None
    return _pump


class End:
    """One end of a connection: the data plane behind it, and the run that it works in.

    Attributes:
        exchange: the data plane.
        run_id: of the run that this end works in, once known; what it sends within the run names it.
    """

    run_id: str | None = None

    def __init__(self) -> None:
        self.exchange = Exchange()
        self._events_next = False

    def next_arrived(self, now: int) -> Control | DataEvent | None:
        """Return what waits in the exchange at ``now`` (ms): events and control messages in turn, so that neither
        delays the other."""
        for _ in range(2):
            self._events_next = not self._events_next
            if self._events_next:
                event = self.exchange.next_event()
                if event is not None:
                    return event
            else:
                control = self.exchange.next_control(now)
                if control is not None:
                    return Control(*control)
        return None

    def of_run(self, message: _M) -> _M:
        """Return a message as it is sent within the run."""
        if isinstance(message, protocol.OfRun) and message.run_id is None and self.run_id:
            return message.model_copy(update={"run_id": self.run_id})
        return message


class Link(End):
    """What both ends share. `recv` belongs to one thread; `send`, `kick` and `wake` to any."""

    _router: bool
    _secure = False
    _notes: Notes | None = None

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], net: zmq.Socket[bytes], pump: Any | None
    ) -> None:
        super().__init__()
        self._pump = pump
        self._context = context
        self._net = net
        self._lock = threading.Lock()
        self._closed = False
        self._pid = os.getpid()
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
            run_pump(
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
        arrived = self.next_arrived(now_ms())
        if arrived is not None:
            return arrived
        if self._closed:
            raise ClosedError("the link is closed")
        poller = zmq.Poller()
        poller.register(self._inbox, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        ready = dict(poller.poll(None if timeout is None else max(0, round(timeout * 1000))))
        if self._wake_read in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
        if self._inbox in ready:
            self._inbox.recv()
            self.exchange.listening()
        return self.next_arrived(now_ms())

    def command(self, frames: Sequence[bytes]) -> None:
        """Hand the pump a command: ``b"S"``, a peer and frames to send as they are; ``b"D"`` and an address."""
        with self._lock:
            if not self._closed:
                self._commands.send_multipart(frames)

    def kick(self) -> None:
        """Make the pump look for frames to send, after the exchange was given something to do."""
        self.command([b"K"])

    def wake(self) -> None:
        """Make `recv` return None early; safe from any thread and from a signal handler."""
        if not self._closed:  # the number may be another file's by now
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
        self._close_before_net()
        self._net.close(linger=_LINGER_MS)
        self._closed_net()
        self._context.term()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _close_before_net(self) -> None:
        """Close what uses the network socket."""

    def _closed_net(self) -> None:
        """Close what must be there for as long as the network socket is."""


class ServerLink(Link):
    """The server's end: a ROUTER bound to ``listen`` (``tcp://host:port``, port 0 for a free one).

    Args:
        listen: the address.
        secured: the server's keys and whom it admits; None: plain text from everybody.

    Attributes:
        door: who decides which connections are let in; None in plain text.

    Raises:
        BusyError: another process listens there.
        ConfigError: the address cannot be bound.
    """

    _router = True

    def __init__(self, listen: str, secured: Secured | None = None) -> None:
        pump = _compiled_pump()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=IO_THREADS)
        net = context.socket(zmq.ROUTER)
        _set_common(net, listen)
        net.setsockopt(zmq.ROUTER_MANDATORY, 1)
        net.setsockopt(zmq.ROUTER_HANDOVER, 1)
        net.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        net.setsockopt(zmq.SNDHWM, SEND_QUEUE)
        net.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE)
        net.setsockopt(zmq.TCP_MAXRT, UNREAD_MS)
        self.door: Doorkeeper | None = None
        if secured is not None:
            from fedcore.security.door import DOMAIN, Doorkeeper

            self._secure = True
            net.setsockopt(zmq.CURVE_SERVER, 1)
            net.setsockopt(zmq.CURVE_SECRETKEY, secured.pair.secret.encode())
            net.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
            self.door = Doorkeeper(context, secured)
            self._notes = self.door.notes
            self.door.watch(net)
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
        assert self.door is not None
        self.door.allowed = allowed

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
        if self.door is not None:
            self.door.look()

    def send(self, peer: bytes, message: FromServer, version: int | None = None) -> None:
        """Queue a control message for ``peer``; a peer that is gone does not get it.

        ``version`` is for a `protocol.Refused` to a peer of another protocol version, which reads no other frames.
        """
        routing = peer.partition(b"\0")[2] if self._secure else peer
        self.command([b"S", routing, *control_frames(self.of_run(message), version)])

    def _closed_net(self) -> None:
        if self.door is not None:
            self.door.close()


class SiteLink(Link):
    """A site's end: a DEALER that dials ``server`` and keeps redialling with backoff (0.1 to 2 s).

    ``server`` may be several addresses of one server, which commas separate: they are tried in turn.

    ``identity`` is 16 random bytes, the same for the life of the process. The pump pings the server each
    second, and dials again where nothing comes back for a few seconds. A name is resolved anew before each redial,
    and each of its addresses is tried. Nothing is raised for a server that is not there: ask
    ``exchange.last_heard(b"")``. A proxy resolves the name itself, and needs ``credentials``: what passes there
    is encrypted.

    Raises:
        ConfigError: an address is no ``tcp://HOST:PORT``, this process may have too few files open, or plain text
            would go through a proxy.
    """

    _router = False

    def __init__(
        self,
        server: str,
        identity: bytes,
        credentials: Credentials | None = None,
        proxy: Proxy | None = None,
    ) -> None:
        servers = Server.all_of(server)
        if proxy is not None and credentials is None:
            raise ConfigError(
                f"{proxy} could read and change what is sent in plain text to {server}: use a kit (FEDCORE_KIT), "
                f"or unset {PROXY_ENV}"
            )
        require_free_files(
            _SITE_FILES + (_TUNNEL_FILES * len(servers) if proxy is not None else 0),
            "a site's connection",
        )
        pump = _compiled_pump()
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        net = context.socket(zmq.DEALER)
        _set_common(net, "")
        net.setsockopt(zmq.ROUTING_ID, identity)
        net.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS[0])
        net.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS[1])
        net.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
        net.setsockopt(zmq.TCP_MAXRT, UNACKNOWLEDGED_MS)
        net.setsockopt(zmq.HANDSHAKE_IVL, SITE_HANDSHAKE_MS)
        if credentials is not None:
            self._secure = True
            net.setsockopt(zmq.CURVE_SERVERKEY, credentials.server_key.encode())
            net.setsockopt(zmq.CURVE_PUBLICKEY, credentials.pair.public.encode())
            net.setsockopt(zmq.CURVE_SECRETKEY, credentials.pair.secret.encode())
        monitor = f"inproc://fedcore-connection-{id(self)}"
        net.monitor(monitor, HANDSHAKES)
        events = context.socket(zmq.PAIR)
        events.setsockopt(zmq.RCVHWM, 0)
        events.connect(monitor)
        self.server = server
        self.connections = 0
        waits = proxy is not None or len(servers) > 1 or not servers[0].numeric
        self._waiting: deque[list[bytes]] | None = deque(maxlen=_WAITING) if waits else None
        self._order = threading.Lock()
        self._came_up = threading.Event()
        super().__init__(context, net, pump)
        # In a list, an address of this machine is not the proxy's business: there, it would be another machine.
        direct = [where for where in servers if is_loopback(where.address)]
        tunnels = {
            where: Tunnel(
                proxy,
                where,
                seconds=SITE_HANDSHAKE_MS / 1000,
                unacknowledged_ms=UNACKNOWLEDGED_MS,
                changed=self.wake,
            )
            for where in servers
            if proxy is not None and (where not in direct or len(direct) == len(servers))
        }
        self._tunnels = list(tunnels.values())
        self._dialler = Dialler(
            [tunnels[where].address if where in tunnels else where for where in servers],
            events,
            dial=lambda endpoint: self.command([b"D", endpoint.encode()]),
            connected=self._on_connected,
            # What libzmq dials by itself may be about to come up: it is not let go of for the silence before.
            retried=lambda: self.exchange.reconnected(now_ms()),
            changed=self._on_changed,
            secure=self._secure,
        )
        self.exchange.set_limits(*SITE_LIMITS)
        self.exchange.heartbeat(HEARTBEAT_MS)
        self._start()
        self._dialler.start()

    @property
    def up(self) -> bool:
        """Whether there is a connection."""
        return self._dialler.up

    @property
    def refused(self) -> str:
        """Why the server will never take this link's handshake; else empty."""
        return self._dialler.refused

    @property
    def hint(self) -> str:
        """What points to why there is no connection; empty while there is one."""
        return self._no_way or self._dialler.hint

    @property
    def unresolved(self) -> str:
        """Why the server's name stands for no address at present, or the proxy does not connect; else empty."""
        return f"{self._no_way}." if self._no_way else self._dialler.unresolved

    @property
    def _no_way(self) -> str:
        """Why the proxy does not connect; empty while there is a connection."""
        if self._dialler.up:
            return ""
        return "; ".join(tunnel.failure for tunnel in self._tunnels if tunnel.failure)

    def send(self, message: FromSite) -> None:
        """Queue a control message for the server."""
        frames = [b"S", b"", *control_frames(self.of_run(message))]
        with self._order:
            if self._waiting is not None and not self._came_up.is_set():
                self._waiting.append(frames)
            else:
                self.command(frames)

    def silent_ms(self) -> int | None:
        """Return for how long nothing came from the server, or None if nothing ever did."""
        heard = self.exchange.last_heard(b"")
        return None if heard is None else max(0, now_ms() - heard)

    def close(self) -> None:
        """As for any link; what waits for a connection gets up to a second more to leave."""
        mine = not self._closed and os.getpid() == self._pid
        if mine and self._waiting and self._dialler.dials and not self.refused:
            self._came_up.wait(_LINGER_MS / 1000)
        super().close()
        for tunnel in self._tunnels if mine else []:
            tunnel.close(_LINGER_MS / 1000)

    def _on_connected(self) -> None:
        """Send what waits; what a pump sent before belongs to another connection."""
        self.connections += 1
        self.exchange.reconnected(now_ms())
        with self._order:
            while self._waiting:
                self.command(self._waiting.popleft())
            self._came_up.set()

    def _on_changed(self) -> None:
        if not self._dialler.up:
            with self._order:
                self._came_up.clear()
        self.wake()

    def _close_before_net(self) -> None:
        self._net.monitor(None, 0)
        self._dialler.close()


def _set_common(net: zmq.Socket[bytes], address: str) -> None:
    net.setsockopt(zmq.SNDHWM, 0)  # what is sent was asked for: windows bound it, not the socket
    net.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
    net.setsockopt(zmq.LINGER, _LINGER_MS)
    if "[" in address:
        net.setsockopt(zmq.IPV6, 1)
