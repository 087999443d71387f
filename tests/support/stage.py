"""The server's side of a session, one message at a time over a real socket."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import numpy as np

from fedcore import protocol as p
from fedcore._core import Collector, CollectorDone, CollectorOptions, Layout
from fedcore.layout import layout_hash, table
from fedcore.model_file import ModelFile, create_model
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.link import Control, ServerLink

DEADLINE = 200.0
SPECS = [("head.weight", "F32", [40, 50]), ("head.bias", "F32", [50])]
LAYOUT = Layout([(n, d, s) for n, d, s in SPECS], 4096)
T = TypeVar("T")


class Stage:
    """The server's side, one spoken line at a time."""

    def __init__(self, link: ServerLink) -> None:
        self.link = link
        self.run_id = uuid.uuid4().hex
        self.peer = b""
        self.heard: list[p.FromSite] = []

    def expect(self, kind: type[T], accept: Callable[[T], bool] = lambda _: True) -> T:
        """Return the next message of ``kind``; others are kept in ``heard``."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            arrived = self.link.recv(deadline - time.monotonic())
            if isinstance(arrived, Control):
                self.peer = arrived.peer
                message = p.decode_from_site(arrived.body)
                if isinstance(message, kind) and accept(message):
                    return message
                self.heard.append(message)
        raise AssertionError(f"no {kind.__name__} came; heard {self.heard}")

    def say(self, message: p.FromServer) -> None:
        self.link.send(self.peer, message)

    def welcome(self, has_model: bool = True) -> None:
        self.say(
            p.Welcome(
                run="r",
                run_id=self.run_id,
                rounds=2,
                chunk_bytes=4096,
                has_model=has_model,
                version="1",
            )
        )

    def accept(self) -> None:
        declared = self.expect(p.Declare)
        layout = Layout([(n, d, s) for n, d, s in declared.tensors], 4096)
        self.say(p.Accepted(layout_hash=layout_hash(layout)))

    def publish(self, value: float) -> str:
        file = filled(value)
        set_id = uuid.uuid4()
        self.link.exchange.publish(
            set_id.bytes, file.file, file.data_offset, LAYOUT.total_bytes, LAYOUT.chunk_bytes
        )
        return set_id.hex

    def task(self, kind: str, round_: int, set_id: str, layout: Layout = LAYOUT) -> None:
        self.say(
            p.Task.model_validate(
                {
                    "kind": kind,
                    "round": round_,
                    "rounds": 2,
                    "version": round_ - (kind == "train"),
                    "sets": [
                        {"id": set_id, "layout": layout_hash(layout), "tensors": table(layout)}
                    ],
                },
                strict=False,
            )
        )

    def pull(self, ready: p.Ready) -> bytes:
        out = create_model(None, LAYOUT)
        source = (self.peer, bytes.fromhex(ready.model.id), ready.weight)
        collector = Collector(
            LAYOUT, [source], out.file, out.data_offset, None, CollectorOptions(1 << 20)
        )
        self.link.exchange.start(collector)
        self.link.kick()
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            arrived = self.link.recv(deadline - time.monotonic())
            if arrived == CollectorDone(collector.id):
                return bytes(out.view("head.weight"))
        raise AssertionError("the update did not arrive")


def filled(value: float) -> ModelFile:
    file = create_model(None, LAYOUT)
    file.fill(fill(value))
    return file


def fill(value: float) -> Callable[[str], bytes]:
    sizes = {name: nbytes for name, _, _, _, nbytes in LAYOUT.tensors}
    return lambda name: np.full(sizes[name] // 4, value, np.float32).tobytes()


def same(raw: memoryview | bytes, value: float) -> bool:
    return bool((np.frombuffer(raw, np.float32) == np.float32(value)).all())


@contextmanager
def stage(**settings: object) -> Iterator[tuple[Stage, Session, Callable[..., Future]]]:
    link = ServerLink("tcp://127.0.0.1:0")
    session = Session(SiteSettings(server=link.endpoint, site="north", **settings))  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as pool:
        try:
            yield Stage(link), session, pool.submit
        finally:
            session.close()
            link.close()


def begun_round(server: Stage, session: Session, call: Callable[..., Future]) -> None:
    running = call(session.is_running)
    server.expect(p.Join)
    server.welcome()
    server.task("train", 1, server.publish(1))
    running.result(DEADLINE)
    begun = call(session.begin, SPECS, {}, fill(0))
    server.accept()
    begun.result(DEADLINE)


def limit(session: Session, **timeouts: float) -> None:
    """Give a session shorter timeouts from now on, so that what came before does not depend on them."""
    connection = session.connection
    with connection.changed:
        settings = dataclasses.replace(connection.settings, **timeouts)  # type: ignore[arg-type]
        connection.settings = connection.machine.settings = settings
