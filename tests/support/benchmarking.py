"""The benchmarks in processes of their own, and how far their results spread."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from benchmarks.memory import Load, measure
from benchmarks.report import MIB

ROOT = Path(__file__).parents[2]
SPREAD = 1.05


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "120"},
    )


def spread(*loads: Load, rounds: int = 6) -> float:
    """Return the highest peak over the lowest, each under a hard limit of the budget over the idle server.

    A load's peak is the highest of several rounds: how much of its budget a server comes to hold in one is also a
    matter of who sent first. Loads whose peaks are lower than the highest are measured again, until all agree, for
    ``rounds`` turns at most.
    """
    found: dict[Load, int] = dict.fromkeys(loads, 0)
    for _ in range(rounds):
        for load in [load for load in loads if not _agrees(found, load)]:
            row = measure(load)
            print(load, {k: round(v / MIB, 1) for k, v in row.items() if k.endswith("bytes")})
            assert row["peak_rss_bytes"] <= row["idle_rss_bytes"] + load.budget
            found[load] = max(found[load], row["peak_rss_bytes"])
    return max(found.values()) / min(found.values())


def _agrees(found: dict[Load, int], load: Load) -> bool:
    """Whether a load's peak is measured, and as high as the others'."""
    return bool(found[load]) and max(found.values()) <= SPREAD * found[load]
