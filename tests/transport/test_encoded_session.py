"""When a site carries what an encoding lost into its next update: only once its last one is known to count."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np
import pytest

from fedcore import protocol as p
from fedcore._core import Codec, Collector, CollectorDone, CollectorOptions
from fedcore.layout import layout_hash, table
from fedcore.model_file import ModelFile, create_model
from fedcore.site.session import Session

from ..support.stage import DEADLINE, LAYOUT, SPECS, Stage, fill, stage

TRANSFER = p.Transfer(update="int8")
STEP = np.random.default_rng(0).standard_normal(LAYOUT.total_bytes // 4).astype(np.float32)


def model(value: float) -> ModelFile:
    file = create_model(None, LAYOUT)
    file.fill(fill(value))
    return file


def train(name: str) -> bytes:
    """Any update will do, as long as int8 loses something of it."""
    offset, nbytes = next((at, size) for n, _, _, at, size in LAYOUT.tensors if n == name)
    return STEP[offset // 4 : (offset + nbytes) // 4].tobytes()


def reference(residual: bool) -> bytes:
    """What the second update stands for, with or without what the first one lost."""
    codec, total = Codec(LAYOUT, "int8"), LAYOUT.total_bytes
    base, local, rest = model(0), STEP.view(np.uint8), np.zeros(total, np.uint8)
    got = np.empty(total, np.uint8)
    for last in (False, True):
        left = rest.copy()
        for index in range(LAYOUT.chunk_count):
            at, nbytes = LAYOUT.chunk_range(index)
            part = slice(at, at + nbytes)
            under = base.file.view(base.data_offset + at, nbytes)
            body = codec.encode(
                index, local[part], under, rest[part] if last and residual else None
            )
            codec.decode(index, *body, got[part], under)
            codec.carry(index, local[part], None, got[part], left[part])
        rest = left
    return got.tobytes()


def pull(server: Stage, ready: p.Ready) -> bytes:
    out, base = create_model(None, LAYOUT), model(0)
    collector = Collector(
        LAYOUT,
        [(server.peer, bytes.fromhex(ready.model.id), ready.weight)],
        out.file,
        out.data_offset,
        (base.file, base.data_offset),
        CollectorOptions(1 << 20, codec=Codec(LAYOUT, "int8")),
    )
    server.link.exchange.start(collector)
    server.link.kick()
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        if server.link.recv(deadline - time.monotonic()) == CollectorDone(collector.id):
            return bytes(out.file.view(out.data_offset))
    raise AssertionError("the update did not arrive")


def say_task(server: Stage, round_: int, included: int | None) -> None:
    server.say(
        p.Task(
            kind="train",
            round=round_,
            rounds=3,
            version=round_ - 1,
            included=included,
            sets=[
                p.OpenSet(
                    id=server.publish(0),
                    layout=layout_hash(LAYOUT),
                    tensors=[(n, d, list(s)) for n, d, s in table(LAYOUT)],
                )
            ],
        )
    )


def trains(server: Stage, session: Session, call: Callable[..., Future], running: Future) -> bytes:
    """Take the task at hand and return what the update stands for at the server."""
    assert running.result(DEADLINE)
    begun = call(session.begin, SPECS, {}, fill(0))
    if not session.bound:
        server.accept()
    begun.result(DEADLINE)
    session.submit(train, 1)
    return pull(server, server.expect(p.Ready))


@pytest.mark.parametrize(
    ("committed", "dropped", "round_", "included", "carried"),
    [
        ("with it", False, 2, 1, True),
        ("with it", False, 2, None, True),
        ("without it", False, 2, None, False),
        ("", False, 2, 1, True),  # the commit was lost with a link
        ("", False, 3, 1, True),  # and the round after it was missed
        ("", False, 2, None, False),
        ("", True, 2, None, False),
    ],
)
def test_what_was_lost_is_sent_with_the_next_update_once_the_last_one_counts(
    committed: str, dropped: bool, round_: int, included: int | None, carried: bool
) -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.say(
            p.Welcome(
                run="r", run_id=server.run_id, rounds=3, chunk_bytes=4096, has_model=True, version="1",
                transfer=TRANSFER,
            )
        )  # fmt: skip
        say_task(server, 1, None)
        first = trains(server, session, call, running)
        if committed:
            included_in_it = committed == "with it"
            server.say(p.Commit(version=1, included=included_in_it, participants=["south"]))
        if dropped:
            server.say(p.Dropped(round=1, message="too late"))
        say_task(server, round_, included)
        second = trains(server, session, call, call(session.is_running))
        assert second == reference(carried)
        assert (second != first) == carried
        assert np.abs(np.frombuffer(first, np.float32) - STEP).max() < 0.05
