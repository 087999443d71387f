"""What encodings, compressing and the spill file take is part of the server's budget."""

from __future__ import annotations

import pytest

from benchmarks.memory import Load, measure
from benchmarks.report import MIB

from ..support.benchmarking import SPREAD, spread

BUDGET = 24 * MIB
SIZE = 32 * MIB


@pytest.mark.parametrize(
    ("update", "spill"),
    [("nf4", True), ("raw+lossless", False), ("raw+lossless", True), ("nf4+lossless", False)],
)
def test_encoded_and_compressed_chunks_keep_to_the_budget(update: str, spill: bool) -> None:
    load = Load(SIZE, 6, BUDGET, spill=spill, update=update)
    row = measure(load)
    print(load, row)
    assert row["peak_rss_bytes"] <= row["idle_rss_bytes"] + BUDGET


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_peaks_of_2_to_256_sites_lie_within_5_percent_with_a_spill_file_too() -> None:
    budget = 64 * MIB
    loads = [Load(2 * budget, sites, budget, spill=True) for sites in (2, 8, 32, 256)]
    assert spread(*loads) <= SPREAD
