"""What the system knows of a TCP connection."""

from __future__ import annotations

import ctypes
import socket
import struct
import sys
from typing import Final

__all__ = ["moved_bytes", "received_bytes"]

_INFO_ACKED: Final = 120  # where Linux tells the bytes acknowledged and the bytes received; two u64


def received_bytes(number: int) -> int:
    """Return how many bytes a TCP connection has received; negative where the system doesn't tell."""
    return moved_bytes(number)[0]


def moved_bytes(number: int) -> tuple[int, int]:
    """Return how many bytes a TCP connection has received, and how many that it sent are acknowledged."""
    if not sys.platform.startswith("linux"):
        return -1, -1
    about = ctypes.create_string_buffer(_INFO_ACKED + 16)
    size = ctypes.c_uint32(len(about))
    # Not by a duplicate of the number: one that is closed meanwhile would stay open for as long.
    failed = _LIBC.getsockopt(
        number, socket.IPPROTO_TCP, socket.TCP_INFO, about, ctypes.byref(size)
    )
    if failed or size.value < len(about):
        return -1, -1
    acked, received = struct.unpack_from("=QQ", about, _INFO_ACKED)
    return int(received), int(acked)


_LIBC = ctypes.CDLL(None)
