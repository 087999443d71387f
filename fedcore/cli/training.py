"""Logged training metrics as a table, as JSON and as CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from rich.table import Table
from rich.text import Text

from fedcore.protocol import strict_json
from fedcore.server.storage.logged import Series, summarise

__all__ = ["as_json", "table", "write_csv"]

_COLUMNS: Final = ("site", "metric", "points", "first", "last", "min", "max", "at")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def table(series: Sequence[Series]) -> Table:
    """Draw a line for each series: the count of its points, the ends, the extremes, and where the last one was."""
    drawn = Table(*_COLUMNS)
    for one in series:
        short, last = summarise(one.points), one.points[-1]
        step = "" if last.step is None else f", step {last.step:,}"
        drawn.add_row(
            one.site,
            Text(one.name),
            f"{short['count']:,}",
            *(_number(short[key]) for key in ("first", "last", "min", "max")),
            f"round {last.round}{step}",
            style="red" if not math.isfinite(last.value) else "",
        )
    return drawn


def as_json(series: Sequence[Series]) -> str:
    """Return all series with their points as one JSON object; NaN and infinity are null."""
    found: list[dict[str, Any]] = []
    for one in series:
        points = [
            {"round": p.round, "step": p.step, "time": _time(p.time), "value": p.value}
            for p in one.points
        ]
        found.append(
            {"site": one.site, "name": one.name, **summarise(one.points), "points": points}
        )
    return strict_json({"metrics": found}, indent=2)


def write_csv(series: Sequence[Series], out: TextIO) -> None:
    """Write a line for each point: a step that is missing is empty, NaN and infinity are spelled out."""
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(("site", "name", "round", "step", "time", "value"))
    for one in series:
        for p in one.points:
            step = "" if p.step is None else p.step
            lines.writerow((one.site, one.name, p.round, step, _time(p.time), repr(p.value)))
