"""Which points of logged training metrics are kept: bounded, and the same however they were written."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from fedcore.server.storage.metrics import (
    MOST_POINTS,
    MOST_SERIES,
    MOST_UNWRITTEN,
    Change,
    MetricsBuffer,
    Point,
    most_names,
)

Rows = dict[int, Point]


def take_up(rows: Rows, change: Change) -> None:
    """Do to a dict what the journal's table does."""
    for seq in change.removed:
        rows.pop(seq, None)
    if change.stride:
        for seq in [s for s in rows if s % change.stride and s not in change.marked]:
            del rows[seq]
    rows.update((point.seq, point) for point in change.points)


def kept(values: Sequence[float], points: int, writes: set[int], restarts: set[int]) -> Rows:
    """Return the table after these values; it is written after some, and the server restarts after others."""
    rows: Rows = {}
    buffer = MetricsBuffer(points=points)
    for seq, value in enumerate(values):
        buffer.add("a", 1, seq, float(seq), {"loss": value})
        if seq in writes | restarts | {len(values) - 1}:
            for change in buffer.changes():
                take_up(rows, change)
                assert len(change.points) <= points
            buffer.written()
            assert not buffer.changed
        if seq in restarts:
            buffer = MetricsBuffer(points=points)
            buffer.resume("a", "loss", [rows[seq] for seq in sorted(rows)])
    return rows


@pytest.mark.parametrize("count", [1, 2, 11, 12, 13, 24, 25, 1000])
def test_a_series_keeps_its_bound_its_ends_and_its_extremes(count: int) -> None:
    chance = random.Random(count)
    values = [chance.gauss(0, 1) for _ in range(count)]
    rows = kept(values, 16, set(), set())
    assert len(rows) <= 16
    assert {0, count - 1, values.index(min(values)), values.index(max(values))} <= rows.keys()
    assert [rows[seq].value for seq in rows] == [values[seq] for seq in rows]
    gaps = [b - a for a, b in zip(sorted(rows), sorted(rows)[1:], strict=False)]
    assert max(gaps, default=1) <= max(1, 2 * count // 12 + 1)


def test_the_kept_points_do_not_depend_on_writes_and_restarts() -> None:
    chance = random.Random(5)
    for count in (5, 30, 100, 700):
        values = [chance.choice([0.0, 1.0, chance.random(), math.nan]) for _ in range(count)]
        expected = kept(values, 16, set(), set())
        for share in (0.05, 0.5, 1.0):
            moments = {seq for seq in range(count) if chance.random() < share}
            again = {seq for seq in moments if chance.random() < 0.3}
            found = kept(values, 16, moments, again)
            assert repr(sorted(found.items())) == repr(sorted(expected.items()))  # NaN as well


def test_the_first_value_that_is_not_finite_is_kept_and_is_no_extreme() -> None:
    values = [1.0] * 100
    values[37], values[38], values[61] = math.nan, math.inf, -math.inf
    rows = kept(values, 16, {50}, {70})
    assert math.isnan(rows[37].value)
    assert len(rows) <= 16


def test_points_that_were_not_written_are_as_few_as_those_that_are_kept() -> None:
    buffer = MetricsBuffer()
    for step in range(10 * MOST_POINTS):
        buffer.add("a", 1, step, 0.0, {"loss": step % 7})
    (change,) = buffer.changes()
    assert len(change.points) <= MOST_POINTS


def test_what_waits_in_all_is_bounded_while_nothing_can_be_written() -> None:
    buffer = MetricsBuffer()
    for step in range(400):
        for site in range(100):
            buffer.add(f"s{site}", 1, step, 0.0, {"loss": float(step % 50 + step // 200)})
    changes = list(buffer.changes())
    assert sum(len(change.points) for change in changes) <= MOST_UNWRITTEN + 4 * len(changes)
    for change in changes:
        assert {0, 249, 399} <= {point.seq for point in change.points}  # least, greatest, last


def test_what_was_not_written_is_written_the_next_time() -> None:
    buffer = MetricsBuffer()
    buffer.add("a", 1, 0, 0.0, {"loss": 1.0})
    first = list(buffer.changes())  # the disk is full: `written` is not called
    buffer.add("a", 1, 1, 0.0, {"loss": 2.0})
    (change,) = buffer.changes()
    assert change.points[: len(first[0].points)] == first[0].points
    assert [point.value for point in change.points] == [1.0, 2.0]


def test_the_names_of_a_site_are_bounded_and_the_others_named_once() -> None:
    buffer = MetricsBuffer(names=2)
    assert buffer.add("a", 1, 0, 0.0, {"x": 1.0, "y": 1.0, "z": 1.0}) == ["z"]
    assert buffer.add("a", 1, 1, 0.0, {"w": 1.0, "x": 2.0}) == []
    assert buffer.add("b", 1, 0, 0.0, {"w": 1.0}) == []
    assert {(c.site, c.name): len(c.points) for c in buffer.changes()} == {
        ("a", "x"): 2,
        ("a", "y"): 1,
        ("b", "w"): 1,
    }


def test_the_sites_of_a_run_share_its_series() -> None:
    assert [most_names(sites) for sites in (0, 1, 64, 128, 10_000)] == [64, 64, 64, 32, 4]
    assert all(sites * most_names(sites) <= MOST_SERIES for sites in (1, 3, 64, 100, 1000))
