"""A site's end of the link in a thread, whose chunks a test lets through one by one."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable

import zmq

from fedcore import protocol
from fedcore._core import Exchange, Layout
from fedcore.errors import ProtocolError
from fedcore.layout import layout_hash, table
from fedcore.model_file import ModelFile, create_model
from fedcore.protocol import Kind, control_frames
from fedcore.transport.link import HEARTBEAT_MS, now_ms

ANY = -1


class GatedSite(threading.Thread):
    """Offers ``update(round)`` in every round; ``sent`` counts the chunks that left, by round and index.

    No chunk leaves before `allow` says so. The thread ends with the run.
    """

    def __init__(
        self,
        name: str,
        weight: int,
        address: str,
        layout: Layout,
        update: Callable[[int], bytes],
    ) -> None:
        super().__init__(name=f"site {name}", daemon=True)
        self.site, self.weight, self.layout, self.update = name, weight, layout, update
        self.sent: Counter[tuple[int, int]] = Counter()
        self.asked_at = 0.0
        self.changed = threading.Condition()
        self.finished = False
        self._stopping = False
        self._allowed = dict.fromkeys((0, ANY), 0)
        self._rounds: dict[bytes, int] = {}
        self._files: dict[bytes, ModelFile] = {}
        self._ready: protocol.Ready | None = None
        self._held: list[tuple[bytes, bytes]] = []
        self._exchange = Exchange()
        self._exchange.heartbeat(HEARTBEAT_MS)
        self._instance = uuid.uuid4()
        self._address = address

    # --- for the test ---

    def allow(self, chunks: int, round_: int = ANY) -> None:
        """Let so many chunks leave from now on, of the initial model (round 0) or of any update."""
        with self.changed:
            self._allowed[round_] = chunks

    def spent(self, round_: int = ANY) -> bool:
        """Whether all the chunks have left that may."""
        return self._allowed[round_] == 0

    def left(self, round_: int) -> int:
        """How many chunks of a round have left."""
        return sum(times for (number, _), times in self.sent.items() if number == round_)

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            reached = self.changed.wait_for(condition, 40)
            assert reached, f"{self.site} sent {self.sent} and may send {self._allowed} more"

    def stop(self) -> None:
        self._stopping = True
        self.join()

    # --- the thread ---

    def run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._net = context.socket(zmq.DEALER)
        self._net.setsockopt(zmq.ROUTING_ID, self._instance.bytes)
        self._net.setsockopt(zmq.RECONNECT_IVL, 100)
        self._net.setsockopt(zmq.LINGER, 500)
        self._net.connect(self._address)
        self._join()
        while not self._stopping and not self.finished:
            self._exchange.tick(now_ms())
            self._send_data()
            if self._net.poll(20):
                self._receive(self._net.recv_multipart())
        self._net.close()
        context.term()

    def _say(self, message: protocol.FromSite) -> None:
        self._net.send_multipart(control_frames(message))

    def _join(self) -> None:
        self._say(
            protocol.Join(
                protocol=protocol.PROTOCOL_VERSION,
                version="test",
                site=self.site,
                instance=self._instance.hex,
            )
        )

    def _send_data(self) -> None:
        while (out := self._exchange.next_out(now_ms())) is not None:
            _, head, body = out
            if body is None:
                self._net.send_multipart([head])
            else:
                self._held.append((head, bytes(body)))
        with self.changed:
            while self._held:
                head, body = self._held[0]
                round_ = self._rounds[head[8:24]]
                key = round_ if round_ in self._allowed else ANY
                if self._allowed[key] == 0:
                    break
                self._allowed[key] -= 1
                self._net.send_multipart(self._held.pop(0))
                self.sent[round_, int.from_bytes(head[24:32], "little")] += 1
            self.changed.notify_all()

    def _receive(self, frames: list[bytes]) -> None:
        head, body = frames[0], frames[1] if len(frames) > 1 else None
        if head[5] == Kind.GET:
            with self.changed:
                self.asked_at = time.monotonic()
                self.changed.notify_all()
        if head[5] != Kind.CONTROL:
            self._exchange.deliver(now_ms(), b"", head, body)
            return
        assert body is not None
        try:
            self._handle(protocol.decode_from_server(body))
        except ProtocolError as error:
            raise AssertionError(error) from error

    def _handle(self, message: protocol.FromServer) -> None:
        if isinstance(message, protocol.Rejoin):
            self._join()
        elif isinstance(message, protocol.Welcome):
            self._say(protocol.Declare(tensors=[(n, d, list(s)) for n, d, s in table(self.layout)]))
        elif isinstance(message, protocol.Accepted) and self._ready is not None:
            self._say(self._ready)
        elif isinstance(message, protocol.Task) and message.kind == "evaluate":
            self._say(protocol.Score(version=message.version, metrics={"loss": 1.0}, examples=1))
        elif isinstance(message, protocol.Task):
            self._offer(message.round)
        elif isinstance(message, protocol.Commit | protocol.Dropped):
            self._ready = None
        elif isinstance(message, protocol.Finish):
            self._say(protocol.Leave(reason="the run is over"))
            with self.changed:
                self.finished = True
                self.changed.notify_all()

    def _offer(self, round_: int) -> None:
        if self._ready is not None and self._ready.round == round_:
            return
        set_id = uuid.uuid4().bytes
        self._files[set_id] = file = create_model(None, self.layout)
        file.file.view(file.data_offset)[:] = self.update(round_)
        self._rounds[set_id] = round_
        chunk_bytes, total = self.layout.chunk_bytes, self.layout.total_bytes
        self._exchange.publish(set_id, file.file, file.data_offset, total, chunk_bytes)
        self._ready = protocol.Ready(
            round=round_,
            sets=[protocol.NamedSet(id=set_id.hex(), layout=layout_hash(self.layout))],
            weight=self.weight if round_ else 1,
            metrics={},
        )
        self._say(self._ready)
