"""A site dials again when its connection carries nothing, and not while data moves: the clock is a number."""

from __future__ import annotations

import pytest

from fedcore._core import Collector, CollectorOptions, Exchange, Layout
from fedcore.model_file import create_model

BEAT = 1000
PATIENCE = 6 * BEAT  # five heartbeats, and the look at them
STEP = 100
CHUNK = 64 << 10
CHUNKS = 8
LAYOUT = Layout([("w", "F32", [CHUNKS * CHUNK // 4])], CHUNK)
SET = bytes(range(16))


class Link:
    """A site and a server, and a wire up that carries ``rate`` bytes per second; answers are back at once.

    Attributes:
        cut: whether nothing passes any more.
        held: whether a proxy acknowledges at once what it passes on at the wire's speed.
    """

    def __init__(self, rate: float) -> None:
        self.rate, self.now, self.cut, self.held = rate, 0, False, True
        self.site, self.server = Exchange(), Exchange()
        self.site.heartbeat(BEAT)
        self.site.dialled(0)
        self.update = create_model(None, LAYOUT)
        self.site.publish(SET, self.update.file, self.update.data_offset, CHUNKS * CHUNK, CHUNK)
        self.out = create_model(None, LAYOUT)
        self.collector = Collector(
            LAYOUT,
            [(b"a", SET, 1)],
            self.out.file,
            self.out.data_offset,
            None,
            CollectorOptions(1 << 24),
        )
        self._wire: list[tuple[float, bytes, bytes | None]] = []
        self._free_at = 0.0
        self._taken = 0

    def step(self) -> None:
        self.now += STEP
        self.site.tick(self.now)
        while (out := self.site.next_out(self.now)) is not None:
            _, head, body = out
            size = len(head) + len(body or b"")
            self._taken += size
            self._free_at = max(self._free_at, self.now) + BEAT * size / self.rate
            self._wire.append((self._free_at, head, None if body is None else bytes(body)))
        while self._wire and self._wire[0][0] <= self.now and not self.cut:
            _, head, body = self._wire.pop(0)
            self.server.deliver(self.now, b"a", head, body)
        self.server.tick(self.now)
        while (out := self.server.next_out(self.now)) is not None:
            if not self.cut:
                self.site.deliver(self.now, b"", out[1], None)
        if not self.held and self.now % BEAT == 0:
            left = max(0.0, self._free_at - self.now) * self.rate / BEAT
            self.site.moved(0, int(self._taken - left), self.now)

    def until_silent(self, limit: int) -> int:
        """Let time pass until the site would dial again; returns how long that took."""
        began = self.now
        while not self.site.silent(self.now):
            assert self.now < began + limit, "it never dials again"
            self.step()
        return self.now - began

    def silent_while_uploading(self) -> bool:
        """Let the server collect the update; returns whether the site would dial again before that is done."""
        self.server.start(self.collector)
        while not self.collector.done:
            self.step()
            if self.site.silent(self.now):
                return True
        return False


def test_a_connection_without_answers_is_given_up_after_five_heartbeats() -> None:
    link = Link(1e6)
    for _ in range(200):
        link.step()
        assert not link.site.silent(link.now)
    link.cut = True
    assert 4 * BEAT <= link.until_silent(PATIENCE) <= PATIENCE


def test_a_connection_that_never_answered_has_longer_and_then_is_given_up_again() -> None:
    link = Link(1e6)
    link.cut = True
    assert link.until_silent(21 * BEAT) > 19 * BEAT
    link.site.dialled(link.now)
    assert link.until_silent(21 * BEAT) > 19 * BEAT


@pytest.mark.parametrize("rate", [20_000.0, 100_000.0, 50e6])
def test_an_upload_behind_a_proxy_that_buffers_is_left_to_move(rate: float) -> None:
    link = Link(rate)
    assert not link.silent_while_uploading()
    assert bytes(link.out.view("w")) == bytes(link.update.view("w"))


def test_an_upload_on_a_very_slow_wire_is_left_alone_while_it_is_acknowledged() -> None:
    link = Link(2500.0)
    link.held = False
    assert not link.silent_while_uploading()


def test_an_upload_that_is_cut_off_at_a_usual_speed_is_given_up_within_seconds() -> None:
    link = Link(1e6)
    assert not link.silent_while_uploading()
    link.server.cancel(link.collector)
    link.out = create_model(None, LAYOUT)
    link.collector = Collector(
        LAYOUT,
        [(b"a", SET, 1)],
        link.out.file,
        link.out.data_offset,
        None,
        CollectorOptions(1 << 24),
    )
    link.server.start(link.collector)
    link.step()
    link.cut = True
    assert link.until_silent(3 * PATIENCE) <= 2 * PATIENCE


def test_bytes_of_a_long_message_are_a_sign_of_life_before_its_end() -> None:
    link = Link(1e6)
    while link.now < 10 * BEAT:
        link.step()
    link.cut = True
    for beat in range(60):
        for _ in range(BEAT // STEP):
            link.step()
        link.site.moved(1000 + beat, 0, link.now)
        assert not link.site.silent(link.now)
    assert link.until_silent(PATIENCE) <= PATIENCE


def test_what_is_asked_for_is_asked_for_again_when_a_site_dials_again() -> None:
    site = Exchange()
    site.heartbeat(BEAT)
    out = create_model(None, LAYOUT)
    site.start(
        Collector(
            LAYOUT, [(b"", SET, 1)], out.file, out.data_offset, None, CollectorOptions(1 << 24)
        )
    )

    def gets() -> int:
        return sum(out[1][5] == 1 for out in iter(lambda: site.next_out(10), None))

    assert gets() == 1
    assert gets() == 0
    site.dialled(10)
    assert gets() == 1
