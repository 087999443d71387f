"""Whether a disk holds what a survey keeps: looked at before the round, said once, and the round goes on."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedcore._core import Codec, Layout
from fedcore.config import RunConfig, parse_run
from fedcore.server import spill_room
from fedcore.server.collecting import Collecting
from fedcore.server.spill_room import lack_of_room, room_for_updates, update_bytes

LAYOUT = Layout([("w", "F32", [300_000]), ("h", "BF16", [70_001]), ("n", "I64", [100])], 1 << 16)
FREE = 1 << 30


def config(folder: Path, rule: str = "multi-krum", **server: Any) -> RunConfig:
    values = {
        "run": {"name": "t", "rounds": 2},
        "participants": {"count": 5},
        "aggregation": {"rule": rule},
        "server": {"listen": "tcp://127.0.0.1:0", "insecure": True, **server},
    }
    return parse_run(values, folder=folder)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the disk has left, in bytes, in a list of one."""
    left = [FREE]
    monkeypatch.setattr(
        spill_room,
        "os",
        SimpleNamespace(statvfs=lambda _: SimpleNamespace(f_bavail=left[0], f_frsize=1)),
    )
    return left


@pytest.mark.parametrize("encoding", ["raw", "bf16", "fp16", "int8", "nf4"])
def test_an_update_takes_no_more_than_is_reckoned_with(encoding: str) -> None:
    codec, taken = Codec(LAYOUT, encoding), 0
    for index in range(LAYOUT.chunk_count):
        size = LAYOUT.chunk_range(index)[1]
        _, body = codec.encode(index, bytes(size), bytes(size))
        taken += -(-len(body) // 4096) * 4096
    assert taken <= update_bytes(LAYOUT, encoding) <= 1.3 * taken + (64 << 10)


def test_what_the_spill_file_has_taken_counts_as_room(tmp_path: Path, free: list[int]) -> None:
    path = tmp_path / "not" / "there" / "spill"
    assert room_for_updates(path, 1 << 20, FREE - (3 << 20)) == 3
    assert room_for_updates(path, 1 << 20, FREE + 1) == 0
    path.parent.mkdir(parents=True)
    path.write_bytes(os.urandom(1 << 20))
    before = path.stat().st_blocks >> 11
    found = room_for_updates(path, 1 << 20, FREE)
    assert found in (before, path.stat().st_blocks >> 11)  # the disk may count it a moment later


@pytest.mark.parametrize(
    ("rule", "spill", "said"),
    [
        ("multi-krum", True, True),
        ("rfa", True, True),
        ("krum", True, False),
        ("mean", True, False),
        ("rfa", False, False),
    ],
)
def test_only_a_rule_that_keeps_updates_needs_room_for_them(
    tmp_path: Path, free: list[int], rule: str, spill: bool, said: bool
) -> None:
    made = config(tmp_path, rule, spill=spill)
    assert not lack_of_room(made, "t", LAYOUT, 0)
    free[0] = 2 * LAYOUT.total_bytes + 3 * update_bytes(LAYOUT, "raw")
    text = lack_of_room(made, "t", LAYOUT, 0)
    assert ("has room for 3 of 5 updates" in text) == said
    assert ("has room for 2 of 5 updates" in lack_of_room(made, "t", LAYOUT, 1)) == said


def test_it_is_said_before_the_round_once_and_taken_back(
    tmp_path: Path, free: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = SimpleNamespace(layout=LAYOUT)
    versions: Any = SimpleNamespace(model=None, optimizer=SimpleNamespace(layouts=lambda _: {}))
    store, link = SimpleNamespace(run_id="t"), SimpleNamespace()
    collecting = Collecting(config(tmp_path), store, versions, link, 0)  # type: ignore[arg-type]
    free[0] = 0
    collecting.look_at_room(0)  # the initial model is one site's
    assert not collecting.no_room
    versions.model = model
    with caplog.at_level(logging.WARNING):
        for round_ in (1, 2):
            collecting.look_at_room(round_)
    assert caplog.text.count("has room for 0 of 5 updates") == 1
    assert "round 1: the disk of the spill file" in caplog.text
    free[0] = FREE
    collecting.look_at_room(3)
    assert not collecting.no_room
