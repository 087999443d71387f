"""Frames between the exchanges of one process, in the order in which they come."""

from __future__ import annotations

from collections.abc import Callable

from fedcore._core import Collector, Exchange

__all__ = ["pass_frames"]


def pass_frames(
    server: Exchange,
    collector: Collector,
    sites: dict[bytes, Exchange],
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Let a collector have all chunks that it asks sites for, until it is done or there are ``enough``."""
    while not collector.done and not enough():
        while (request := server.next_out(0)) is not None:
            sites[request[0]].deliver(0, b"server", request[1], None)
        for peer, site in sites.items():
            while (reply := site.next_out(0)) is not None:
                server.deliver(0, peer, reply[1], bytes(reply[2] or b""))
        server.tick(0)
