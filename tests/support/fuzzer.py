"""A hostile connection: mutated frames and random bytes that follow from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from fedcore import protocol
from fedcore._core import crc32c
from fedcore.protocol import Kind, control_frames, frame_header, read_header


def data_frame(kind: int, dice: random.Random, set_id: bytes, body: bytes = b"") -> list[bytes]:
    index = dice.choice([0, 1, 2, 1 << 20, (1 << 64) - 1])
    count = dice.choice([1, 2, 16, 1024]) if kind in (Kind.GET, Kind.REFUSE) else 0
    return [frame_header(kind, set_id, index, count, body), *([body] if body else [])]


class Fuzzer:
    """One hostile connection; everything that it sends follows from its seed."""

    def __init__(self, address: str, name: str, seed: int) -> None:
        self.name = name
        self.dice = random.Random(seed)
        self.sent = 0
        self.set_id = self.dice.randbytes(16)
        self._address = address
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._dial()

    def _dial(self) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, f"fuzzer {self.name}".encode().ljust(16, b"."))
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 100)  # no more is ahead of the server than this
        self._prepare(socket)
        socket.connect(self._address)
        return socket

    def _prepare(self, socket: zmq.Socket[bytes]) -> None:
        """Give the socket what it needs besides, before it dials."""

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()

    def say(self, message: Any) -> None:
        self._put(list(control_frames(message)))

    def _put(self, frames: list[bytes]) -> None:
        """Send, and read what has come meanwhile: a server that waits for nobody is not slowed down by this."""
        if not self._socket.poll(200, zmq.POLLOUT):
            return  # the server is behind, or has ended
        self._socket.send_multipart(frames)
        self.sent += 1
        while self._socket.poll(0):
            header, *body = self._socket.recv_multipart()
            if body and read_header(header).kind == Kind.CONTROL:
                message = protocol.decode_from_server(body[0])
                if isinstance(message, protocol.Task) and message.model:
                    self.set_id = bytes.fromhex(message.model.id)

    def one(self) -> None:
        """Send one hostile message."""
        roll = self.dice.random()
        if roll < 0.05:
            self._put(
                [
                    self.dice.randbytes(self.dice.randrange(200))
                    for _ in range(self.dice.randrange(1, 6))
                ]
            )
        elif roll < 0.1:
            self._put(self._valid())
        else:
            self._put(self._mutated(self._valid()))

    def _valid(self) -> list[bytes]:
        dice = self.dice
        kind = dice.choice(list(Kind))
        if kind is Kind.CHUNK:
            body = dice.randbytes(dice.choice([1, 100, 4096, 100_000]))
            return data_frame(kind, dice, dice.choice([self.set_id, dice.randbytes(16)]), body)
        if kind in (Kind.GET, Kind.REFUSE):
            return data_frame(kind, dice, dice.choice([self.set_id, dice.randbytes(16)]))
        if kind in (Kind.PING, Kind.PONG):
            return [frame_header(kind)]
        return list(control_frames(self._message()))

    def _message(self) -> Any:
        dice = self.dice
        tensors = [("w", "F32", [dice.choice([0, 300_000, 1 << 46])])]
        hash_ = dice.randbytes(32).hex()
        return dice.choice(
            [
                protocol.Join(version="f", site=self.name, instance=dice.randbytes(16).hex()),
                protocol.Declare(tensors=tensors, files={}),
                protocol.Ready(
                    round=dice.randrange(4),
                    sets=[protocol.NamedSet(id="0" * 32, layout=hash_)],
                    weight=1,
                    metrics={},
                ),
                protocol.Score(
                    version=dice.randrange(9), metrics={"loss": dice.random()}, examples=1
                ),
                protocol.Log(round=1, step=2, metrics={"loss": float("nan")}),
                protocol.Alive(),
                protocol.Problem(message="x" * dice.randrange(1, 4000)),
                protocol.StatusRequest(),
                protocol.MetricsRequest(after=dice.randrange(1 << 53)),
                protocol.Leave(reason="fuzz"),
            ]
        )

    def _mutated(self, frames: list[bytes]) -> list[bytes]:
        mutate: Callable[[list[bytes]], list[bytes]] = self.dice.choice(
            [self._flip, self._field, self._body, self._length, self._parts]
        )
        return mutate(frames)

    def _flip(self, frames: list[bytes]) -> list[bytes]:
        at = self.dice.randrange(len(frames))
        data = bytearray(frames[at])
        for _ in range(self.dice.choice([1, 1, 2, 8])):
            data[self.dice.randrange(len(data))] ^= 1 << self.dice.randrange(8)
        return [*frames[:at], bytes(data), *frames[at + 1 :]]

    def _field(self, frames: list[bytes]) -> list[bytes]:
        """Another value in one field of the header, whose checksum is right again."""
        head = bytearray(frames[0][:44])
        at, size = self.dice.choice(
            [(4, 1), (5, 1), (6, 1), (7, 1), (8, 16), (24, 8), (32, 4), (36, 4), (40, 4)]
        )
        head[at : at + size] = self.dice.choice(
            [bytes(size), b"\xff" * size, self.dice.randbytes(size), (1).to_bytes(size, "little")]
        )
        return [bytes(head) + crc32c(head).to_bytes(4, "little"), *frames[1:]]

    def _body(self, frames: list[bytes]) -> list[bytes]:
        """Another body, with the length and the checksums that are right for it."""
        if len(frames) == 1:
            return self._field(frames)
        body = bytearray(frames[1])
        for _ in range(self.dice.choice([1, 1, 3])):
            at = self.dice.randrange(len(body) + 1)
            body[at : at + self.dice.choice([0, 1, 1, 9])] = self.dice.choice(
                [
                    b"",
                    b"0",
                    b'"',
                    b"[",
                    b"}",
                    b"9" * 30,
                    b"-1",
                    b"null",
                    b"\xff\x00",
                    self.dice.randbytes(3),
                ]
            )
        body = body or bytearray(b"{")
        return self._resealed(frames[0], bytes(body))

    def _resealed(self, head: bytes, body: bytes) -> list[bytes]:
        fresh = head[:36] + len(body).to_bytes(4, "little") + crc32c(body).to_bytes(4, "little")
        return [fresh + crc32c(fresh).to_bytes(4, "little"), body]

    def _length(self, frames: list[bytes]) -> list[bytes]:
        at = self.dice.randrange(len(frames))
        data = frames[at]
        cut = self.dice.randrange(len(data) + 1)
        longer = data + self.dice.randbytes(self.dice.choice([1, 48, 5000]))
        return [*frames[:at], self.dice.choice([data[:cut], longer]), *frames[at + 1 :]]

    def _parts(self, frames: list[bytes]) -> list[bytes]:
        return self.dice.choice(
            [[b""], [*frames, b""], [*frames, *frames], frames[::-1], [b"", *frames], frames * 3]
        )


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no RssAnon in /proc")
