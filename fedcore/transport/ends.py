"""What a server and a site need of a link: over TCP `ServerLink` and `SiteLink`, in memory `LocalNetwork`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from fedcore.protocol import FromServer, FromSite

if TYPE_CHECKING:
    from fedcore._core import Exchange
    from fedcore.security.keys import AllowList, Credentials

    from .link import Control, DataEvent

__all__ = ["Dial", "ServerEnd", "SiteEnd"]


class _End(Protocol):
    run_id: str | None

    @property
    def exchange(self) -> Exchange:
        """The data plane."""

    def recv(self, timeout: float | None) -> Control | DataEvent | None:
        """Wait up to ``timeout`` seconds (None: for ever) for a control message or an event of the core.

        Returns None on timeout and after `wake`.
        """

    def kick(self) -> None:
        """Have frames sent, after the exchange was given something to do."""

    def wake(self) -> None:
        """Make `recv` return None early; safe from any thread and from a signal handler."""

    def close(self) -> None:
        """Let go of the connection."""


class ServerEnd(_End, Protocol):
    """A server's end, to which sites come."""

    @property
    def endpoint(self) -> str:
        """The address that sites dial."""

    @property
    def secure(self) -> bool:
        """Whether connections are encrypted and peers known by their keys."""

    def send(self, peer: bytes, message: FromServer, version: int | None = None) -> None:
        """Queue a control message for ``peer``; a peer that is gone does not get it."""

    def admit(self, allowed: AllowList) -> None:
        """Let in those of another allow-list from now on."""

    def block(self, user: str, blocked: bool = True) -> None:
        """Ignore all connections of a user, or accept them again."""

    def mute(self, peer: bytes) -> None:
        """Ignore a peer's key for a while."""

    def look(self) -> None:
        """For a while, look for connections that are ignored, and cut them."""


class SiteEnd(_End, Protocol):
    """A site's end, which dials a server.

    Attributes:
        connections: how often it was connected.
    """

    connections: int

    @property
    def refused(self) -> str:
        """Why the server will never take this connection; else empty."""

    @property
    def hint(self) -> str:
        """What points to why there is no connection; empty while there is one."""

    @property
    def unresolved(self) -> str:
        """Why the server's name stands for no address at present, or the proxy does not connect; else empty."""

    def send(self, message: FromSite) -> None:
        """Queue a control message for the server."""

    def silent_ms(self) -> int | None:
        """Return for how long nothing came from the server, or None if nothing ever did."""


Dial = Callable[[str, bytes, "Credentials | None"], SiteEnd]
"""Connects to a server's address with an identity of 16 random bytes, and keys where the link is encrypted."""
