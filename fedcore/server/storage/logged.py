"""Logged training metrics in a run's journal: the table of kept points, written seldom and read by anyone."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from fedcore import protocol
from fedcore.errors import IntegrityError, StorageError

from .journal import Journal
from .metrics import Change, MetricsBuffer, Point, most_names, stride_of

__all__ = ["PAGE_BYTES", "Logged", "Rows", "Series", "read_points", "read_series", "summarise"]

WRITE_SECONDS: Final = 1.0
"""Time between two transactions that hold nothing but points: what a killed server loses at most."""

_PAGE_SERIES: Final = 64
_PAGE_POINTS: Final = 2048
PAGE_BYTES: Final = 256 << 10
"""About how large a message of `Logged.page` is at most."""

Rows = Callable[..., list[tuple[Any, ...]]]
"""Runs a query with its values on a journal."""

logger = logging.getLogger("fedcore.server")


class Logged:
    """Keeps what sites log. Points are written with the run's commits, and at most once a second in between.

    Args:
        journal: the run's journal.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self._buffer = MetricsBuffer()
        self._ids: dict[tuple[str, str], int] = {}
        self._new_ids: dict[tuple[str, str], int] = {}
        self._next_write = 0.0
        self._failed = ""

    def open(self, sites: int) -> None:
        """Go on from what the table holds, for a run of so many sites."""
        self._buffer = MetricsBuffer(most_names(sites))
        for id_, site, name in read_series(self.journal.rows):
            self._ids[site, name] = id_
            self._buffer.resume(site, name, _read_ends(self.journal.rows, id_))

    def add(
        self, site: str, round_: int, step: int | None, metrics: Mapping[str, float]
    ) -> list[str]:
        """Keep values of a site; returns the names that are not kept, once for each site."""
        return self._buffer.add(site, round_, step, time.time(), metrics)

    def write_if_due(self, now: float) -> None:
        """Write the points of the last second, unless another process has the journal locked.

        Args:
            now: seconds of a monotonic clock.

        Raises:
            IntegrityError: the journal was replaced by another file.
        """
        if now < self._next_write or not self._buffer.changed:
            return
        self._next_write = now + WRITE_SECONDS
        try:
            if self.journal.try_transaction(self._write):
                self._written()
                self._failed = ""
        except IntegrityError:
            raise
        except StorageError as error:  # as where the disk is full: the points are written later
            if str(error) != self._failed:
                logger.warning("logged metrics wait in memory: %s", error)
            self._failed = str(error)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Give a transaction of the journal that writes the points as well; errors as its own."""
        with self.journal.transaction():
            yield
            self._write()
        self._written()

    def _written(self) -> None:
        self._buffer.written()
        self._ids |= self._new_ids

    def _write(self) -> None:
        self._new_ids = {}  # a transaction that failed has made none
        db, changes = self.journal.db, [(self._id(c), c) for c in self._buffer.changes()]
        gone = [(id_, seq) for id_, change in changes for seq in change.removed]
        db.executemany("DELETE FROM points WHERE series = ? AND seq = ?", gone)
        for id_, change in changes:
            if change.stride:
                marks = ",".join("?" * len(change.marked))
                db.execute(
                    f"DELETE FROM points WHERE series = ? AND seq % ? != 0 AND seq NOT IN ({marks})",
                    (id_, change.stride, *change.marked),
                )
        db.executemany(
            "INSERT OR REPLACE INTO points VALUES (?, ?, ?, ?, ?, ?)",
            [(id_, *point) for id_, change in changes for point in change.points],
        )

    def _id(self, change: Change) -> int:
        """Return the number of a series in the table, within a transaction."""
        key = (change.site, change.name)
        if key in self._ids:
            return self._ids[key]
        made = self.journal.db.execute("INSERT INTO series (site, name) VALUES (?, ?)", key)
        assert made.lastrowid is not None
        self._new_ids[key] = made.lastrowid
        return made.lastrowid

    def page(self, after: int) -> protocol.MetricsReply:
        """Return the written points of the series after number ``after``, as many as a message should hold."""
        rows = self.journal.rows
        query = "SELECT id, site, name FROM series WHERE id > ? ORDER BY id LIMIT ?"
        found = rows(query, after, _PAGE_SERIES)
        series: list[protocol.MetricSeries] = []
        count, last = 0, 0
        for last, site, name in found:
            points = read_points(rows, last)
            count += len(points)
            series.append(
                protocol.MetricSeries(site=site, name=name, points=[(*p,) for p in points])
            )
            if count >= _PAGE_POINTS:
                break
        over = len(found) < _PAGE_SERIES and len(series) == len(found)
        return protocol.MetricsReply(after=after, last=0 if over else last, series=series)

    def summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Write what waits, and return each series in short, by site and name."""
        if self._buffer.changed:
            with self.transaction():
                pass
        rows = self.journal.rows
        return {
            site: {name: summarise(_read_ends(rows, id_)) for id_, _, name in series}
            for site, series in groupby(read_series(rows), key=lambda found: found[1])
        }

    def drop_after(self, round_: int) -> None:
        """Within a transaction: remove the points of later rounds, as the run goes back to ``round_``."""
        db = self.journal.db
        db.execute("DELETE FROM points WHERE round > ?", (round_,))
        db.execute("DELETE FROM series WHERE id NOT IN (SELECT series FROM points)")


@dataclass(frozen=True)
class Series:
    """One metric of one site, with the points that are kept of it, in order."""

    site: str
    name: str
    points: list[Point]


def read_series(rows: Rows) -> list[tuple[int, str, str]]:
    """Return number, site and name of each series, by site and name."""
    return [(i, s, n) for i, s, n in rows("SELECT id, site, name FROM series ORDER BY site, name")]


def read_points(rows: Rows, series: int) -> list[Point]:
    """Return the kept points of a series, in order."""
    query = "SELECT seq, round, step, time, value FROM points WHERE series = ? ORDER BY seq"
    return [_point(row) for row in rows(query, series)]


def _point(row: tuple[Any, ...]) -> Point:
    seq, round_, step, at, value = row
    return Point(seq, round_, step, at, math.nan if value is None else value)  # SQLite has no NaN


_FINITE: Final = "value BETWEEN -1.7976931348623157e308 AND 1.7976931348623157e308"
_ENDS: Final = f"""
SELECT seq, round, step, time, value FROM points WHERE series = ?1 AND (
    seq % ?2 != 0
    OR seq = (SELECT MIN(seq) FROM points WHERE series = ?1)
    OR seq = ?3
    OR seq = (SELECT seq FROM points WHERE series = ?1 AND {_FINITE} ORDER BY value, seq LIMIT 1)
    OR seq = (SELECT seq FROM points WHERE series = ?1 AND {_FINITE} ORDER BY value DESC, seq LIMIT 1)
    OR seq = (SELECT seq FROM points WHERE series = ?1 AND ({_FINITE}) IS NOT TRUE ORDER BY seq LIMIT 1))
ORDER BY seq
"""


def _read_ends(rows: Rows, series: int) -> list[Point]:
    """Return the first point of a series, the marked ones, and those off its stride, in order.

    That is all that `summarise` and a server that goes on need, and far less to read than all points.
    """
    ((last,),) = rows("SELECT MAX(seq) FROM points WHERE series = ?", series)
    if last is None:
        return []
    return [_point(row) for row in rows(_ENDS, series, stride_of(last + 1), last)]


def summarise(points: list[Point]) -> dict[str, Any]:
    """Return a series in short: how many points there were, the ends, the extremes, and where it broke.

    Args:
        points: those that are kept, in order, at least one; those between the ends and extremes may be missing.
    """
    finite = [point.value for point in points if math.isfinite(point.value)]
    broken = next((point for point in points if not math.isfinite(point.value)), None)
    return {
        "count": points[-1].seq + 1,
        "first": points[0].value,
        "last": points[-1].value,
        "min": min(finite, default=None),
        "max": max(finite, default=None),
        "not_finite": broken and {"round": broken.round, "step": broken.step},
    }
