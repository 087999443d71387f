"""The training metrics that sites log: which points of a series are kept, however long it becomes.

A series is one metric of one site, a point one value of it. Points are numbered from 0 as they arrive. The kept
points are those whose number is a multiple of the stride, and four marked ones: the last, the least, the greatest,
and the first that is not finite. The stride is the smallest power of two that keeps the bound. So the kept points
depend on the points seen alone: neither the moments of writing nor a restart changes them.

Nothing here reads or writes a file: `MetricsBuffer.changes` says what a table has to take up, and
`MetricsBuffer.written` that it has done so. One thread uses it. Its memory is bounded: it holds four points of a
series that is written. While nothing can be written, as on a full disk, `MOST_UNWRITTEN` points wait in all.
Beyond that only the first and the marked ones of each series do, and the others will be missing from the table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

__all__ = [
    "MOST_POINTS",
    "MOST_SERIES",
    "MOST_UNWRITTEN",
    "Change",
    "MetricsBuffer",
    "Point",
    "most_names",
    "stride_of",
]

MOST_POINTS: Final = 512
"""Points that are kept of a series."""
MOST_SERIES: Final = 4096
"""Series of a run, shared equally between its sites."""
MOST_UNWRITTEN: Final = 32768
"""Points of a run that wait to be written: more than all sites may log in a second."""
_MOST_NAMES: Final = 64
_LEAST_NAMES: Final = 4
_MARKED: Final = 4


class Point(NamedTuple):
    """One value.

    Attributes:
        seq: its number in its series, from 0.
        round, step: where the site was; no step came with the metrics of an update.
        time: when the server got it, in seconds since the epoch; shown, never compared.
        value: may be NaN or infinite.
    """

    seq: int
    round: int
    step: int | None
    time: float
    value: float


@dataclass(frozen=True)
class Change:
    """What a table has to take up of one series: first the removals, then the new points.

    Attributes:
        removed: numbers of points that are no longer kept.
        stride: if not 0, remove all points too whose number is no multiple of it and is not in ``marked``.
    """

    site: str
    name: str
    points: tuple[Point, ...]
    removed: tuple[int, ...]
    stride: int
    marked: tuple[int, ...]


def most_names(sites: int) -> int:
    """Return how many series each of so many sites may have."""
    return min(_MOST_NAMES, max(_LEAST_NAMES, MOST_SERIES // max(1, sites)))


def stride_of(count: int, most: int = MOST_POINTS) -> int:
    """Return of how many points one is kept in a series of ``count`` points, where ``most`` are kept."""
    stride = 1
    while (count - 1) // stride + 1 > most - _MARKED:
        stride *= 2
    return stride


class _Series:
    """The state of one series; `most` points of it are kept."""

    __slots__ = (
        "_loose",
        "_most",
        "_thinned",
        "broken",
        "count",
        "fresh",
        "greatest",
        "last",
        "least",
        "stride",
    )

    def __init__(self, most: int) -> None:
        self._most = most
        self._loose: set[int] = set()  # points in the table that a later one may replace
        self._thinned = False
        self.count = 0
        self.stride = 1
        self.last: Point | None = None
        self.least: Point | None = None
        self.greatest: Point | None = None
        self.broken: Point | None = None
        self.fresh: dict[int, Point] = {}

    def resume(self, points: Iterable[Point]) -> None:
        """Go on from points that a table holds, in order: the marked ones, and all that are off the stride."""
        seqs = []
        for point in points:
            self._mark(point)
            self.count = point.seq + 1
            seqs.append(point.seq)
        self.stride = stride_of(self.count, self._most)
        self._loose = {seq for seq in seqs if seq % self.stride}

    def add(
        self, round_: int, step: int | None, time: float, value: float, *, full: bool = False
    ) -> None:
        """Add a point; ``full``: what was the last one no longer waits, unless it is marked or the first."""
        before = (self.last, self.least, self.greatest)
        point = Point(self.count, round_, step, time, value)
        self.count += 1
        self.fresh[point.seq] = point
        self._mark(point)
        marked = self.marked
        stride = stride_of(self.count, self._most)
        if stride != self.stride:
            self.stride, self._thinned = stride, True
            kept = [s for s in self.fresh if s % self.stride == 0 or s in marked]
            self.fresh = {seq: self.fresh[seq] for seq in kept}
        for old in before:
            if old is None or old.seq in marked:
                continue
            if old.seq % self.stride or (full and old.seq):
                self.fresh.pop(old.seq, None)

    def _mark(self, point: Point) -> None:
        self.last = point
        if not math.isfinite(point.value):
            self.broken = self.broken or point
            return
        if self.least is None or point.value < self.least.value:
            self.least = point
        if self.greatest is None or point.value > self.greatest.value:
            self.greatest = point

    @property
    def marked(self) -> set[int]:
        """The numbers of the points that are kept whatever the stride."""
        found = (self.last, self.least, self.greatest, self.broken)
        return {point.seq for point in found if point is not None}

    def change(self, site: str, name: str) -> Change:
        marked = self.marked
        return Change(
            site,
            name,
            tuple(self.fresh.values()),
            tuple(sorted(self._loose - marked)),
            self.stride if self._thinned else 0,
            tuple(sorted(marked)),
        )

    def written(self) -> None:
        self.fresh.clear()
        self._thinned = False
        self._loose = {seq for seq in self.marked if seq % self.stride}


class MetricsBuffer:
    """The series of a run.

    Args:
        names: series that a site may have; values of further names are not kept.
        points: points that are kept of each.
    """

    def __init__(self, names: int = _MOST_NAMES, points: int = MOST_POINTS) -> None:
        self._names = names
        self._points = points
        self._sites: dict[str, dict[str, _Series]] = {}
        self._changed: dict[tuple[str, str], _Series] = {}
        self._left_out: set[str] = set()
        self._unwritten = 0

    def resume(self, site: str, name: str, points: Iterable[Point]) -> None:
        """Take up a series that a table holds, its points in order."""
        series = self._sites.setdefault(site, {})[name] = _Series(self._points)
        series.resume(points)

    def add(
        self, site: str, round_: int, step: int | None, time: float, metrics: Mapping[str, float]
    ) -> list[str]:
        """Add a value to each series of a site; returns the names that are not kept, once for each site."""
        known = self._sites.setdefault(site, {})
        beyond = []
        for name, value in metrics.items():
            series = known.get(name)
            if series is None:
                if len(known) >= self._names:
                    beyond.append(name)
                    continue
                series = known[name] = _Series(self._points)
            before = len(series.fresh)
            series.add(round_, step, time, value, full=self._unwritten >= MOST_UNWRITTEN)
            self._unwritten += len(series.fresh) - before
            self._changed[site, name] = series
        if not beyond or site in self._left_out:
            return []
        self._left_out.add(site)
        return beyond

    @property
    def changed(self) -> bool:
        """Whether there is something to write."""
        return bool(self._changed)

    def changes(self) -> Iterator[Change]:
        """Yield what a table has to take up; nothing is forgotten before `written`."""
        for (site, name), series in self._changed.items():
            yield series.change(site, name)

    def written(self) -> None:
        """Note that the table has taken up all of `changes`."""
        for series in self._changed.values():
            series.written()
        self._changed.clear()
        self._unwritten = 0
