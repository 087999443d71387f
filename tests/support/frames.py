"""Frames of the protocol with right checksums, whatever else is wrong with them."""

from __future__ import annotations

from fedcore._core import crc32c
from fedcore.protocol import HEADER, MAGIC, PROTOCOL_VERSION


def header(
    kind: int,
    set_id: bytes = bytes(16),
    index: int = 0,
    count: int = 0,
    body: bytes = b"",
    *,
    version: int = PROTOCOL_VERSION,
    length: int | None = None,
) -> bytes:
    """A header with right checksums, whatever else is wrong with it."""
    size = len(body) if length is None else length
    crc = crc32c(body) if body else 0
    head = HEADER.pack(MAGIC, version, kind, 0, 0, set_id, index, count, size, crc, 0)
    return head[:44] + crc32c(head[:44]).to_bytes(4, "little")
