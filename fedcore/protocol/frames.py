"""The 48-byte header that every frame begins with; the compiled core reads and writes the same."""

from __future__ import annotations

import enum
import struct
from typing import Final

__all__ = [
    "HEADER",
    "HEADER_BYTES",
    "MAGIC",
    "MAX_CHUNK_BYTES",
    "MAX_CONTROL_BYTES",
    "NO_SET",
    "PROTOCOL_VERSION",
    "Kind",
]

PROTOCOL_VERSION: Final = 2
MAGIC: Final = b"FDC1"
HEADER: Final = struct.Struct("<4sBBBB16sQIIII")
HEADER_BYTES: Final = 48
MAX_CONTROL_BYTES: Final = 8 << 20
MAX_CHUNK_BYTES: Final = 4 << 20
NO_SET: Final = bytes(16)


class Kind(enum.IntEnum):
    """What a frame is; the byte at offset 5 of its header."""

    GET = 1
    CHUNK = 2
    REFUSE = 3
    PING = 4
    PONG = 5
    CONTROL = 6
