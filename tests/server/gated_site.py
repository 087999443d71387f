"""A site's end of the link in a thread, whose chunks a test lets through one by one."""

from __future__ import annotations

import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from fedcore import protocol
from fedcore._core import Exchange, Layout
from fedcore.encoding import EncodedUpdate
from fedcore.layout import layout_hash, table
from fedcore.model_file import create_model
from fedcore.protocol import Kind, control_frames, frame_header, read_header
from fedcore.site import outputs as out
from fedcore.site.machine import SiteMachine
from fedcore.site.settings import SiteSettings
from fedcore.transport.link import HEARTBEAT_MS, now_ms

ANY = -1
SERVER = """
from fedcore.cli.app import server_main
from fedcore.server import timing
# No chunk leaves before the test says so, however long that takes.
object.__setattr__(timing.DEFAULT, "data_silence", 3600.0)
server_main()
"""


class GatedSite(threading.Thread):
    """Offers ``update(round)`` in every round; ``sent`` counts the chunks that left, by round and index.

    No chunk leaves before `allow` says so; ``twist`` makes other bytes of it. The thread ends with the run.
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
        self.twist: Callable[[bytes], bytes] = lambda body: body
        self._stopping = self._leaving = self._forgetting = False
        self._allowed = dict.fromkeys((0, ANY), 0)
        self._rounds: dict[bytes, int] = {}
        self._held: list[tuple[bytes, bytes]] = []
        self._exchange = Exchange()
        self._exchange.heartbeat(HEARTBEAT_MS)
        self._machine = SiteMachine(SiteSettings(server=address, site=name))
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
            reached = self.changed.wait_for(condition, 100)
            sent = self.sent.total()
            assert reached, f"{self.site} sent {sent} chunks and may send {self._allowed} more"

    def stop(self) -> None:
        self._stopping = True
        self.join()

    def forget(self) -> None:
        """Let go of what a server had asked for that has ended; another one asks for what it needs."""
        self._forgetting = True
        self.wait(lambda: not self._forgetting)

    def leave(self) -> None:
        """Leave the run at once, and end."""
        self._leaving = True
        self.join()

    # --- the thread ---

    def run(self) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._net = context.socket(zmq.DEALER)
        self._net.setsockopt(zmq.ROUTING_ID, self._machine.instance.bytes)
        self._net.setsockopt(zmq.RECONNECT_IVL, 100)
        self._net.setsockopt(zmq.LINGER, 500)
        connected = False
        monitor = self._net.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED)
        self._net.connect(self._address)
        self._machine.join(time.monotonic())
        while not self._stopping and not self.finished:
            if self._leaving:
                self._machine.leave("it was asked to")
                self._stopping = True
            self._machine.tick(time.monotonic())
            self._carry_out()
            self._exchange.tick(now_ms())
            self._send_data()
            while monitor.poll(0):
                connected = recv_monitor_message(monitor)["event"] == zmq.EVENT_CONNECTED
            # All that the last server asked for is here once its connection has ended.
            if self._forgetting and not connected and not self._net.poll(0):
                with self.changed:
                    self._held.clear()
                    self._forgetting = False
                    self.changed.notify_all()
            if self._net.poll(20):
                self._receive(self._net.recv_multipart())
        self._net.disable_monitor()
        monitor.close()
        self._net.close()
        context.term()

    def _carry_out(self) -> None:
        while outputs := self._machine.take_outputs():
            for output in outputs:
                out.serve(self._exchange, output)
                match output:
                    case out.Send(message):
                        self._net.send_multipart(control_frames(message))
                    case out.Joined():
                        self._machine.declare(protocol.Declare(tensors=table(self.layout)))
                    case out.Tasked(task):
                        self._work(task)
                    case out.Finished():
                        self._machine.leave("the run is over")
                    case out.Malformed(why):
                        raise AssertionError(why)
                    case out.Failed(error):
                        raise error
        if self._machine.finish is not None:
            with self.changed:
                self.finished = True
                self.changed.notify_all()

    def _send_data(self) -> None:
        while (frames := self._exchange.next_out(now_ms())) is not None:
            _, head, body = frames
            if body is None:
                self._net.send_multipart([head])
            elif all(held != head for held, _ in self._held):  # else it is asked for again
                self._held.append((head, bytes(body)))
        with self.changed:
            while self._held:
                head, body = self._held[0]
                sent = read_header(head)
                round_ = self._rounds[sent.set_id]
                key = round_ if round_ in self._allowed else ANY
                if self._allowed[key] == 0:
                    break
                self._allowed[key] -= 1
                self._held.pop(0)
                body = self.twist(body)
                head = frame_header(
                    Kind.CHUNK, sent.set_id, sent.index, body=body, encoding=sent.encoding
                )
                self._net.send_multipart([head, body])
                self.sent[round_, sent.index] += 1
            self.changed.notify_all()

    def _receive(self, frames: list[bytes]) -> None:
        head, body = frames[0], frames[1] if len(frames) > 1 else None
        kind = read_header(head).kind
        if kind == Kind.GET:
            with self.changed:
                self.asked_at = time.monotonic()
                self.changed.notify_all()
        if kind != Kind.CONTROL:
            self._exchange.deliver(now_ms(), b"", head, body)
            return
        assert body is not None
        self._machine.receive(body, time.monotonic())

    def _work(self, task: protocol.Task) -> None:
        if self._machine.open_task() is None:
            return
        if task.kind == "evaluate":
            self._machine.report(
                protocol.Score(version=task.version, metrics={"loss": 1.0}, examples=1)
            )
        else:
            self._offer(task.round)
        self._machine.end_task(task.kind, task.round)

    def _offer(self, round_: int) -> None:
        set_id = uuid.uuid4()
        file = create_model(None, self.layout)
        file.file.view(file.data_offset)[:] = self.update(round_)
        self._rounds[set_id.bytes] = round_
        self._machine.publish(
            protocol.Ready(
                round=round_,
                sets=[protocol.NamedSet(id=set_id.hex, layout=layout_hash(self.layout))],
                weight=self.weight if round_ else 1,
            ),
            EncodedUpdate.raw(file),
        )
