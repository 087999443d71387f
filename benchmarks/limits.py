"""What the same machine does with no federation: bytes over loopback, raw TCP and bare ZeroMQ."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

_BLOCK = 1 << 20
_QUEUE = 16  # messages; enough to keep both ends busy, too few for memory to matter


@dataclass
class Limits:
    """Seconds for ``total`` bytes, measured before and after what they are compared with.

    The machine may be shared: the median of all samples is compared, and the spread is reported.
    """

    total: int
    tcp: list[float] = field(default_factory=list)
    zeromq: list[float] = field(default_factory=list)

    def sample(self, times: int = 2) -> None:
        """Measure both ``times`` times."""
        for _ in range(times):
            self.tcp.append(raw_tcp(self.total))
            self.zeromq.append(bare_zeromq(self.total))

    def result(self) -> dict[str, float | list[float]]:
        return {
            "limit_s": statistics.median(self.tcp),
            "limit_samples_s": self.tcp,
            "zeromq_s": statistics.median(self.zeromq),
            "zeromq_samples_s": self.zeromq,
        }


def raw_tcp(total: int) -> float:
    """Return the seconds that ``total`` bytes take over one loopback connection in blocks of 1 MiB."""
    received = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def drain() -> None:
            nonlocal received
            buffer = bytearray(_BLOCK)
            connection, _ = listener.accept()
            with connection:
                while got := connection.recv_into(buffer):
                    received += got

        def send() -> None:
            block = memoryview(bytes(_BLOCK))
            with socket.create_connection(listener.getsockname()) as sender:
                for begin in range(0, total, _BLOCK):
                    sender.sendall(block[: total - begin])

        seconds = _timed(drain, send)
    assert received == total, f"{received} bytes of {total} arrived"
    return seconds


def bare_zeromq(total: int) -> float:
    """Return the seconds that ``total`` bytes take from a DEALER to a ROUTER in messages of 1 MiB."""
    received = 0
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.RCVHWM, _QUEUE)
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def drain() -> None:
            nonlocal received
            while received < total:
                _, frame = router.recv_multipart(copy=False)
                received += len(frame)

        def send() -> None:
            block = memoryview(bytes(_BLOCK))
            with zmq.Context() as own, own.socket(zmq.DEALER) as dealer:
                dealer.setsockopt(zmq.SNDHWM, _QUEUE)
                dealer.connect(f"tcp://127.0.0.1:{port}")
                for begin in range(0, total, _BLOCK):
                    dealer.send(block[: total - begin], copy=False)

        seconds = _timed(drain, send)
    assert received == total, f"{received} bytes of {total} arrived"
    return seconds


def _timed(drain: Callable[[], None], send: Callable[[], None]) -> float:
    thread = threading.Thread(target=drain)
    thread.start()
    begin = time.perf_counter()
    send()
    thread.join()
    return time.perf_counter() - begin
