"""A site's proxy: how it is asked to connect to the server, by HTTP CONNECT or SOCKS5.

The server's name goes to the proxy as it is. The proxy resolves it; this machine's name server need not know it.
A reply is read to its last byte and no further: the server speaks first, and what it says may follow at once.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote, urlsplit

from fedcore.errors import ConfigError
from fedcore.protocol.fields import shown
from fedcore.security.keys import is_loopback

from .dialling import Server

__all__ = ["PROXY_ENV", "Proxy", "ProxyError"]

PROXY_ENV: Final = "FEDCORE_PROXY"
_PORTS: Final = {"http": 3128, "socks5": 1080}
_EXPECTED: Final = "expected http://[USER:PASSWORD@]HOST:PORT or socks5://[USER:PASSWORD@]HOST:PORT"
_MAX_HEAD: Final = 16 << 10
_MAX_SAID: Final = 100
_MAX_LOGIN: Final = 255
_SOCKS: Final = {
    1: "general failure",
    2: "its rules do not allow this connection",
    3: "network unreachable",
    4: "host unreachable",
    5: "connection refused",
    6: "the connection timed out",
    7: "it does not connect for others",
    8: "it does not know this kind of address",
}


class ProxyError(Exception):
    """The proxy did not connect; the text names the proxy and what it answered."""


@dataclass(frozen=True)
class Proxy:
    """A proxy: ``http`` (the CONNECT method) or ``socks5``, its address, and the login where it wants one."""

    scheme: str
    host: str
    port: int
    user: str = ""
    password: str = field(default="", repr=False)

    @classmethod
    def of(cls, text: str) -> Proxy:
        """Take a proxy's URL apart; ``%40`` in a login stands for ``@``, and so on.

        Raises:
            ConfigError: it is none. The error does not show the login.
        """
        try:
            parts = urlsplit(text.strip())
            scheme = "socks5" if parts.scheme == "socks5h" else parts.scheme
            port = _PORTS.get(scheme, 0) if parts.port is None else parts.port
            user, password = unquote(parts.username or ""), unquote(parts.password or "")
        except ValueError:
            raise ConfigError(f"{PROXY_ENV}: {_EXPECTED}") from None
        if scheme not in _PORTS:
            # Without a scheme, what comes first is the user.
            kind = f"a proxy of kind {scheme!r} is not known; " if "://" in text else ""
            raise ConfigError(f"{PROXY_ENV}: {kind}{_EXPECTED}")
        host = parts.hostname or ""
        # What follows a / or a # of a password, which should stand there as %2F and %23, is no part of the host.
        whole = parts.path in {"", "/"} and not parts.query and not parts.fragment
        if not host or not host.isprintable() or not port or not whole:
            raise ConfigError(f"{PROXY_ENV}: {_EXPECTED}")
        if max(len(user.encode()), len(password.encode())) > _MAX_LOGIN or (password and not user):
            raise ConfigError(
                f"{PROXY_ENV}: expected a user, and a user and a password of at most {_MAX_LOGIN} bytes each"
            )
        if scheme == "http" and ":" in user:
            raise ConfigError(f"{PROXY_ENV}: a user of an HTTP proxy has no colon in its name")
        return cls(scheme, host, port, user, password)

    @classmethod
    def from_environment(cls, environ: Mapping[str, str], server: str) -> Proxy | None:
        """Return the proxy that ``FEDCORE_PROXY`` names; None if it names none, or the server is on this machine.

        Raises:
            ConfigError: it names no proxy.
        """
        text = environ.get(PROXY_ENV)
        return None if not text or is_loopback(server) else cls.of(text)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"the proxy {self.scheme}://{host}:{self.port}"

    def connect(self, server: Server, seconds: float) -> socket.socket:
        """Return a connection to the server through the proxy, without a timeout.

        Args:
            server: whose host goes to the proxy as it is.
            seconds: all that it may take, but for the lookup of the proxy's own name.

        Raises:
            ProxyError: the proxy is not there, does not answer in time, or refuses.
        """
        until = time.monotonic() + seconds
        try:
            end = socket.create_connection((self.host, self.port), seconds)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise ProxyError(f"{self} cannot be reached: {why}") from None
        try:
            talk = _Talk(end, until)
            (self._ask_http if self.scheme == "http" else self._ask_socks)(talk, server)
            end.settimeout(None)
        except BaseException as error:
            end.close()
            if isinstance(error, TimeoutError):
                raise ProxyError(f"{self} did not answer within {seconds:g} s") from None
            if isinstance(error, OSError):
                raise ProxyError(
                    f"{self} broke the connection: {error.strerror or error}"
                ) from None
            raise
        return end

    def _ask_http(self, talk: _Talk, server: Server) -> None:
        host = server.host if server.numeric else _name(server).decode()
        there = f"[{host}]" if ":" in host else host
        lines = [f"CONNECT {there}:{server.port} HTTP/1.1", f"Host: {there}:{server.port}"]
        if self.user:
            lines.append(f"Proxy-Authorization: Basic {self._basic}")
        talk.send("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
        head = talk.head()
        found = re.match(rb"HTTP/1\.[01] ([0-9]{3})(?: ([^\r\n]*))?\r\n", head)
        if found is None:
            raise ProxyError(f"{self} does not speak HTTP: it answered {self._said(head)!r}")
        code = int(found[1])
        if 200 <= code < 300:
            return
        hint = ""
        if code in {401, 407}:  # tinyproxy answers a wrong login with 401
            hint = "; it does not take this login" if self.user else "; it wants a login"
        elif code == 403:
            hint = f"; its rules must allow {there} and port {server.port}"
        said = f"{code} {self._said(found[2] or b'')}".strip()
        raise ProxyError(
            f"{self} answered {said} when it was to connect to {there}:{server.port}{hint}"
        )

    def _ask_socks(self, talk: _Talk, server: Server) -> None:
        methods = b"\x00\x02" if self.user else b"\x00"
        talk.send(bytes([5, len(methods)]) + methods)
        version, method = talk.take(2)
        if version != 5:
            raise ProxyError(f"{self} does not speak SOCKS5")
        if method not in methods:
            wants = "does not take a user and a password" if self.user else "wants a login"
            raise ProxyError(f"{self} {wants}")
        if method == 2:
            user, password = self.user.encode(), self.password.encode()
            talk.send(bytes([1, len(user)]) + user + bytes([len(password)]) + password)
            if talk.take(2)[1] != 0:
                raise ProxyError(f"{self} does not take this login")
        talk.send(b"\x05\x01\x00" + _socks_address(server) + server.port.to_bytes(2, "big"))
        version, reply, _, kind = talk.take(4)
        if version != 5:
            raise ProxyError(f"{self} does not speak SOCKS5")
        if reply != 0:
            why = _SOCKS.get(reply, f"error {reply}")
            raise ProxyError(f"{self} did not connect to {server.host}:{server.port}: {why}")
        if kind not in {1, 3, 4}:
            raise ProxyError(f"{self} does not speak SOCKS5")
        length = {1: 4, 4: 16}.get(kind) or talk.take(1)[0]
        talk.take(length + 2)

    @property
    def _basic(self) -> str:
        """The login as HTTP sends it."""
        return base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    def _said(self, data: bytes) -> str:
        """Return the beginning of what the proxy said, fit for a log: without the login, if it was sent back."""
        if self.user:
            for secret in (self._basic, self.password):
                data = data.replace(secret.encode(), b"***") if secret else data
        return shown(data.decode("latin-1"), _MAX_SAID)


def _socks_address(server: Server) -> bytes:
    if server.numeric:
        packed = ipaddress.ip_address(server.host).packed
        return (b"\x01" if len(packed) == 4 else b"\x04") + packed
    name = _name(server)
    return b"\x03" + bytes([len(name)]) + name


def _name(server: Server) -> bytes:
    """Return a server's name as a name server takes it."""
    try:
        name = server.host.encode("ascii" if server.host.isascii() else "idna")
    except UnicodeError:
        name = b""
    if not 1 <= len(name) <= 255:
        raise ProxyError(f"{server.host} is no name that a proxy could resolve")
    return name


class _Talk:
    """A conversation with a proxy that ends by a time, however slowly the proxy speaks."""

    def __init__(self, end: socket.socket, until: float) -> None:
        self._end, self._until = end, until

    def send(self, data: bytes) -> None:
        self._limit()
        self._end.sendall(data)

    def take(self, count: int) -> bytes:
        """Return the next bytes, so many."""
        data = b""
        while len(data) < count:
            self._limit()
            more = self._end.recv(count - len(data))
            if not more:
                raise ConnectionError("it was closed")
            data += more
        return data

    def head(self) -> bytes:
        """Return the lines up to a blank one."""
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            if len(data) >= _MAX_HEAD:
                raise ConnectionError("its answer does not end")
            data += self.take(1)
        return data

    def _limit(self) -> None:
        """Have the next step end in time."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._end.settimeout(left)
