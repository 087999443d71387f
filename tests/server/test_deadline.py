"""What has arrived when a round's deadline passes counts, in whatever order it is read."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from fedcore import protocol
from fedcore._core import Layout
from fedcore.clock import ManualClock
from fedcore.config import parse_run
from fedcore.layout import layout_hash, table
from fedcore.model_file import create_model
from fedcore.server.rounds.rounds import Phase, Rounds
from fedcore.server.service import Server
from fedcore.transport.link import Control

from ..support.arriving import Arriving, peer, says

HOUR: Final = 3600.0
LAYOUT = Layout([("w", "F32", [1000])], protocol.DEFAULT_CHUNK_BYTES)


class Stage(NamedTuple):
    server: Server
    link: Arriving
    clock: ManualClock

    @property
    def rounds(self) -> Rounds:
        return self.server.runs[0].rounds

    def hear(self, *messages: Control) -> None:
        """Step through messages that wait, until the run is over."""
        self.link.waiting = list(messages)
        while self.link.waiting and not self.rounds.over:
            self.server.step()

    def pass_deadline(self) -> None:
        """Move the clock past the round's deadline; the time in which sites may join is over before."""
        self.clock.advance(HOUR / 2)
        self.server.step()
        self.clock.advance(HOUR / 2)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    """A server of three sites, two of which a round needs, whose first global model exists."""
    create_model(tmp_path / "start.safetensors", LAYOUT).file.sync()
    config = {
        "run": {"name": "t", "rounds": 3},
        "model": {"initial": "start.safetensors"},
        "participants": {"sites": ["a", "b", "c"], "min_results": 2, "round_deadline": "1h"},
        "server": {"insecure": True},
    }
    link, clock = Arriving(), ManualClock()
    made = Server(parse_run(config, folder=tmp_path), link=link, clock=clock)  # type: ignore[arg-type]
    made.runs[0].attendance.next_look = float("inf")  # these sites send no heartbeats
    made.start()
    yield Stage(made, link, clock)
    made.close()


def joins(*sites: str) -> list[Control]:
    return [
        says(site, message)
        for site in sites
        for message in (
            protocol.Join(version="0", site=site, instance=uuid.uuid4().hex),
            protocol.Declare(tensors=table(LAYOUT)),
        )
    ]


def ready(site: str) -> Control:
    return says(
        site,
        protocol.Ready(
            round=1,
            sets=[protocol.NamedSet(id=peer(site).hex(), layout=layout_hash(LAYOUT))],
            weight=1,
        ),
    )


def test_a_quorum_that_is_met_on_the_deadlines_tick_closes_the_round(stage: Stage) -> None:
    stage.hear(*joins("a", "b", "c"))
    assert stage.rounds.phase is Phase.TRAINING
    stage.pass_deadline()  # it passes now, while two updates wait to be heard
    stage.hear(ready("b"), ready("a"))
    assert stage.rounds.phase is Phase.AGGREGATING
    assert [p.site for p in stage.rounds.collecting] == ["a", "b"]


def test_a_round_below_its_quorum_when_the_deadline_passes_ends_the_run(stage: Stage) -> None:
    stage.hear(*joins("a", "b", "c"))
    stage.pass_deadline()
    stage.hear(ready("b"))
    assert stage.rounds.over


def test_who_sends_without_end_does_not_put_a_deadline_off(stage: Stage) -> None:
    stage.hear(*joins("a", "b", "c"), ready("a"))
    stage.pass_deadline()
    stage.link.recv = lambda _: says("b", protocol.Alive())
    stage.server.step()
    assert stage.rounds.over


def test_a_site_is_noticed_when_it_has_been_silent_for_too_long_and_not_only_at_the_next_look(
    stage: Stage,
) -> None:
    stage.hear(*joins("a", "b", "c"))
    stage.clock.advance(10.3)  # since the sites joined, at 1000 s
    heard = {peer("a"): 1_010_000, peer("b"): 1_007_400, peer("c"): 1_007_000}
    busy = {peer("c"): 1_010_900}  # chunks of it may be on their way
    waited: list[float] = []

    class Data:
        silent_ms = staticmethod(lambda site, now: now - heard[site])
        busy_until = staticmethod(lambda site: busy.get(site, 0))
        forget = staticmethod(lambda site: None)

    stage.link.exchange = Data()
    stage.link.recv = lambda seconds: waited.append(round(seconds, 2))
    stage.server.runs[0].attendance.next_look = 0.0
    for later in (0.0, 0.0, 0.102, 0.0):
        stage.clock.advance(later)
        stage.server.step()
    assert waited == [0.0, 0.1, 0.0, 0.5]  # b was heard 2.9 s before, and may be silent for 3
    states = {member.name: member.state for member in stage.rounds.roster}
    assert [states[name].value for name in "abc"] == ["training", "lost", "training"]
