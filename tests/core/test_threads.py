"""A collector with several threads: chunks that are there are reduced together, and nothing else changes."""

from __future__ import annotations

import numpy as np

from fedcore._core import Collector, CollectorOptions, Exchange, Layout, MappedFile, SourceRejected

CHUNK = 4096
COUNT = 10 * CHUNK // 4
LAYOUT = Layout([("w", "F32", [COUNT])], CHUNK)
WEIGHTS = {b"a": 1, b"b": 2, b"c": 3}


class Three:
    """Three sites whose chunks reach a collector when a test says so."""

    def __init__(
        self, threads: int, budget: int = 1 << 20, bad: dict[bytes, tuple[int, float]] | None = None
    ) -> None:
        self.server = Exchange()
        self.updates = {
            peer: np.random.default_rng(weight).random(COUNT, np.float32)
            for peer, weight in WEIGHTS.items()
        }
        for peer, (element, value) in (bad or {}).items():
            self.updates[peer][element] = value
        self.out = MappedFile.anonymous(LAYOUT.total_bytes)
        sources = [(peer, peer * 16, weight) for peer, weight in WEIGHTS.items()]
        self.collector = Collector(
            LAYOUT,
            sources,
            self.out,
            0,
            None,
            CollectorOptions(budget, threads=threads),
        )
        self.server.start(self.collector)
        self.sites = {}
        self.answers: dict[tuple[bytes, int], tuple[bytes, bytes, bytes]] = {}
        for peer, update in self.updates.items():
            self.sites[peer], file = Exchange(), MappedFile.anonymous(LAYOUT.total_bytes)
            file.write(0, update)
            self.sites[peer].publish(peer * 16, file, 0, LAYOUT.total_bytes, CHUNK)

    def deliver(self, index: int) -> None:
        """Let a chunk of each site come."""
        while (request := self.server.next_out(0)) is not None:
            self.sites[request[0]].deliver(0, b"server", request[1], None)
        for peer, site in self.sites.items():
            while (reply := site.next_out(0)) is not None:
                if reply[2] is not None:
                    number = int.from_bytes(reply[1][24:32], "little")
                    self.answers[peer, number] = (peer, reply[1], bytes(reply[2]))
        for peer in WEIGHTS:
            self.server.deliver(0, *self.answers.pop((peer, index)))

    @property
    def reduced(self) -> int:
        return self.collector.progress()[0]

    def mean(self) -> np.ndarray:
        total = sum(w * self.updates[peer].astype(np.float64) for peer, w in WEIGHTS.items())
        return (total / 6).astype(np.float32)


def test_chunks_wait_for_as_many_as_there_are_threads_and_a_tick_takes_what_there_is() -> None:
    three = Three(threads=4)
    for index in range(3):
        three.deliver(index)
    assert three.reduced == 0
    three.deliver(3)
    assert three.reduced == 4
    three.deliver(4)
    assert three.reduced == 4
    assert three.server.tick(0) != 0
    assert three.reduced == 5
    for index in range(5, LAYOUT.chunk_count):
        three.deliver(index)
    three.server.tick(0)
    assert three.collector.done
    assert np.array_equal(np.frombuffer(three.out.view(), np.float32), three.mean())


def test_a_value_that_is_not_finite_among_them_leaves_what_was_before_it_reduced() -> None:
    second, third = 2 * CHUNK // 4, 3 * CHUNK // 4
    three = Three(threads=4, bad={b"b": (second + 7, np.inf), b"a": (third, np.nan)})
    for index in range(4):
        three.deliver(index)
    assert three.reduced == 2
    event = three.server.next_event()
    assert event is not None
    assert isinstance(event, SourceRejected)
    assert (event.collector, event.source, event.code) == (three.collector.id, 1, "nonfinite")
    assert f"element {second + 7}" in event.message
    assert three.server.next_event() is None
    written = np.frombuffer(three.out.view(), np.float32)
    assert np.array_equal(written[:second], three.mean()[:second])
    assert not written[second:].any()


def test_results_that_wait_take_an_eighth_of_the_budget_at_most() -> None:
    windows = {
        threads: Three(threads, budget=24 * CHUNK).collector.window for threads in (1, 4, 64)
    }
    assert windows == {1: 8, 4: 7, 64: 7}
