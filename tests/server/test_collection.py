"""A collection that loses a participant, or gets one back, goes on with what it has."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedcore._core import Exchange, Layout, SourceRejected, SourceStalled, Spill
from fedcore.encoding import EncodedUpdate
from fedcore.model_file import create_model
from fedcore.protocol import read_header
from fedcore.server.collection import Collection, CollectionSetting
from fedcore.server.rounds.actions import Participant
from fedcore.server.service import Server
from fedcore.server.storage.scratch import Scratch
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

from ..support.offering import offer
from ..support.runs import run, run_config

CHUNK = 4096
LAYOUT = Layout([("w", "F32", [20_000])], CHUNK)
PARTICIPANTS = tuple(Participant(name, name.encode().hex() * 16, 1) for name in "ab")


class Sites:
    """Two sites that answer what an exchange asks, up to a number of chunks."""

    def __init__(self) -> None:
        self.server = Exchange()
        self.asked: Counter[tuple[bytes, int]] = Counter()
        self.exchanges: dict[bytes, Exchange] = {}
        for value, participant in enumerate(PARTICIPANTS, 1):
            site, file = Exchange(), create_model(None, LAYOUT)
            file.view("w")[:] = np.full(20_000, value, np.float32).tobytes()
            set_id = bytes.fromhex(participant.set_id)
            offer(site, participant.site, set_id, EncodedUpdate.raw(file))
            self.exchanges[participant.site.encode()] = site

    def carry(self, chunks: int, now: int = 0) -> None:
        self.server.tick(now)
        while chunks and (request := self.server.next_out(now)) is not None:
            peer = request[0]
            site = self.exchanges[peer[:1]]
            site.deliver(0, b"server", request[1], None)
            while (reply := site.next_out(0)) is not None:
                if reply[2] is None:  # it answers a ping
                    self.server.deliver(now, peer, reply[1], None)
                    self.server.tick(now)
                elif chunks:
                    self.asked[peer, read_header(reply[1]).index] += 1
                    self.server.deliver(now, peer, reply[1], bytes(reply[2]))
                    chunks -= 1

    def carry_on(self, begin: int, end: int) -> None:
        """Carry all there is, every 100 ms from one time to another."""
        for now in range(begin, end, 100):
            self.carry(1000, now)


def setting(
    sites: Sites, folder: Path, memory: int = 8 * CHUNK, spill: Spill | None = None
) -> CollectionSetting:
    scratch = Scratch(folder / "m", folder / "record", {}, {})
    return CollectionSetting(sites.server, LAYOUT, scratch, memory, spill=spill)


def result(running: Collection, folder: Path) -> set[float]:
    """End a collection; return the values in its file."""
    running.finish()
    values = load_file(folder / "m")["w"]
    assert values.shape == (20_000,)
    return set(values.tolist())


def test_a_participant_that_comes_back_as_another_process_goes_on_with_the_chunks_it_has_left(
    tmp_path: Path,
) -> None:
    sites = Sites()
    running = Collection.of(setting(sites, tmp_path), PARTICIPANTS, {"a": b"a", "b": b"b"})
    sites.carry(20)
    assert 0 < running.collector.progress()[0] < LAYOUT.chunk_count
    assert running.narrow(PARTICIPANTS, {"a": b"a", "b": b"b, started again"})
    sites.carry(1000, now=5000)  # what was under way is asked for again
    assert running.collector.done
    assert {peer for peer, _ in sites.asked} == {b"a", b"b", b"b, started again"}
    assert max(Counter((p[:1], i) for p, i in sites.asked.elements()).values()) == 1
    assert result(running, tmp_path) == {1.5}


def test_a_silent_participant_that_was_lost_and_comes_back_has_its_silence_begun_anew(
    tmp_path: Path,
) -> None:
    sites, peers = Sites(), {"a": b"a", "b": b"b"}
    running = Collection.of(setting(sites, tmp_path), PARTICIPANTS, peers)
    b, now = sites.exchanges[b"b"], 0
    b.heartbeat(1000)

    def silences(until: int) -> list[int]:
        """Let heartbeats come and no chunk of ``b``; return for how long it was silent at each stall."""
        nonlocal now
        while now < until:
            now += 500
            b.tick(now)
            while (ping := b.next_out(now)) is not None:
                sites.server.deliver(now, b"b", ping[1], None)
            sites.server.tick(now)
            while sites.server.next_out(now) is not None:
                pass
        events = list(iter(sites.server.next_event, None))
        return [e.silent_ms for e in events if isinstance(e, SourceStalled) and e.source == 1]

    before = silences(20_000)
    assert before[-1] > 10_000
    assert running.narrow(PARTICIPANTS, peers)
    assert silences(25_000)[0] > 10_000
    running.lost("b")
    assert running.narrow(PARTICIPANTS, peers)
    assert silences(30_000)[0] < 5000
    running.cancel()


def test_only_participants_that_it_has_and_were_not_rejected_can_go_on(tmp_path: Path) -> None:
    sites = Sites()
    peers = {"a": b"a", "b": b"b", "c": b"c"}
    running = Collection.of(setting(sites, tmp_path), PARTICIPANTS, peers)
    a, b = PARTICIPANTS
    assert not running.narrow((a, Participant("c", "00" * 16, 1)), peers)
    assert not running.narrow((Participant("a", a.set_id, 2),), peers)
    assert not running.narrow((Participant("a", "00" * 16, 1), b), peers)
    assert running.source(1) == b
    running.reject(b)
    assert not running.narrow((a, b), peers)
    assert running.narrow((a,), peers)
    assert not running.narrow((b,), peers)
    sites.carry(1000)
    assert result(running, tmp_path) == {1.0}


PEERS = {"a": b"a", "b": b"b"}


@pytest.mark.parametrize("spilling", [True, False])
def test_an_update_is_pulled_ahead_and_each_chunk_of_it_asked_for_once(
    tmp_path: Path, spilling: bool
) -> None:
    sites = Sites()
    spill = Spill(str(tmp_path / "spill"), CHUNK) if spilling else None
    running = Collection(setting(sites, tmp_path, spill=spill), expected=2)
    a, b = PARTICIPANTS
    running.offer(b, b"b")
    sites.carry_on(0, 30_000)
    here = running.collector.progress()[2]
    assert here == [LAYOUT.chunk_count if spilling else 4]  # its half of the memory
    assert not running.collector.done
    assert not (tmp_path / "m").exists()
    running.close((a, b), PEERS)
    sites.carry_on(30_000, 60_000)
    assert running.collector.done
    assert set(sites.asked.values()) == {1}
    assert len(sites.asked) == 2 * LAYOUT.chunk_count
    assert result(running, tmp_path) == {1.5}


def test_what_was_pulled_ahead_of_a_site_that_does_not_count_leaves_no_trace(
    tmp_path: Path,
) -> None:
    sites = Sites()
    spill = Spill(str(tmp_path / "spill"), CHUNK)
    running = Collection(setting(sites, tmp_path, spill=spill), expected=2)
    a, b = PARTICIPANTS
    running.offer(b, b"b")
    sites.carry_on(0, 30_000)
    assert spill.used > 0
    running.close((a,), PEERS)
    assert spill.used == 0
    assert running.source(0) == a
    sites.carry_on(30_000, 60_000)
    assert result(running, tmp_path) == {1.0}


def test_a_process_that_takes_the_place_of_one_that_was_pulled_ahead_counts_instead(
    tmp_path: Path,
) -> None:
    sites = Sites()
    running = Collection(setting(sites, tmp_path), expected=2)
    a, b = PARTICIPANTS
    running.offer(Participant("a", b.set_id, 3), b"b, not a")  # a's first process has b's values
    running.offer(b, b"b")
    sites.carry(5)
    running.offer(a, b"a")
    running.offer(a, b"a")
    running.close((a, b), PEERS)
    assert [running.source(n) for n in range(2)] == [a, b]
    sites.carry(1000, 5000)
    assert result(running, tmp_path) == {1.5}


def test_of_a_site_that_makes_new_updates_without_end_few_are_pulled_and_the_last_one_counts(
    tmp_path: Path,
) -> None:
    sites, peers = Sites(), {"a": b"a", "b": b"b"}
    running, pulled = Collection(setting(sites, tmp_path), 2), 0
    for number in range(1000):
        if running.wants("a"):
            running.offer(Participant("a", f"{number:032x}", 1), b"a")
            pulled += 1
    assert running.wants("b")
    running.offer(PARTICIPANTS[1], b"b")
    assert pulled < 20
    running.close(PARTICIPANTS, peers)
    sites.carry(1000)
    assert running.collector.done
    assert result(running, tmp_path) == {1.5}


def test_a_site_that_comes_back_while_it_is_pulled_ahead_is_asked_under_its_new_address(
    tmp_path: Path,
) -> None:
    sites = Sites()
    running = Collection(setting(sites, tmp_path), expected=2)
    a, b = PARTICIPANTS
    running.offer(b, b"b")
    sites.carry(2)
    running.lost("b")
    running.offer(b, b"b, again")
    running.close((a, b), {"a": b"a", "b": b"b, again"})
    sites.carry(1000)
    assert result(running, tmp_path) == {1.5}
    assert {peer for peer, _ in sites.asked} == {b"a", b"b", b"b, again"}


def test_an_update_that_failed_while_its_site_was_gone_is_pulled_again_once_it_is_back(
    tmp_path: Path,
) -> None:
    sites = Sites()
    running = Collection(setting(sites, tmp_path), expected=2)
    a, b = PARTICIPANTS
    running.offer(b, b"b")
    sites.carry(1)
    running.lost("b")
    as_it_was = sites.exchanges[b"b"]
    sites.exchanges[b"b"] = Exchange()  # which says that it has no such set
    sites.carry_on(0, 10_000)
    events = iter(sites.server.next_event, None)
    (rejected,) = (e for e in events if isinstance(e, SourceRejected))
    assert running.source(rejected.source) == b
    running.reject(b)
    sites.exchanges[b"b"] = as_it_was
    for _ in range(2):
        assert running.offer(b, b"b")
    assert running.close((a, b), PEERS)
    sites.carry_on(10_000, 40_000)
    assert result(running, tmp_path) == {1.5}


def test_a_site_that_offers_one_update_after_another_takes_one_place_and_the_last_counts(
    tmp_path: Path,
) -> None:
    sites = Sites()
    running = Collection(setting(sites, tmp_path), expected=2)
    a, b = PARTICIPANTS
    for number in range(100):
        assert running.offer(Participant("b", f"{number:032x}", 1), b"b")
        assert running.offer(Participant("b", b.set_id, 3), b"b")
    assert running.offer(b, b"b")
    assert running.offer(b, b"b, elsewhere")
    assert len(running.collector.progress()[2]) == 1
    assert running.close((a, b), {"a": b"a", "b": b"b, elsewhere"})
    sites.carry_on(0, 10_000)
    assert result(running, tmp_path) == {1.5}
    assert {peer for peer, _ in sites.asked} == {b"a", b"b, elsewhere"}


def test_sites_that_are_gone_make_room_for_those_that_take_their_places(tmp_path: Path) -> None:
    sites, budget = Sites(), 8
    running = Collection(setting(sites, tmp_path, memory=budget * CHUNK), expected=2)
    a, b = PARTICIPANTS
    for number in range(10):
        running.offer(Participant(f"{number}", b.set_id, 1), b"b%d" % number)
        sites.carry_on(0, 3000)
        assert sum(running.collector.progress()[2]) <= budget
        if number:
            running.lost(f"{number}")
    still_there = Participant("0", b.set_id, 1)
    assert running.offer(a, b"a")
    assert not running.offer(b, b"b")
    assert not running.close((a, b, still_there), {"a": b"a", "b": b"b", "0": b"b0"})
    assert running.open
    running.cancel()


def test_of_all_that_is_here_a_few_chunks_are_reduced_at_a_time(tmp_path: Path) -> None:
    sites = Sites()
    running = Collection(setting(sites, tmp_path, memory=2 * 20 * CHUNK), expected=2)
    for participant in PARTICIPANTS:
        running.offer(participant, participant.site.encode())
    sites.carry(1000)
    assert running.collector.progress()[2] == [LAYOUT.chunk_count] * 2
    running.close(PARTICIPANTS, PEERS)
    at_once = []
    while not running.collector.done:
        before = running.collector.progress()[0]
        assert sites.server.tick(0) == (-1 if running.collector.done else 0)
        at_once.append(running.collector.progress()[0] - before)
    assert at_once == [16, 4]
    assert result(running, tmp_path) == {1.5}


def test_what_a_killed_server_had_pulled_ahead_is_not_asked_for_again(tmp_path: Path) -> None:
    sites = Sites()
    first = Collection(
        setting(sites, tmp_path, spill=Spill(str(tmp_path / "spill"), CHUNK)), expected=2
    )
    a, b = PARTICIPANTS
    first.offer(b, b"b")
    sites.carry_on(0, 30_000)
    for name in ("spill", "spill-index"):  # what the disk holds when the process is killed
        shutil.copy(tmp_path / name, tmp_path / f"left-{name}")
    sites.server = Exchange()
    again = Collection(
        setting(sites, tmp_path, spill=Spill(str(tmp_path / "left-spill"), CHUNK)), expected=2
    )
    again.offer(b, b"b")
    sites.carry_on(30_000, 60_000)
    again.close((a, b), PEERS)
    sites.carry_on(60_000, 90_000)
    twice = sum(count - 1 for count in sites.asked.values())
    assert twice <= 4  # what was in memory: its window
    assert result(again, tmp_path) == {1.5}


def test_nothing_is_pulled_ahead_where_memory_does_not_hold_a_chunk_of_each_site(
    tmp_path: Path,
) -> None:
    sites = Sites()
    running = Collection(setting(sites, tmp_path, memory=3 * CHUNK), expected=4)
    running.offer(PARTICIPANTS[1], b"b")
    sites.carry_on(0, 30_000)
    assert not sites.asked
    running.close(PARTICIPANTS, PEERS)
    sites.carry_on(30_000, 60_000)
    assert result(running, tmp_path) == {1.5}


@pytest.mark.parametrize("spill", [True, False])
def test_an_update_is_pulled_while_another_site_trains(tmp_path: Path, spill: bool) -> None:
    chunks, mib = 24, 1 << 20
    config = run_config(tmp_path, sites=["a", "b"], rounds=2)
    memory = config.server.model_copy(update={"memory": 16 * mib, "spill": spill})
    server = Server(config.model_copy(update={"server": memory}))
    here: list[int] = []

    def pulled() -> int:
        """Return how many chunks of a's update are at the server."""
        running = server.runs[0].collecting.running
        return running.collector.progress()[2][0] if running is not None and running.open else 0

    def wait() -> None:
        """Train until as much of a's update is there as may be, and no more has come for half a second."""
        deadline, since = time.monotonic() + 200, time.monotonic()
        before = 0
        while time.monotonic() < deadline:
            now = pulled()
            if now != before:
                before, since = now, time.monotonic()
            if before == chunks or (before and not spill and time.monotonic() > since + 0.5):
                break
            time.sleep(0.01)
        here.append(before)

    def site(name: str, step: float) -> Callable[[], int]:
        def part() -> int:
            session = Session(SiteSettings(server=server.endpoint, site=name, connect_timeout=200))
            size = chunks * mib
            while session.is_running():
                specs = [("w", "F32", [size // 4])]
                model = session.begin(specs, {}, lambda _: bytes(size))
                if model.kind == "evaluate":
                    session.end_task()
                    continue
                values = np.frombuffer(model.tensors["w"], np.float32) + np.float32(step)
                if name == "b":
                    wait()
                session.submit(lambda _, values=values: values.tobytes(), 1)
            session.close()
            return 0

        return part

    ended, _ = run(server, site("a", 1), site("b", 2))
    assert ended.ok
    assert len(here) == 2
    if spill:
        assert here == [chunks, chunks]
    else:
        assert all(0 < count < chunks for count in here)
    model = load_file(tmp_path / "runs/t/final/model.safetensors")
    assert set(model["w"].tolist()) == {3.0}
    assert server.link.exchange.stats()["bytes_in"] < (5 * chunks + 4) * mib  # nothing came twice


@pytest.mark.parametrize("spill", [True, False])
def test_an_update_with_nan_in_its_middle_leaves_the_mean_of_the_others(
    tmp_path: Path, spill: bool
) -> None:
    count, bad, mib = 24, 12, 1 << 20
    config = run_config(tmp_path, sites=["a", "b", "c"], rounds=1, min_results=2)
    memory = config.server.model_copy(update={"memory": 16 * mib, "spill": spill})
    server = Server(config.model_copy(update={"server": memory}))

    def site(name: str, value: float) -> Callable[[], int]:
        def part() -> int:
            values = np.full(count * mib // 4, value, np.float32)
            session = Session(SiteSettings(server=server.endpoint, site=name, connect_timeout=200))
            while session.is_running():
                specs = [("w", "F32", [values.size])]
                model = session.begin(specs, {}, lambda _: bytes(values.nbytes))
                if model.kind == "evaluate":
                    session.end_task()
                    continue
                if name == "c":
                    values[bad * mib // 4] = np.nan
                session.submit(lambda _: values.tobytes(), 1)
            session.close()
            return 0

        return part

    ended, _ = run(server, site("a", 1), site("b", 2), site("c", 3))
    assert ended.ok
    model = load_file(tmp_path / "runs/t/final/model.safetensors")
    assert set(model["w"].tolist()) == {1.5}
    assert list((tmp_path / "runs/t").glob(".*.spill")) == []
