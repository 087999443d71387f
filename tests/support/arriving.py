"""A server's link whose messages a test lists, and the messages of sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedcore import protocol
from fedcore._core import Exchange
from fedcore.protocol import FromServer
from fedcore.transport.link import Control, DataEvent


class Arriving:
    """Stands in for a server's link: what a test lists arrives, in this order, and nothing else ever does.

    What the server sends is in ``sent`` once it has left.
    """

    endpoint, secure = "tcp://127.0.0.1:7733", False

    def __init__(self) -> None:
        self.run_id: str | None = None
        self.exchange: Any = Exchange()
        self.waiting: list[Control | DataEvent] = []
        self.sent: list[tuple[bytes, FromServer]] = []
        self.recv: Callable[[float], Control | DataEvent | None] = lambda _: (
            self.waiting.pop(0) if self.waiting else None
        )

    def nothing(self, *_: object) -> None:
        pass

    kick = wake = close = admit = block = mute = nothing

    def send(self, peer: bytes, message: FromServer, version: int | None = None) -> None:
        self.sent.append((peer, message))


def peer(site: str) -> bytes:
    return site.encode() * 16


def says(site: str, message: protocol.FromSite) -> Control:
    return Control(peer(site), protocol.encode(message))
