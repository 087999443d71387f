"""Many virtual sites in one process take little memory each, and their round is right."""

from __future__ import annotations

import pytest

from benchmarks.fleet import measure


def test_a_hundred_machines_in_one_thread_give_the_exact_mean_in_little_memory() -> None:
    figures = measure(100, 64 << 10)
    assert figures["bytes_per_site"] <= 64 << 10


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_machines_in_one_thread_give_the_exact_mean_of_a_megabyte() -> None:
    figures = measure(1000, 1 << 20)
    print(figures)
    assert figures["bytes_per_site"] <= 64 << 10
