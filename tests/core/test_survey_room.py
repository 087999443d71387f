"""A survey on a disk that gets full, and in memory that just holds it: the bits of one with plenty of both."""

from __future__ import annotations

import bisect
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore._core import CollectorDone, Spill
from fedcore.errors import ConfigError

from ..support.spilling import CHUNK, CHUNKS, spill_file
from ..support.surveying import Surveyed, mean, surveyed


def test_a_disk_that_gets_full_in_a_survey_costs_a_second_pull_and_nothing_else(
    tmp_path: Path,
) -> None:
    spill = Spill(str(tmp_path / "spill"), CHUNK, extent_bytes=16 * CHUNK)
    federation = Surveyed("abcd", 64 * CHUNK, spill, keep_surveyed=True)
    federation.survey()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40 * CHUNK, hard))
        federation.run("abcd")
        assert spill.used == 32
        assert federation.collector.distances == surveyed("abcd")
        federation.close("abd", {"a": 1, "b": 5, "d": 2}, 3)
        federation.run("abd")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert federation.result() == mean("abd", {"a": 1, "b": 5, "d": 2}, 3)
    twice = [name for (name, _), times in federation.asked.items() if times == 2]
    assert set(twice) == set("abd")
    assert len(twice) <= 3 * CHUNKS - 16  # most of what lay in the 32 slots was not pulled again
    assert max(federation.asked.values()) == 2
    assert [type(event) for event in federation.events()] == [CollectorDone] * 2


@pytest.mark.parametrize("threads", [1, 3])
def test_in_memory_that_just_holds_a_chunk_of_each_update_the_result_is_the_same(
    tmp_path: Path, threads: int
) -> None:
    def opened(chunks: float) -> Surveyed:
        budget = int(chunks * CHUNK)
        return Surveyed("abcde", budget, spill_file(tmp_path), keep_surveyed=True, threads=threads)

    enough = [chunks / 8 for chunks in range(8, 128)]
    least = bisect.bisect_left(enough, True, key=lambda chunks: can(opened, chunks))
    assert 5 < enough[least] < 9
    federation = opened(enough[least])
    federation.survey()
    federation.run("ecabd", 1)
    assert federation.most <= 1
    assert federation.collector.distances == surveyed("abcde")
    federation.close("bde", {"b": 1, "d": 2, "e": 9}, 4)
    federation.run("bde", 2)
    assert federation.result() == mean("bde", {"b": 1, "d": 2, "e": 9}, 4)


def can(opened: Callable[[float], object], chunks: float) -> bool:
    try:
        opened(chunks)
    except ConfigError:
        return False
    return True
