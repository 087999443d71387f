"""Two exchanges and a slow wire between them, without sockets and by a clock that is a number."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import pytest

from fedcore._core import Collector, CollectorOptions, Exchange, Layout, SourceStalled
from fedcore.model_file import create_model

CHUNK = 4096
CHUNKS = 100
LAYOUT = Layout([("w", "F32", [CHUNKS * CHUNK // 4])], CHUNK)
_SCALE = 256  # on the wire a chunk takes the room of 1 MiB
MIB = _SCALE * CHUNK
IDLE_MS = 3000
STEP_MS = 10
GET, CHUNK_KIND, PING = 1, 2, 4


class Wire:
    """A site whose frames reach the server in order, at ``rate`` bytes per second and after ``delay_ms``.

    Attributes:
        lost: when the server would have taken the site for lost, or None.
        asked: how many chunks were asked for.
        most: the most chunks that were under way at a time.
        lag: the longest time that a heartbeat was on its way.
    """

    def __init__(self, rate: float, delay_ms: int = 0) -> None:
        self.rate, self.delay_ms = rate, delay_ms
        self.step_ms = STEP_MS if rate > MIB else 10 * STEP_MS
        self.now = 0
        self.cut = False
        self.lost: int | None = None
        self.asked = self.most = self.lag = 0
        self.eaten = lambda _kind: False
        self._free_at = 0.0
        self._queue: deque[tuple[float, int, bytes, bytes | None]] = deque()
        self.server, self.site = Exchange(), Exchange()
        self.update = create_model(None, LAYOUT)
        self.update.view("w")[:] = np.arange(CHUNKS * CHUNK // 4, dtype=np.float32).tobytes()
        self.site.heartbeat(1000)
        self.server.deliver(0, b"a", b"", None)
        self.collect()

    def collect(self) -> None:
        """Begin to pull the update, under another id each time."""
        self.set_id = bytes([len(self.site.published()) + 1]) * 16
        self.site.publish(
            self.set_id, self.update.file, self.update.data_offset, LAYOUT.total_bytes, CHUNK
        )
        self.out = create_model(None, LAYOUT)
        source = (b"a", self.set_id, 1)
        self.collector = Collector(
            LAYOUT, [source], self.out.file, self.out.data_offset, None, CollectorOptions(1 << 24)
        )
        self.server.start(self.collector)

    def step(self) -> None:
        self.now += self.step_ms
        self.server.tick(self.now)
        while (out := self.server.next_out(self.now)) is not None:
            if out[1][5] == GET:
                self.asked += int.from_bytes(out[1][32:36], "little")
            self.site.deliver(self.now, b"", out[1], None)
        if not self.cut:
            self._send()
        while self._queue and self._queue[0][0] + self.delay_ms <= self.now:
            _, sent, head, body = self._queue.popleft()
            if head[5] == PING:
                self.lag = max(self.lag, self.now - sent)
            if not self.eaten(head[5]):
                self.server.deliver(self.now, b"a", head, body)
        silent = self.now - (self.server.last_heard(b"a") or 0)
        if self.lost is None and silent > IDLE_MS and self.now > self.server.busy_until(b"a"):
            self.lost = self.now

    def _send(self) -> None:
        self.site.tick(self.now)
        while (out := self.site.next_out(self.now)) is not None:
            _, head, body = out
            size = 48 + _SCALE * len(body or b"")
            self._free_at = max(self._free_at, self.now) + 1000 * size / self.rate
            self._queue.append(
                (self._free_at, self.now, head, None if body is None else bytes(body))
            )
        self.most = max(self.most, sum(head[5] == CHUNK_KIND for _, _, head, _ in self._queue))

    def run(self, until: Callable[[], bool], limit_ms: int = 2_000_000) -> None:
        """Let time pass until a condition holds."""
        end = self.now + limit_ms
        while not until():
            assert self.now < end, "it never came to that"
            self.step()

    def break_down(self) -> None:
        """What is under way and all that follows is lost."""
        self.cut = True
        self._queue.clear()

    @property
    def events(self) -> list[type]:
        return [type(event) for event in iter(self.server.next_event, None)]


@pytest.mark.parametrize("seconds", [0.5, 4, 15])
def test_a_site_whose_chunks_take_longer_than_the_idle_timeout_is_not_lost(seconds: float) -> None:
    wire = Wire(MIB / seconds)
    wire.run(lambda: wire.collector.done)
    assert bytes(wire.out.view("w")) == bytes(wire.update.view("w"))
    assert wire.lost is None
    assert wire.asked == CHUNKS, "nothing was sent twice"
    assert wire.most <= max(1, round(1.5 / seconds)) + 1
    assert SourceStalled not in wire.events


@pytest.mark.parametrize("delay_ms", [0, 100, 400])
def test_about_a_seconds_worth_is_under_way_and_heartbeats_pass(delay_ms: int) -> None:
    wire = Wire(50 * MIB, delay_ms)
    wire.run(lambda: wire.collector.progress()[0] > CHUNKS // 2)
    assert 20 <= wire.most <= 75
    assert wire.lag < 2000
    wire.run(lambda: wire.collector.done)
    least = CHUNKS / 50 * 1000
    assert wire.now < 1.3 * least + 12 * (delay_ms + 2 * wire.step_ms), "the wire is kept busy"
    assert (wire.lost, wire.asked) == (None, CHUNKS)


def test_a_wire_that_becomes_slow_holds_less_and_is_waited_for() -> None:
    wire = Wire(50 * MIB)
    wire.run(lambda: wire.collector.progress()[0] > CHUNKS // 5)
    wire.rate = MIB / 2
    wire.run(lambda: wire.collector.progress()[0] > 9 * CHUNKS // 10)
    wire.most = wire.lag = 0
    wire.run(lambda: wire.collector.done)
    assert wire.most <= 2
    assert wire.lag < 5000
    assert (wire.lost, wire.asked) == (None, CHUNKS)


def test_a_site_lost_in_mid_upload_at_a_usual_speed_is_noticed_within_the_idle_timeout() -> None:
    wire = Wire(50 * MIB)
    wire.run(lambda: wire.collector.progress()[0] > CHUNKS // 2)
    died = wire.now
    wire.break_down()
    wire.run(lambda: wire.lost is not None)
    assert wire.lost is not None
    assert IDLE_MS <= wire.lost - died <= IDLE_MS + 2 * wire.step_ms


def test_silence_with_nothing_due_is_no_patience() -> None:
    wire = Wire(MIB / 10)
    wire.run(lambda: wire.collector.done)
    heard = wire.now
    wire.break_down()
    wire.run(lambda: wire.lost is not None)
    assert wire.lost is not None
    assert wire.lost - heard <= IDLE_MS + 2 * wire.step_ms


def test_a_first_chunk_may_take_a_minute_and_no_longer() -> None:
    wire = Wire(MIB / 55)
    wire.run(lambda: wire.collector.progress()[0] > 0)
    assert wire.lost is None
    dead = Wire(MIB / 55)
    dead.step()
    dead.break_down()
    dead.run(lambda: dead.lost is not None)
    assert 60_000 <= dead.now < 61_000


def test_a_site_without_a_connection_is_not_waited_for() -> None:
    wire = Wire(MIB / 10)
    wire.run(lambda: wire.collector.progress()[0] > 2)
    wire.step()
    assert wire.server.busy_until(b"a") > wire.now + 30_000
    wire.break_down()
    wire.server.unreachable(b"a")
    wire.run(lambda: wire.lost is not None)
    assert wire.now - (wire.server.last_heard(b"a") or 0) <= IDLE_MS + 2 * wire.step_ms


def test_the_next_collection_begins_at_the_known_speed() -> None:
    wire = Wire(50 * MIB)
    wire.run(lambda: wire.collector.done)
    wire.server.cancel(wire.collector)
    wire.most = 0
    wire.collect()
    wire.step()
    assert wire.most >= 20
    wire.break_down()
    wire.run(lambda: wire.lost is not None, limit_ms=IDLE_MS + 1000)


@pytest.mark.parametrize("seconds", [0.05, 5])
def test_a_lost_chunk_is_asked_for_again_once_the_site_is_heard_behind_it(seconds: float) -> None:
    wire = Wire(MIB / seconds)
    wire.run(lambda: wire.collector.progress()[0] > 5)
    left = 1

    def eat(kind: int) -> bool:
        nonlocal left
        left -= kind == CHUNK_KIND
        return kind == CHUNK_KIND and left >= 0

    wire.eaten = eat
    wire.run(lambda: left < 1)
    came, before = wire.now, wire.asked
    wire.run(lambda: wire.collector.done)
    assert wire.asked - before <= CHUNKS - 5
    assert wire.asked <= CHUNKS + 21
    assert wire.now - came < 1000 * seconds * CHUNKS + 8000
    assert wire.lost is None


def test_a_site_that_answers_without_data_is_told_from_a_slow_one() -> None:
    wire = Wire(50 * MIB)
    wire.eaten = lambda kind: kind == CHUNK_KIND
    stalls: list[int] = []

    def stalled() -> bool:
        stalls.extend(
            event.silent_ms
            for event in iter(wire.server.next_event, None)
            if isinstance(event, SourceStalled)
        )
        return bool(stalls) and stalls[-1] >= 10_000

    wire.run(stalled, limit_ms=20_000)
    assert wire.lost is None
