"""The server's peak memory against the number of sites and the size of the model, at a small budget."""

from __future__ import annotations

from typing import Any

from .report import GIB, MIB
from .round_trip import Work, fedcore_rounds

SITES = (2, 4, 8, 16, 32)
SIZES = (64 * MIB, 128 * MIB, 256 * MIB, 512 * MIB, GIB)


def sweep(
    budget: int, size: int, sites: int, all_sites: tuple[int, ...], sizes: tuple[int, ...]
) -> dict[str, Any]:
    """Return peaks for ``all_sites`` at one model size, then for ``sizes`` at one number of sites; one round each.

    The peak of a server with a model of 1 MiB is the interpreter's share, which is subtracted in ``over_idle``.
    """
    idle = fedcore_rounds(Work(MIB, 2, 1), budget)["server_peak_rss_bytes"]
    cases = [Work(size, count, 1) for count in all_sites]
    cases += [Work(each, sites, 1) for each in sizes]
    rows = []
    for work in dict.fromkeys(cases):
        result = fedcore_rounds(work, budget)
        rows.append(
            {
                "sites": work.sites,
                "bytes": work.model_bytes,
                "round_s": result["round_s"],
                "server_peak_rss_bytes": result["server_peak_rss_bytes"],
                "over_idle_bytes": result["server_peak_rss_bytes"] - idle,
            }
        )
    return {"memory_bytes": budget, "idle_rss_bytes": idle, "rows": rows}
