"""The 48-byte header that every frame begins with; the compiled core reads and writes the same."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Final

from typing_extensions import Buffer

__all__ = [
    "HEADER_BYTES",
    "MAGIC",
    "MAX_CHUNK_BYTES",
    "MAX_CONTROL_BYTES",
    "NO_SET",
    "PROTOCOL_VERSION",
    "Header",
    "Kind",
    "frame_header",
    "read_header",
]

PROTOCOL_VERSION: Final = 2
MAGIC: Final = b"FDC1"
HEADER_BYTES: Final = 48
MAX_CONTROL_BYTES: Final = 8 << 20
MAX_CHUNK_BYTES: Final = 4 << 20
NO_SET: Final = bytes(16)
_FIELDS: Final = struct.Struct("<4sBBBB16sQIII")


class Kind(enum.IntEnum):
    """What a frame is; the byte at offset 5 of its header."""

    GET = 1
    CHUNK = 2
    REFUSE = 3
    PING = 4
    PONG = 5
    CONTROL = 6


@dataclass(frozen=True)
class Header:
    """What a header says; `frame_header` tells of the fields."""

    version: int
    kind: int
    encoding: int
    set_id: bytes
    index: int
    count: int
    length: int
    checksum: int


def frame_header(
    kind: int,
    set_id: bytes = NO_SET,
    index: int = 0,
    count: int = 0,
    body: Buffer = b"",
    *,
    encoding: int = 0,
    version: int = PROTOCOL_VERSION,
    length: int | None = None,
    checksum: int | None = None,
) -> bytes:
    """Return a header of `HEADER_BYTES` bytes.

    Args:
        kind: a `Kind`, or any other byte in a test of what a receiver refuses.
        set_id: 16 bytes.
        index, count: the first chunk and how many, or the reason of a REFUSE.
        body: the second frame of the message, if it has one.
        encoding: how the body is encoded.
        version: of the protocol.
        length, checksum: of the body, where it is not given or they are known already.
    """
    from fedcore._core import crc32c  # reading a message needs no compiled core

    size = memoryview(body).nbytes
    fields = _FIELDS.pack(
        MAGIC,
        version,
        kind,
        encoding,
        0,
        set_id,
        index,
        count,
        size if length is None else length,
        (crc32c(body) if size else 0) if checksum is None else checksum,
    )
    return fields + crc32c(fields).to_bytes(4, "little")


def read_header(head: bytes) -> Header:
    """Return what a header says, unchecked; `struct.error` if it has not `HEADER_BYTES` bytes."""
    _, version, kind, encoding, _, *rest = _FIELDS.unpack(head[:-4])
    return Header(version, kind, encoding, *rest)
