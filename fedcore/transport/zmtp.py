"""ZMTP 3.0 as a DEALER without keys speaks it (RFC 23, https://rfc.zeromq.org/spec/23): bytes in, messages out.

libzmq takes 50 to 100 KiB for a socket with one connection. Where one process plays a thousand sites, this takes a
few hundred bytes. Sans I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from typing_extensions import Buffer

from fedcore.errors import ProtocolError

__all__ = ["Incoming", "message", "opening"]

_GREETING: Final = 64
_SIGNATURE: Final = b"\xff" + bytes(8) + b"\x7f"
_MECHANISM: Final = b"NULL".ljust(20, b"\0")
_MORE: Final = 1
_LONG: Final = 2
_COMMAND: Final = 4
_SHORT: Final = 255
_MOST_FRAMES: Final = 8


def opening(identity: bytes) -> bytes:
    """Return what a DEALER sends first: its greeting, and who it is (1 to 255 bytes)."""
    greeting = (_SIGNATURE + b"\x03\x00" + _MECHANISM).ljust(_GREETING, b"\0")
    ready = b"\x05READY" + _property(b"Socket-Type", b"DEALER") + _property(b"Identity", identity)
    return greeting + bytes([_COMMAND, len(ready)]) + ready


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value


def message(frames: Sequence[Buffer]) -> list[Buffer]:
    """Return what to send for a message, part by part; the frames are not copied."""
    parts: list[Buffer] = []
    for number, frame in enumerate(frames, 1):
        size = memoryview(frame).nbytes
        flags = _MORE if number < len(frames) else 0
        if size <= _SHORT:
            parts.append(bytes([flags, size]))
        else:
            parts.append(bytes([flags | _LONG]) + size.to_bytes(8, "big"))
        parts.append(frame)
    return parts


class Incoming:
    """Takes apart what comes over one connection. It holds no memory while nothing is incomplete.

    Args:
        longest: bytes of the longest frame that is taken.

    Attributes:
        ready: whether the other end has finished its handshake; before that it takes no message.
    """

    __slots__ = ("_frames", "_greeted", "_longest", "_rest", "ready")

    def __init__(self, longest: int) -> None:
        self.ready = False
        self._longest = longest
        self._greeted = False
        self._rest: bytearray | None = None
        self._frames: list[bytes] | None = None  # of a message whose last frame has not come

    def feed(self, data: Buffer) -> Iterator[list[bytes]]:
        """Take in bytes and yield the messages that they complete.

        Raises:
            ProtocolError: the other end does not speak ZMTP 3, wants keys, or has refused the connection; or it
                announces a frame or sends a message that is longer than any.
        """
        rest = self._rest or bytearray()
        rest += data
        at = 0
        if not self._greeted and len(rest) >= _GREETING:
            _check_greeting(rest)
            self._greeted, at = True, _GREETING
        while self._greeted and (found := _frame(rest, at, self._longest)) is not None:
            flags, begin, at = found
            frame = bytes(memoryview(rest)[begin:at])
            if flags & _COMMAND:
                if frame.startswith(b"\x05ERROR"):
                    raise ProtocolError(f"the server has refused the connection: {frame[7:]!r}")
                self.ready = self.ready or frame.startswith(b"\x05READY")
                continue
            frames = self._frames or []
            if len(frames) == _MOST_FRAMES:
                raise ProtocolError(
                    f"what listens there sends a message of over {len(frames)} frames"
                )
            frames.append(frame)
            self._frames = frames if flags & _MORE else None
            if not flags & _MORE:
                yield frames
        self._rest = rest[at:] if at < len(rest) else None


def _check_greeting(greeting: bytearray) -> None:
    if greeting[0] != 0xFF or greeting[9] != 0x7F or greeting[10] < 3:
        raise ProtocolError("what listens there does not speak ZMTP 3")
    mechanism = bytes(greeting[12:32]).rstrip(b"\0").decode("ascii", "replace")
    if mechanism != "NULL":
        raise ProtocolError(f"the server wants encrypted connections ({mechanism})")


def _frame(data: bytearray, at: int, longest: int) -> tuple[int, int, int] | None:
    """Return a frame's flags, where its bytes begin and end; None if it is not complete.

    Raises:
        ProtocolError: it is of more than ``longest`` bytes: it is not waited for.
    """
    if len(data) - at < 2:
        return None
    flags = data[at]
    begin = at + (9 if flags & _LONG else 2)
    if len(data) < begin:
        return None
    size = int.from_bytes(data[at + 1 : begin], "big")
    if size > longest:
        raise ProtocolError(f"what listens there announces a frame of {size:,} bytes")
    end = begin + size
    return None if len(data) < end else (flags, begin, end)
