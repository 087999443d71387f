"""The server's memory is bounded by its budget, whatever the number of sites and the size of the model."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.memory import Load, measure
from benchmarks.report import MIB

BUDGET = 16 * MIB
SIZE = 48 * MIB  # three times the budget
SPREAD = 1.05


def peaks(*loads: Load) -> list[int]:
    """Return the peaks, each under a hard limit of the budget over the idle server."""
    found: list[dict[str, Any]] = [measure(load) for load in loads]
    for load, row in zip(loads, found, strict=True):
        print({name: round(value / MIB, 1) for name, value in row.items() if name != "sites"}, load)
        assert row["peak_rss_bytes"] <= row["idle_rss_bytes"] + load.budget
    return [row["peak_rss_bytes"] for row in found]


def test_the_peak_is_the_same_for_more_sites_and_a_larger_model() -> None:
    found = peaks(
        Load(SIZE, 2, BUDGET),
        Load(SIZE, 8, BUDGET),
        Load(SIZE, 32, BUDGET),
        Load(2 * SIZE, 8, BUDGET),
    )
    assert max(found) <= SPREAD * min(found)


def test_chunks_that_are_read_back_from_the_spill_file_are_part_of_the_budget() -> None:
    found = peaks(Load(SIZE, 8, BUDGET, spill=True), Load(SIZE, 8, BUDGET))
    assert max(found) <= SPREAD * min(found)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_peak_is_the_same_from_2_to_256_sites_at_64_mib() -> None:
    budget = 64 * MIB
    found = peaks(*(Load(3 * budget, sites, budget) for sites in (2, 8, 32, 256)))
    assert max(found) <= SPREAD * min(found)
