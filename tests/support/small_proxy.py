"""A proxy of this machine, HTTP or SOCKS5, that knows names of its own and fails as it is asked to."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading

from .ports import free_port

_LOGIN = ("site", "p:ss w@rd")


def _exactly(end: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = end.recv(count - len(data))
        if not more:
            raise ConnectionError
        data += more
    return data


def _end(ends: list[socket.socket]) -> None:
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


class SmallProxy:
    """Listens on a port of its own, which it keeps while it is away.

    Args:
        kind: ``http`` or ``socks5``.
        names: the servers that it knows, as ``host:port`` to dial, by the name that it is asked for.
        login: whether it wants `login`.

    Attributes:
        asked: whom it was asked to connect to, in order.
        seen: what it has passed on, in both directions.
        refusal: what it answers in place of connecting: a status line, or the number of a SOCKS reply; None: it
            connects.
        stalled: while set, it takes connections and answers nothing.
        at_once: whether its answer and what the server says first leave together.
    """

    login = _LOGIN

    def __init__(self, kind: str, names: dict[str, str], *, login: bool = False) -> None:
        self.kind, self._names, self._login = kind, names, login
        self.port = free_port()
        self.asked: list[tuple[str, int]] = []
        self.seen = bytearray()
        self.refusal: str | int | None = None
        self.stalled = self.at_once = False
        self._ends: list[socket.socket] = []
        self._all: list[socket.socket] = []
        self._swallowed: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.start()

    @property
    def url(self) -> str:
        """Its URL, with the login if it wants one."""
        login = "site:p%3Ass%20w%40rd@" if self._login else ""
        return f"{self.kind}://{login}127.0.0.1:{self.port}"

    def start(self) -> None:
        """Begin to listen, for the first time or again."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._run(self._accept, self._listener)

    def die(self) -> None:
        """Be gone with all connections, until `start`."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self.forget()

    def forget(self) -> None:
        """End all connections."""
        ends, self._ends = self._ends, []
        _end(ends)

    def swallow(self) -> None:
        """Pass nothing on any more over the connections that stand, and do not end them."""
        self._swallowed.update(self._ends)

    def close(self) -> None:
        self.die()
        _end(self._all)
        for thread in self._threads:
            thread.join()
        for end in self._all:
            end.close()

    def __enter__(self) -> SmallProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with listener, contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                self._hold(near)
                self._run(self._serve, near)

    def _hold(self, end: socket.socket) -> None:
        self._ends.append(end)
        self._all.append(end)

    def _serve(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self.stalled:
                while near.recv(1 << 16):  # until the other side gives up
                    pass
                return
            good, bad = (self._http if self.kind == "http" else self._socks)(near)
            if bad is not None:
                near.sendall(bad)
                near.shutdown(socket.SHUT_RDWR)
                return
            name, port = self.asked[-1]
            host, _, number = self._names[name].rpartition(":")
            far = socket.create_connection((host, int(number or port)))
            self._hold(far)
            near.sendall(good + (far.recv(64) if self.at_once else b""))
            self._run(self._copy, far, near)
            self._copy(near, far)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if source not in self._swallowed:
                    self.seen += data
                    target.sendall(data)
        if source not in self._swallowed:
            _end([source, target])

    def _http(self, near: socket.socket) -> tuple[bytes, bytes | None]:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += _exactly(near, 1)
        lines = head.decode().split("\r\n")
        host, _, port = lines[0].split()[1].rpartition(":")
        self.asked.append((host, int(port)))
        login = base64.b64encode(":".join(_LOGIN).encode()).decode()
        status = self.refusal
        if status is None and self._login and f"Proxy-Authorization: Basic {login}" not in lines:
            status = "407 Proxy Authentication Required"
        elif status is None and host not in self._names:
            status = "502 Bad Gateway"
        good = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 small\r\n\r\n"
        return good, None if status is None else f"HTTP/1.1 {status}\r\n\r\n".encode()

    def _socks(self, near: socket.socket) -> tuple[bytes, bytes | None]:
        methods = _exactly(near, _exactly(near, 2)[1])
        method = 2 if self._login else 0
        if method not in methods:
            return b"", b"\x05\xff"
        near.sendall(bytes([5, method]))
        if self._login:
            user = _exactly(near, _exactly(near, 2)[1]).decode()
            password = _exactly(near, _exactly(near, 1)[0]).decode()
            if (user, password) != _LOGIN:
                return b"", b"\x01\x01"
            near.sendall(b"\x01\x00")
        kind = _exactly(near, 4)[3]
        if kind == 3:
            host = _exactly(near, _exactly(near, 1)[0]).decode()
        else:
            host = socket.inet_ntop(
                {1: socket.AF_INET, 4: socket.AF_INET6}[kind], _exactly(near, {1: 4, 4: 16}[kind])
            )
        self.asked.append((host, int.from_bytes(_exactly(near, 2), "big")))
        reply = self.refusal if self.refusal is not None else 0 if host in self._names else 4
        answer = bytes([5, int(reply), 0, 1]) + bytes(6)
        return answer, None if reply == 0 else answer
