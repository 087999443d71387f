"""A TCP relay between a site and a server: it counts, throttles, holds back, swallows and cuts."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

_PIECE = 4096


class Flow:
    """One direction: how many bytes passed, how fast they may, and after how many they are held back."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self.passed = 0
        self._hold_at: int | None = None
        self._changed = threading.Condition()
        self._due = time.monotonic()

    def hold_after(self, more: int) -> None:
        """Hold back what comes after ``more`` further bytes."""
        with self._changed:
            self._hold_at = self.passed + more

    def release(self) -> None:
        with self._changed:
            self._hold_at = None
            self._changed.notify_all()

    def until(self, condition: Callable[[int], bool], timeout: float = 60.0) -> None:
        """Wait until ``condition`` holds of the bytes that passed."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.passed), timeout), self.passed

    def admit(self, size: int) -> None:
        """Wait until ``size`` bytes may pass, and count them."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._hold_at is None or self.passed + size <= self._hold_at
            )
        if self.rate is not None:
            self._due = max(self._due, time.monotonic()) + size / self.rate
            time.sleep(max(0.0, self._due - time.monotonic()))
        with self._changed:
            self.passed += size
            self._changed.notify_all()


class Relay:
    """Listens on a free port of this machine and passes on to ``server`` (``tcp://host:port``).

    Args:
        up, down: bytes per second towards the server and back; None: as fast as they come. What waits in between
            is kept small, as on a slow link.

    Attributes:
        dials: connections so far.
    """

    def __init__(self, server: str, up: float | None = None, down: float | None = None) -> None:
        host, port = server.removeprefix("tcp://").split(":")
        self._server = (host, int(port))
        self.up, self.down = Flow(up), Flow(down)
        self.dials = 0
        self._swallowed: set[socket.socket] = set()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket()
            for end in (near, far):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * _PIECE)
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * _PIECE)
            try:
                far.connect(self._server)
            except OSError:
                near.close()
                continue
            self.dials += 1
            self._pairs.append((near, far))
            for source, target, flow in ((near, far, self.up), (far, near, self.down)):
                threading.Thread(
                    target=_pass, args=(source, target, flow, self._swallowed), daemon=True
                ).start()

    def swallow(self) -> None:
        """Take in, and never pass on, what comes over the links that stand; the next ones are not touched."""
        self._swallowed.update(end for pair in self._pairs for end in pair)

    def cut(self) -> None:
        """Cut every link that stands; the site may dial again."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                _close(end)

    def close(self) -> None:
        _close(self._listener)
        self.up.release()
        self.down.release()
        self.cut()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pass(
    source: socket.socket, target: socket.socket, flow: Flow, swallowed: set[socket.socket]
) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_PIECE):
            if source not in swallowed:
                flow.admit(len(data))
                target.sendall(data)
    if source in swallowed:
        return  # nor is it passed on that one side has gone
    _close(source)
    _close(target)


def _close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
