"""Many sites in one process: they speak the protocol frame by frame and hold two chunks' worth of values.

``python -m benchmarks.light_sites ADDRESS SITES CHUNKS UPDATE [LAGGARD]``: every site takes part in a run whose
model is `layout(CHUNKS)`, pulls each global model, and offers an update to a model of zeros that `Values.expected`
gives the mean of, encoded as UPDATE says (``nf4``; ``raw+lossless``: compressed, too). A laggard keeps back a
chunk from the middle, when the server has come to ask for many ahead, until nobody else has anything left to do,
so that the server holds as much as it ever will.
Prints ``finished`` when every site was told of the end, and leaves when its input closes.
"""

from __future__ import annotations

import sys
import time
import uuid
from typing import Any, Final

import numpy as np
import zmq

from fedcore import protocol
from fedcore._core import Codec, Layout, crc32c
from fedcore.layout import layout_hash, table
from fedcore.protocol import DEFAULT_CHUNK_BYTES, Kind, control_frames, frame_header, read_header
from fedcore.site import outputs as out
from fedcore.site.machine import SiteMachine
from fedcore.site.settings import SiteSettings

_CHUNK_ELEMENTS: Final = DEFAULT_CHUNK_BYTES // 4
_STEP: Final = 7  # elements between the first values of one chunk and the next
_RANGE: Final = 16
_WINDOW: Final = 32
_QUIET_SECONDS: Final = (
    1.0  # a server begins to spill after a quarter of it; others may have the cores
)
_WEIGHTS: Final = (3, 5)  # of sites with an even and an odd number


def layout(chunks: int) -> Layout:
    """Return a layout of ``chunks`` whole chunks of fp32, four to a tensor."""
    full, rest = divmod(chunks, 4)
    sizes = [4] * full + ([rest] if rest else [])
    return Layout([(f"layer{i:05d}", "F32", [n * _CHUNK_ELEMENTS]) for i, n in enumerate(sizes)])


class Values:
    """The two updates that sites offer in turn: integers below 2^16, every chunk another.

    Args:
        chunks: of the model.
        update: how they travel, as the command says.
    """

    def __init__(self, chunks: int, update: str = "raw") -> None:
        dice = np.random.default_rng(1)
        size = _CHUNK_ELEMENTS + chunks * _STEP
        self._base = [dice.integers(0, 1 << 16, size).astype(np.float32) for _ in _WEIGHTS]
        self._checksums: dict[tuple[int, int], int] = {}
        encoding, _, lossless = update.partition("+")
        self.lossless = bool(lossless)
        self._zeros = np.zeros(_CHUNK_ELEMENTS, np.float32)
        self._codec = None if update == "raw" else Codec(layout(chunks), encoding, self.lossless)

    def chunk(self, parity: int, index: int) -> np.ndarray[Any, Any]:
        """Return a chunk of the update of the sites with even (0) or odd (1) numbers."""
        return self._base[parity][index * _STEP :][:_CHUNK_ELEMENTS]

    def body(self, parity: int, index: int) -> tuple[int, bytes | memoryview]:
        """Return a chunk as it travels: its encoding and its bytes."""
        chunk = self.chunk(parity, index)
        if self._codec is None:
            return 0, chunk.data
        return self._codec.encode(index, chunk.data, self._zeros.data)

    def checksum(self, parity: int, index: int, body: bytes | memoryview) -> int:
        """Return the CRC-32C of a chunk as it travels."""
        key = parity, index
        if key not in self._checksums:
            self._checksums[key] = crc32c(body)
        return self._checksums[key]

    def _decoded(self, parity: int, index: int) -> np.ndarray[Any, Any]:
        if self._codec is None:
            return self.chunk(parity, index)
        out = np.empty_like(self._zeros)
        self._codec.decode(index, *self.body(parity, index), out.data, self._zeros.data)
        return out

    def expected(self, sites: int, index: int) -> np.ndarray[Any, Any]:
        """Return a chunk of the mean of what the sites' updates stand for."""
        even, odd = (self._decoded(parity, index).astype(np.float64) for parity in (0, 1))
        evens, odds = _WEIGHTS[0] * ((sites + 1) // 2), _WEIGHTS[1] * (sites // 2)
        if self._codec is None:
            total = evens * even + odds * odd
        else:  # such sums are not exact: as the server does, in the order of the names
            total = np.zeros(_CHUNK_ELEMENTS)
            for name in sorted(str(number + 1) for number in range(sites)):
                total += _WEIGHTS[0] * even if int(name) % 2 else _WEIGHTS[1] * odd
        return (total / (evens + odds)).astype(np.float32)


class LightSite:
    """One site; `on_frames` is called with what came, and answers at once.

    Args:
        context: of the socket.
        address: the server's.
        number: from 0 on; the site's name is ``site-1`` for number 0.
        values: what it offers.
        chunks: of the model.
    """

    def __init__(
        self, context: zmq.Context[Any], address: str, number: int, values: Values, chunks: int
    ) -> None:
        self.number = number
        self.kept_back: tuple[bytes, int] | None = None
        self.laggard = False
        self.machine = SiteMachine(SiteSettings(server=address, site=f"site-{number + 1}"))
        self._values = values
        self._layout = layout(chunks)
        self._hash = layout_hash(self._layout)
        self._chunks = chunks
        self._pulled: protocol.Task | None = None
        self._asked = 0
        self._came = 0
        self.socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.ROUTING_ID, self.machine.instance.bytes)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.LINGER, 1000)
        self.socket.connect(address)
        self.machine.join(time.monotonic())
        self.carry_out()

    @property
    def over(self) -> bool:
        """Whether the run has ended for this site."""
        return self.machine.finish is not None

    def carry_out(self) -> None:
        """Do what the machine asks for."""
        for output in self.machine.take_outputs():
            match output:
                case out.Send(message):
                    self.socket.send_multipart(control_frames(message))
                case out.Joined():
                    self.machine.declare(protocol.Declare(tensors=table(self._layout)))
                    self.carry_out()
                case out.Tasked(task):
                    self._on_task(task)
                case out.Dropped(_, why):
                    raise AssertionError(f"site {self.number}: {why}")
                case out.Failed(error):
                    raise error

    def ping(self) -> None:
        """Show that this site is there."""
        self.socket.send(frame_header(Kind.PING))

    def on_frames(self, frames: list[bytes]) -> None:
        """Answer a message."""
        head = read_header(frames[0])
        kind, set_id, index, count = head.kind, head.set_id, head.index, head.count
        if kind == Kind.CONTROL:
            self.machine.receive(frames[1], time.monotonic())
            self.carry_out()
        elif kind == Kind.CHUNK:
            self._came += 1
            self._pull()
        elif kind == Kind.GET:
            half, end = self._chunks // 2, index + count
            if self.laggard and end > half:
                self.laggard = False
                kept = max(index, half)
                self.kept_back = set_id, kept
                self._send_chunks(set_id, index, kept - index)
                index, count = kept + 1, end - kept - 1
            self._send_chunks(set_id, index, count)
        elif kind == Kind.REFUSE:
            raise AssertionError(f"site {self.number} was refused chunk {index}: {count}")

    def give_up(self) -> None:
        """Send the chunk that was kept back."""
        assert self.kept_back is not None
        kept, self.kept_back = self.kept_back, None
        self._send_chunks(*kept, 1)

    def _send_chunks(self, set_id: bytes, first: int, count: int) -> None:
        parity = self.number % 2
        for index in range(first, first + count):
            encoding, body = self._values.body(parity, index)
            crc, length = self._values.checksum(parity, index, body), memoryview(body).nbytes
            self.socket.send(
                frame_header(
                    Kind.CHUNK, set_id, index, encoding=encoding, length=length, checksum=crc
                ),
                zmq.SNDMORE,
            )
            self.socket.send(body, copy=False)

    def _on_task(self, task: protocol.Task) -> None:
        if self.machine.open_task() is None or task == self._pulled:
            return
        if task.kind == "evaluate":
            self.machine.report(protocol.Score(version=task.version, metrics={}, examples=1))
            self._end(task)
            return
        self._pulled, self._asked, self._came = task, 0, 0
        self._pull()

    def _end(self, task: protocol.Task) -> None:
        self.machine.end_task(task.kind, task.round)
        self.carry_out()

    def _pull(self) -> None:
        """Ask for the model, each site from another chunk on, and go on to the task's end when it is here."""
        task, chunks = self._pulled, self._chunks
        assert task is not None
        assert task.model is not None
        shift = self.number * _RANGE
        while self._asked < chunks and self._asked - self._came <= _WINDOW - _RANGE:
            first = (shift + self._asked) % chunks
            count = min(_RANGE, chunks - self._asked, chunks - first)
            self.socket.send(
                frame_header(Kind.GET, bytes.fromhex(task.model.id), first, count=count)
            )
            self._asked += count
        if self._came < chunks:
            return
        self._pulled = None
        self.machine.publish(
            protocol.Ready(
                round=task.round,
                sets=[protocol.NamedSet(id=uuid.uuid4().hex, layout=self._hash)],
                weight=_WEIGHTS[self.number % 2],
            ),
            None,  # the chunks are made as they are asked for
        )
        self._end(task)


def take_part(
    address: str, count: int, chunks: int, update: str = "raw", laggard: int | None = None
) -> None:
    """Run the sites to the end of the run; see the module."""
    context: zmq.Context[Any] = zmq.Context()
    context.set(zmq.MAX_SOCKETS, count + 16)
    values = Values(chunks, update)
    sites = [LightSite(context, address, number, values, chunks) for number in range(count)]
    if laggard is not None:
        sites[laggard].laggard = True
    poller = zmq.Poller()
    by_socket = {site.socket: site for site in sites}
    for socket in by_socket:
        poller.register(socket, zmq.POLLIN)
    ping_at, quiet_since = time.monotonic(), time.monotonic()
    while not all(site.over for site in sites):
        ready = poller.poll(100)
        now = time.monotonic()
        for socket, _ in ready:
            site = by_socket[socket]
            while socket.poll(0):
                frames = socket.recv_multipart()
                site.on_frames(frames)
                if read_header(frames[0]).kind != Kind.PONG:
                    quiet_since = now
        if laggard is not None and sites[laggard].kept_back and now - quiet_since > _QUIET_SECONDS:
            sites[laggard].give_up()
        if now >= ping_at:
            ping_at = now + 1
            for site in sites:
                site.ping()
                site.machine.tick(now)
                site.carry_out()
    print("finished", flush=True)
    sys.stdin.read()
    for site in sites:
        site.machine.leave("done")
        site.carry_out()
        site.socket.close()
    context.term()


if __name__ == "__main__":
    server, many, large, how, *late = sys.argv[1:]
    take_part(server, int(many), int(large), how, *map(int, late))
