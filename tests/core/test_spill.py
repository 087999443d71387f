"""Sites that are ahead and sites that are lost, without sockets: the bytes are those of the survivors, always."""

from __future__ import annotations

import itertools
import os
import random
import resource
from pathlib import Path

import pytest

from fedcore._core import CollectorDone, NoRoom, SourceRejected, Spill

from ..support.spilling import CHUNK, CHUNKS, Federation, alone, spill_file


@pytest.mark.parametrize("window", [1, 2, 9])
def test_a_site_that_is_ahead_is_pulled_to_its_end_while_another_sends_nothing(
    tmp_path: Path, window: int
) -> None:
    spill = spill_file(tmp_path)
    federation = Federation("abc", 3 * window * CHUNK, spill)
    federation.run("ac")
    assert federation.collector.window == window
    assert federation.collector.progress() == (0, CHUNKS, [CHUNKS, 0, CHUNKS])
    assert federation.most <= window
    assert spill.used >= 2 * (CHUNKS - window)
    federation.run("abc")
    assert federation.result() == alone("abc")
    assert set(federation.asked.values()) == {1}
    federation.server.cancel(federation.collector)
    assert spill.used == 0
    size = spill.file_bytes
    again = Federation("abc", 3 * window * CHUNK, spill)
    again.run("bc")
    again.run("abc")
    assert (again.result(), spill.file_bytes) == (federation.result(), size)


def test_chunks_of_many_sites_are_read_back_one_by_one_with_the_same_bits(tmp_path: Path) -> None:
    names = "abcdefgh"
    spill = spill_file(tmp_path)
    federation = Federation(names, 2 * len(names) * CHUNK, spill)
    federation.run(names.replace("d", ""))
    assert spill.used >= (len(names) - 1) * (CHUNKS - 2)
    federation.run(names)
    assert federation.result() == alone(names)
    assert {times for (name, _), times in federation.asked.items() if name != "d"} == {1}


def test_without_a_spill_file_a_site_that_is_ahead_is_held_back(tmp_path: Path) -> None:
    federation = Federation("abc", 3 * 4 * CHUNK)
    federation.run("ac")
    assert federation.collector.progress() == (0, CHUNKS, [4, 0, 4])
    federation.run("abc")
    assert federation.result() == alone("abc")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rest", [0, 1, 2])
def test_what_the_windows_leave_of_the_budget_goes_to_the_first_sites(rest: int) -> None:
    federation = Federation("abc", (3 * 4 + rest) * CHUNK)
    federation.run("ab")
    here = [4 + (rest > 0), 4 + (rest > 1), 0]
    assert federation.collector.progress() == (0, CHUNKS, here)
    federation.run("abc")
    assert federation.result() == alone("abc")


def test_a_window_that_is_full_for_a_moment_spills_nothing(tmp_path: Path) -> None:
    federation = Federation("abc", 3 * 4 * CHUNK, spill := spill_file(tmp_path))
    dice, turns = random.Random(1), itertools.cycle("aaaabbbbcccc")
    while not federation.collector.done:
        federation.step(dice, next(turns))
    assert spill.file_bytes == 0
    assert list(tmp_path.iterdir()) == []


def test_where_the_disk_has_no_room_sites_are_held_back_and_it_is_said_once(
    tmp_path: Path,
) -> None:
    federation = Federation("abc", 3 * 4 * CHUNK, spill_file(tmp_path, keep_free=1 << 60))
    federation.run("ac")
    assert federation.collector.progress()[2] == [4, 0, 4]
    assert [type(event) for event in federation.events()] == [NoRoom]
    federation.run("abc")
    assert federation.result() == alone("abc")
    assert [type(event) for event in federation.events()] == [CollectorDone]


def test_the_last_room_of_a_disk_is_taken_though_it_is_less_than_the_file_grows_by(
    tmp_path: Path,
) -> None:
    disk = os.statvfs(tmp_path)
    free = disk.f_bavail * disk.f_frsize
    spill = Spill(str(tmp_path / "spill"), 1 << 23, free // 2, extent_bytes=free)
    federation = Federation("abc", 3 * 4 * CHUNK, spill)
    federation.run("a")
    assert spill.used > CHUNKS // 2
    assert federation.events() == []


@pytest.mark.parametrize("spilling", [False, True], ids=["held back", "spilled"])
@pytest.mark.parametrize("seed", range(8))
def test_a_site_lost_at_any_point_leaves_the_aggregate_of_the_others(
    tmp_path: Path, seed: int, spilling: bool
) -> None:
    dice = random.Random(seed)
    spill = spill_file(tmp_path) if spilling else None
    federation = Federation("abcd", 4 * 3 * CHUNK, spill)
    federation.run(dice.choice(["abcd", "abd"]), seed, until=dice.randrange(CHUNKS))
    lost = dice.choice("abcd")
    federation.run("abcd", seed, until=dice.randrange(1, CHUNKS))
    federation.lose(lost)
    left = "abcd".replace(lost, "")
    federation.run(left, seed, until=dice.randrange(CHUNKS))
    if seed % 2:
        federation.lose(left[0])
        left = left[1:]
    federation.run(left, seed)
    assert federation.result() == alone(left)
    assert federation.collector.checksums == federation.out.checksums()


def test_when_a_site_is_lost_what_was_not_reduced_yet_is_not_sent_again() -> None:
    federation = Federation("abc", 3 * 4 * CHUNK)
    federation.run("abc", until=CHUNKS // 2)
    reduced = federation.collector.progress()[0]
    federation.lose("b")
    federation.run("ac")
    assert federation.result() == alone("ac")
    twice = {index for (name, index), times in federation.asked.items() if times > 1}
    assert twice == set(range(reduced))
    assert max(federation.asked.values()) == 2


def test_when_a_site_is_lost_what_was_spilled_is_not_sent_again(tmp_path: Path) -> None:
    federation = Federation("abc", 3 * 4 * CHUNK, spill_file(tmp_path))
    federation.run("ac")  # all of it but for a window lies in the spill file
    federation.run("b", until=CHUNKS // 2)
    federation.lose("b")
    federation.run("ac")
    assert federation.result() == alone("ac")
    assert sum(times - 1 for times in federation.asked.values()) <= 2 * 4


def test_a_site_that_is_rejected_in_the_middle_is_named_and_left_out(tmp_path: Path) -> None:
    bad = CHUNKS // 2
    federation = Federation("abc", 3 * 4 * CHUNK, spill_file(tmp_path), b=bad)
    federation.run("abc")
    assert federation.collector.progress()[0] == bad
    (event,) = federation.events()
    assert isinstance(event, SourceRejected)
    assert (event.source, event.code) == (1, "nonfinite")
    federation.lose("b")
    federation.run("ac")
    assert federation.result() == alone("ac")


def test_a_disk_that_fills_up_in_mid_run_holds_sites_back_and_changes_no_bit(
    tmp_path: Path,
) -> None:
    window, slots = 4, 32
    spill = Spill(str(tmp_path / "spill"), CHUNK, extent_bytes=16 * CHUNK)
    federation = Federation("abc", 3 * window * CHUNK, spill)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40 * CHUNK, hard))
        federation.run("ac")
        (event,) = federation.events()
        assert isinstance(event, NoRoom)
        assert str(tmp_path / "spill") in event.message
        assert (spill.used, spill.file_bytes) == (slots, slots * CHUNK)
        reduced, _, here = federation.collector.progress()
        assert (reduced, here[1]) == (0, 0)
        assert slots < here[0] + here[2] <= slots + 2 * window
        federation.run("abc")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert federation.most <= window
    assert federation.result() == alone("abc")
    assert [type(event) for event in federation.events()] == [CollectorDone]
    assert set(federation.asked.values()) == {1}


def test_what_was_reduced_gives_its_place_to_what_was_not(tmp_path: Path) -> None:
    spill = Spill(str(tmp_path / "spill"), CHUNK, extent_bytes=16 * CHUNK)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40 * CHUNK, hard))
        federation = Federation("abc", 3 * 2 * CHUNK, spill)
        federation.run("a")
        dice, turns = random.Random(1), itertools.cycle("bc")
        while federation.collector.progress()[0] < 12:
            federation.step(dice, next(turns))
        federation.run("ab")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert spill.file_bytes == 32 * CHUNK
    free_at_first = 32 - (CHUNKS - 2)
    assert federation.collector.progress()[2][1] >= 12 + free_at_first + 10
    assert [type(event) for event in federation.events()] == [NoRoom]
    federation.run("abc")
    assert federation.result() == alone("abc")


def test_a_leftover_of_a_killed_process_is_removed_and_never_read(tmp_path: Path) -> None:
    (tmp_path / "spill").write_bytes(b"not mine" * CHUNK)
    spill = spill_file(tmp_path)
    assert list(tmp_path.iterdir()) == []
    federation = Federation("ab", 2 * CHUNK, spill)
    federation.run("a")
    assert (tmp_path / "spill").stat().st_size == spill.file_bytes
    federation.run("ab")
    assert federation.result() == alone("ab")
    federation.server.cancel(federation.collector)
    del federation, spill
    assert list(tmp_path.iterdir()) == []
