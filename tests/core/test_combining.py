"""A slow rule combines a chunk in a thread of its own; the exchange serves everybody else meanwhile."""

from __future__ import annotations

import os
import random
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from fedcore._core import (
    Collector,
    CollectorDone,
    CollectorOptions,
    RuleFailed,
    SourceRejected,
    Spill,
)
from fedcore.model_file import create_model
from fedcore.protocol.frames import Kind, frame_header, read_header
from fedcore.rules import PythonRule
from fedcore.rules.python import load_rule

from ..support.python_rules import Held, Median, named
from ..support.spilling import CHUNK, CHUNKS, LAYOUT, Federation, update

SECONDS = 200  # beyond any machine's slowness; a test that fails waits so long
WINDOW = 3


class Spoiling(Median):
    """the median, by a class that fails"""

    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        raise ArithmeticError("the values are odd")


class HeldInTwo(Held):
    """the median, by a class that waits where a chunk has elements of two formats"""

    entered_fd: ClassVar[int] = -1  # the test's; it is readable once the rule waits

    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        if len(out) in (CHUNK // 4, CHUNK // 8):
            Median.combine(self, values, out)
        else:
            if not self.entered.is_set():
                os.eventfd_write(self.entered_fd, 1)
            super().combine(values, out)


@pytest.fixture
def entered_fd(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    fd = os.eventfd(0)
    monkeypatch.setattr(HeldInTwo, "entered_fd", fd)
    yield fd
    os.close(fd)


@contextmanager
def combined(
    kind: type[PythonRule], names: str, spill: Spill | None = None, **spoiled: int
) -> Iterator[Federation]:
    """A federation whose rule works in a thread of its own."""
    rule, budget = load_rule(named(kind)).core, WINDOW * len(names) * CHUNK
    federation = Federation(names, budget, spill, rule=rule, aside=True, **spoiled)
    assert federation.collector.aside
    thread = threading.Thread(target=federation.server.combine, args=(federation.collector,))
    thread.start()
    try:
        yield federation
    finally:
        federation.server.cancel(federation.collector)
        Held.free.set()
        thread.join(SECONDS)
        assert not thread.is_alive()


def arrive(federation: Federation, awake: str, seed: int = 0) -> None:
    """Let all chunks arrive that are asked for at present."""
    dice = random.Random(seed)
    while federation.step(dice, awake):
        pass


def woken(federation: Federation, *other: int) -> None:
    """Wait until the thread that combines has done something, or another descriptor is readable."""
    assert select.select([federation.server.wake_fd, *other], [], [], SECONDS)[0]
    federation.server.clear_wake()


def finish(federation: Federation, awake: str) -> bytes:
    arrive(federation, awake)
    while not federation.collector.done:
        woken(federation)
        arrive(federation, awake)
    return federation.result()


def median(names: str) -> bytes:
    federation = Federation(names, 1 << 30, rule="median")
    federation.run(names)
    return federation.result()


def test_a_rule_at_work_holds_up_no_other_site_and_no_other_collection() -> None:
    Held.hold()
    with combined(Held, "abc") as federation:
        server = federation.server
        arrive(federation, "abc")
        assert Held.entered.wait(SECONDS)
        arrive(federation, "abc")
        assert set(server.pulls(federation.collector)) == {(0, WINDOW)}  # all came that may

        server.deliver(federation.now, b"z", frame_header(Kind.PING), None)
        answer = server.next_out(federation.now)
        assert answer is not None
        assert (answer[0], read_header(answer[1]).kind) == (b"z", Kind.PONG)

        out = create_model(None, LAYOUT)
        other = Collector(
            LAYOUT,
            [(b"a", b"o" * 16, 1)],
            out.file,
            out.data_offset,
            None,
            CollectorOptions(1 << 20),
        )
        sent = update("o")
        federation.sites[b"a"].publish(
            b"o" * 16, sent.file, sent.data_offset, LAYOUT.total_bytes, CHUNK
        )
        server.start(other)
        arrive(federation, "a")
        assert other.done
        assert bytes(out.view("w")) == bytes(sent.view("w"))

        assert federation.collector.progress()[0] == 0
        Held.free.set()
        assert finish(federation, "abc") == median("abc")
        assert [e for e in federation.events() if isinstance(e, CollectorDone)]


@pytest.mark.parametrize("lost", "ad")
def test_a_site_that_is_lost_while_the_rule_works_counts_for_nothing(lost: str) -> None:
    Held.hold()
    with combined(Held, "abcd") as federation:
        arrive(federation, "abcd")
        assert Held.entered.wait(SECONDS)
        federation.lose(lost)  # the rule reads its chunk
        left = "abcd".replace(lost, "")
        arrive(federation, left)
        Held.free.set()
        assert finish(federation, left) == median(left)


@pytest.mark.parametrize("seed", range(8))
def test_sites_lost_at_any_time_leave_the_bytes_of_those_that_stay(seed: int) -> None:
    dice = random.Random(seed)
    with combined(Median, "abcdef") as federation:
        left = "abcdef"
        for _ in range(3):
            for _ in range(dice.randrange(3 * CHUNKS)):
                federation.step(dice, left)
            lost = dice.choice(left)
            left = left.replace(lost, "")
            federation.lose(lost)
        assert finish(federation, left) == median(left)


def test_a_spill_file_may_grow_while_the_rule_reads_a_chunk_that_lay_in_it(
    tmp_path: Path, entered_fd: int
) -> None:
    Held.hold()
    spill = Spill(str(tmp_path / "spill"), CHUNK, 0, CHUNK)  # it grows with each chunk
    with combined(HeldInTwo, "abc", spill) as federation:
        federation.run("a")
        assert spill.used > CHUNKS // 2
        dice = random.Random(0)
        while not select.select([entered_fd], [], [], 0)[0]:  # it is chunk 1 that has two formats
            if not federation.step(dice, "bc"):
                woken(federation, entered_fd)
        assert Held.entered.wait(SECONDS)
        before = spill.file_bytes
        federation.run("b")
        assert spill.file_bytes > before
        Held.free.set()
        assert finish(federation, "abc") == median("abc")


def test_a_collection_that_is_cancelled_while_the_rule_works_writes_nothing() -> None:
    Held.hold()
    with combined(Held, "abc") as federation:
        arrive(federation, "abc")
        assert Held.entered.wait(SECONDS)
    assert not federation.collector.done
    assert not any(federation.out.file.view(federation.out.data_offset))


def test_a_bad_value_that_the_rule_meets_rejects_its_site_alone() -> None:
    with combined(Median, "abc", b=CHUNKS // 2) as federation:
        arrive(federation, "abc")
        while not (events := federation.events()):
            woken(federation)
            arrive(federation, "abc")
        (rejected,) = events
        assert isinstance(rejected, SourceRejected)
        assert rejected.source == 1
        federation.lose("b")
        assert finish(federation, "ac") == median("ac")


def test_a_rule_that_fails_in_its_thread_is_an_event_with_its_words() -> None:
    with combined(Spoiling, "abc") as federation:
        arrive(federation, "abc")
        while not (events := federation.events()):
            woken(federation)
        (failed,) = events
        assert isinstance(failed, RuleFailed)
        assert "ArithmeticError: the values are odd" in failed.message
        assert "Spoiling" in failed.message
