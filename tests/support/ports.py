"""Ports for servers that are started again on the port that they had."""

from __future__ import annotations

import itertools
import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000


def _from() -> int:
    """Return the first port that the system gives to connections of its own choice."""
    return int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32_768


_PORTS = itertools.count(random.SystemRandom().randrange(_LOWEST, _from()))


def free_port() -> int:
    """Return a port that nobody has, and that the system gives to nobody while its server is away.

    Tests that run at the same time begin at ports of their own.
    """
    for number in _PORTS:
        port = _LOWEST + number % (_from() - _LOWEST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("unreachable: the ports are counted without end")


def free_address() -> str:
    return f"tcp://127.0.0.1:{free_port()}"
