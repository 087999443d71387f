"""A network in memory, for tests of scripts and servers: a server and its sites in one process, without sockets.

Chunks and control messages take the same way through the core as over TCP; only the sockets are left out. There
are no keys: a server's run file says ``server.insecure = true``.
"""

from __future__ import annotations

import os
import select
import threading
from typing import TYPE_CHECKING, Final

from fedcore.clock import SYSTEM, Clock, milliseconds
from fedcore.errors import ClosedError
from fedcore.protocol import FromServer, FromSite, control_frames

from .link import HEARTBEAT_MS, MUTE_MS, SITE_LIMITS, Control, DataEvent, End

if TYPE_CHECKING:
    from fedcore._core import Exchange
    from fedcore.security.keys import AllowList, Credentials

__all__ = ["LocalNetwork", "LocalServer", "LocalSite"]

_ADDRESS: Final = "local"
_SERVER: Final = b""
"""What a site's exchange calls its server."""


class LocalNetwork:
    """Connects one server at a time with any number of sites. One thread of its own carries the frames.

    Args:
        clock: of the server and the timers of both ends; with a `ManualClock`, call `kick` after it was moved.
    """

    def __init__(self, clock: Clock = SYSTEM) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._server: LocalServer | None = None
        self._sites: dict[bytes, LocalSite] = {}
        self._closed = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, name="fedcore-local", daemon=True)
        self._thread.start()

    @property
    def clock(self) -> Clock:
        """The clock of its ends."""
        return self._clock

    def server(self) -> LocalServer:
        """Return the end of a server, in place of the one before."""
        made = LocalServer(self)
        with self._lock:
            self._server = made
        return made

    def dial(self, _server: str, identity: bytes, _keys: Credentials | None = None) -> LocalSite:
        """Return the end of a site, as `fedcore.transport.link.SiteLink` does; address and keys do not matter."""
        made = LocalSite(self, identity)
        with self._lock:
            self._sites[identity] = made
        self.kick()
        return made

    def kick(self) -> None:
        """Carry what waits."""
        with self._lock:
            if not self._closed:
                _ring(self._wake_write)

    def close(self) -> None:
        """Stop the thread; nothing is carried any more."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            _ring(self._wake_write)
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # --- frames ---

    def to_server(self, identity: bytes, header: bytes, body: bytes | memoryview | None) -> None:
        """Deliver a site's frame, if a server is there."""
        server = self._server
        if server is not None:
            server.exchange.deliver(milliseconds(self._clock), identity, header, body)

    def to_site(
        self, identity: bytes, header: bytes, body: bytes | memoryview | None, exchange: Exchange
    ) -> None:
        """Deliver a frame of a server, whose ``exchange`` notes a site that is not there."""
        site = self._sites.get(identity)
        if site is not None:
            site.exchange.deliver(milliseconds(self._clock), _SERVER, header, body)
        else:
            exchange.unreachable(identity)

    def remove(self, end: LocalServer | LocalSite) -> None:
        """Take an end off the network."""
        with self._lock:
            if end is self._server:
                self._server = None
            elif isinstance(end, LocalSite) and self._sites.get(end.identity) is end:
                del self._sites[end.identity]

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closed:
                    return
                ends = [
                    *([self._server] if self._server is not None else ()),
                    *self._sites.values(),
                ]
            wait = self._carry(ends)
            poller = select.poll()
            poller.register(self._wake_read, select.POLLIN)
            for end in ends:
                if end.exchange.wake_fd >= 0:
                    poller.register(end.exchange.wake_fd, select.POLLIN)
            ready = {file for file, _ in poller.poll(wait)}
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
            for end in ends:
                if end.exchange.wake_fd in ready:
                    end.exchange.clear_wake()

    def _carry(self, ends: list[LocalServer | LocalSite]) -> int | None:
        """Carry frames until none is left; returns for how many milliseconds nothing is due, None: for ever."""
        moved = True
        waits: list[int] = []
        while moved:
            moved = False
            waits = [end.exchange.tick(milliseconds(self._clock)) for end in ends]
            for end in ends:
                while (out := end.exchange.next_out(milliseconds(self._clock))) is not None:
                    end.pass_on(*out)
                    moved = True
                    del out  # a chunk is on its way for as long as anyone has it
        for end in ends:
            if end.exchange.has_event():
                end.notify()
        return min((wait for wait in waits if wait >= 0), default=None)


class _LocalEnd(End):
    """What both ends share. `recv` belongs to one thread, the rest to any."""

    def __init__(self, network: LocalNetwork) -> None:
        super().__init__()
        self._network = network
        self._changed = threading.Condition()
        self._news = self._woken = self._closed = False

    def recv(self, timeout: float | None) -> Control | DataEvent | None:
        """Wait up to ``timeout`` seconds (None: for ever) for a control message or an event of the core.

        Returns None on timeout and after `wake`.
        """
        arrived = self.next_arrived(milliseconds(self._network.clock))
        if arrived is not None:
            return arrived
        with self._changed:
            if self._closed:
                raise ClosedError("the link is closed")
            self._changed.wait_for(lambda: self._news or self._woken or self._closed, timeout)
            if self._news:
                self._news = False
                self.exchange.listening()
            self._woken = False
        return self.next_arrived(milliseconds(self._network.clock))

    def notify(self) -> None:
        """Have `recv` look at what came."""
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def kick(self) -> None:
        """Carry what the exchange has to send."""
        self._network.kick()

    def wake(self) -> None:
        """Make `recv` return None early."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def close(self) -> None:
        """Leave the network."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._network.remove(self)  # type: ignore[arg-type]


class LocalServer(_LocalEnd):
    """A server's end; see `fedcore.transport.link.ServerLink`."""

    endpoint = _ADDRESS
    secure = False

    def send(self, peer: bytes, message: FromServer, version: int | None = None) -> None:
        """Send a control message to a site; one that is gone does not get it."""
        if not self._closed:
            self.pass_on(peer, *control_frames(self.of_run(message), version))
            self.kick()

    def pass_on(self, peer: bytes, header: bytes, body: bytes | memoryview | None) -> None:
        """Deliver a frame."""
        self._network.to_site(peer, header, body, self.exchange)

    def admit(self, allowed: AllowList) -> None:
        """Do nothing: there are no keys."""

    def block(self, user: str, blocked: bool = True) -> None:
        """Ignore all that a user sends, or not."""
        self.exchange.block(user.encode(), blocked)

    def mute(self, peer: bytes) -> None:
        """Ignore a peer for `MUTE_MS`."""
        self.exchange.mute(peer, milliseconds(self._network.clock) + MUTE_MS)

    def look(self) -> None:
        """Do nothing: there are no connections to cut."""


class LocalSite(_LocalEnd):
    """A site's end; see `fedcore.transport.link.SiteLink`."""

    connections = 1
    refused = hint = unresolved = ""

    def __init__(self, network: LocalNetwork, identity: bytes) -> None:
        super().__init__(network)
        self.identity = identity
        self.exchange.set_limits(*SITE_LIMITS)
        self.exchange.heartbeat(HEARTBEAT_MS)

    def send(self, message: FromSite) -> None:
        """Send a control message to the server."""
        if not self._closed:
            self.pass_on(_SERVER, *control_frames(self.of_run(message)))
            self.kick()

    def pass_on(self, _: bytes, header: bytes, body: bytes | memoryview | None) -> None:
        """Deliver a frame."""
        self._network.to_server(self.identity, header, body)

    def silent_ms(self) -> int | None:
        """Return for how long nothing came from the server, or None if nothing ever did."""
        heard = self.exchange.last_heard(_SERVER)
        return None if heard is None else max(0, milliseconds(self._network.clock) - heard)


def _ring(file: int) -> None:
    try:
        os.write(file, b"\0")
    except BlockingIOError:
        return  # it rings already
