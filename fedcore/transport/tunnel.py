"""A site's way through a proxy: a port of this machine that libzmq dials in place of the server.

What comes in there is passed on through the proxy, and back, as it is: encrypted from end to end. The port is
this user's alone. A link survives a proxy that dies, stalls or forgets as it survives a server that does so: it
notices the silence and dials again, and each dialling is a new connection through the proxy.

The bytes go through one buffer for each direction, with the system's calls in between, and nothing is kept.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from .dialling import Server
from .proxy import Proxy, ProxyError

__all__ = ["Tunnel"]

_BUFFER: Final = 256 << 10
_PAUSE: Final = (0.1, 2.0)
"""Seconds before a proxy that failed is dialled again: at first, and at most."""
_TABLE: Final = Path("/proc/self/net/tcp")
_ESTABLISHED: Final = "01"


class Tunnel:
    """Listens for the one connection of a link at a time, and passes it on through a proxy.

    Args:
        proxy: the proxy.
        server: where it is to connect to.
        seconds: how long the proxy may take to connect.
        unacknowledged_ms: how long data may be on its way to the proxy before the connection is given up.
        changed: called when ``failure`` has changed, on a thread of the tunnel's.

    Attributes:
        address: where it listens: a number and a port of this machine.
        failure: why there is no way through the proxy at present; else empty.
    """

    def __init__(
        self,
        proxy: Proxy,
        server: Server,
        *,
        seconds: float,
        unacknowledged_ms: int,
        changed: Callable[[], None],
    ) -> None:
        self.failure = ""
        self._proxy, self._server = proxy, server
        self._seconds, self._unacknowledged_ms = seconds, unacknowledged_ms
        self._changed = changed
        self._pause = 0.0
        self._worked = 0
        self._ends: tuple[socket.socket, ...] = ()
        self._passing: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        # What waits here is not under way yet: the less it is, the sooner a ping is answered.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        host, port = self._listener.getsockname()
        self.address = Server(server.address, host, port, numeric=True)
        self._thread = threading.Thread(target=self._accept, name="fedcore-proxy", daemon=True)
        self._thread.start()

    def close(self, seconds: float) -> None:
        """Stop; what the link has sent before it closed its end gets up to so many seconds to leave."""
        self._closing.set()
        _end(self._listener)
        self._thread.join()
        if self._passing is not None:
            self._passing.join(seconds)
        self._drop()

    # --- the threads ---

    def _accept(self) -> None:
        number = 0
        with self._listener:
            while not self._closing.is_set():
                try:
                    near, peer = self._listener.accept()
                except OSError:  # it was closed, or there is no file left for another connection
                    self._closing.wait(_PAUSE[1])
                    continue
                if not is_own(peer):
                    near.close()
                    continue
                self._drop()  # a link that dials again has let go of what it had
                self._keep(near)
                number += 1
                self._passing = threading.Thread(
                    target=self._pass, args=(near, number), name="fedcore-proxy-up", daemon=True
                )
                self._passing.start()

    def _pass(self, near: socket.socket, number: int) -> None:
        """Connect, and pass on what the link sends until one side ends."""
        self._closing.wait(self._pause)
        self._pause = min(max(2 * self._pause, _PAUSE[0]), _PAUSE[1])
        with near:
            if self._closing.is_set():
                return
            try:
                far = self._proxy.connect(self._server, self._seconds)
            except ProxyError as error:
                self._fail(str(error), number)
                return
            with far:
                if not self._keep(near, far):
                    return
                with contextlib.suppress(OSError):  # it has ended: the copying finds that
                    for end in (near, far):
                        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    give_up = self._unacknowledged_ms
                    far.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, give_up)
                back = threading.Thread(
                    target=self._pass_back,
                    args=(far, near, number),
                    name="fedcore-proxy-down",
                    daemon=True,
                )
                back.start()
                _copy(near, far)
                back.join()

    def _pass_back(self, far: socket.socket, near: socket.socket, number: int) -> None:
        if not _copy(far, near, functools.partial(self._works, number)):
            why = f"{self._proxy} connected to {self._server.address}, and nothing came"
            self._fail(why, number)

    # --- what they share ---

    def _keep(self, near: socket.socket, *far: socket.socket) -> bool:
        """Note the connections that are to end with the link's; False if the link has let go of its own."""
        with self._lock:
            if far and self._ends != (near,):
                return False
            self._ends = (near, *far)
            return True

    def _drop(self) -> None:
        with self._lock:
            ends, self._ends = self._ends, ()
        for end in ends:
            _end(end)

    def _works(self, number: int) -> None:
        self._pause = 0.0
        self._worked = number
        self._note("")

    def _fail(self, why: str, number: int) -> None:
        """Note why a connection failed, unless a later one worked: the link may have let go of it long ago, as its
        patience ends before that with a slow proxy."""
        if number > self._worked and not self._closing.is_set():
            self._note(why)

    def _note(self, why: str) -> None:
        if self.failure != why:
            self.failure = why
            self._changed()


def _copy(
    source: socket.socket, target: socket.socket, began: Callable[[], None] | None = None
) -> bool:
    """Pass on until one side ends, and end both; whether anything came. ``began`` is called as it first does."""
    buffer = memoryview(bytearray(_BUFFER))
    came = False
    with contextlib.suppress(OSError):
        while size := source.recv_into(buffer):
            if not came and began is not None:
                began()
            came = True
            target.sendall(buffer[:size])
    _end(source)
    _end(target)
    return came


def _end(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


def is_own(peer: tuple[str, int]) -> bool:
    """Whether a connection from a port of this machine is this user's: others may not use the proxy's login."""
    number = int.from_bytes(socket.inet_aton(peer[0]), sys.byteorder)
    wanted = f"{number:08X}:{peer[1]:04X}"
    with contextlib.suppress(OSError), _TABLE.open(encoding="ascii") as table:
        for row in table:
            columns = row.split()
            if len(columns) > 7 and columns[1] == wanted:
                # One that has ended is nobody's: the table then says 0, which is root.
                return columns[3] == _ESTABLISHED and columns[7] == str(os.geteuid())
    return False
