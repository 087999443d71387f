"""What encrypted connections cost: the same rounds with and without, in turn, in one run."""

from __future__ import annotations

import resource
import statistics
from typing import Any

from .report import GIB
from .round_trip import fedcore_rounds
from .workload import Work

__all__ = ["measure"]


def measure(work: Work, repeats: int) -> dict[str, Any]:
    """Measure plain and encrypted rounds in turn.

    Returns the median seconds of a round, the CPU seconds of server and sites over a whole run (the least of the
    repeats, as what else the machine does only adds to it), and what encrypting, sending, receiving and decrypting
    adds per GiB.
    """
    seconds: dict[bool, list[float]] = {False: [], True: []}
    busy: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        for encrypted in (False, True):
            before = _cpu_seconds()
            rounds = fedcore_rounds(work, encrypted=encrypted)["round_samples_s"]
            busy[encrypted].append(_cpu_seconds() - before)
            seconds[encrypted] += rounds
    plain, encrypted_s = (statistics.median(seconds[kind]) for kind in (False, True))
    plain_cpu, encrypted_cpu = (min(busy[kind]) for kind in (False, True))
    # A last model goes out to be scored, so each site gets one more than it sends.
    moved = work.rounds * work.round_bytes + work.sites * work.model_bytes
    return {
        "bytes": work.model_bytes,
        "sites": work.sites,
        "rounds": work.rounds,
        "repeats": repeats,
        "plain_s": plain,
        "encrypted_s": encrypted_s,
        "encrypted_over_plain": encrypted_s / plain,
        "plain_cpu_s": plain_cpu,
        "encrypted_cpu_s": encrypted_cpu,
        "added_cpu_s_per_gib": (encrypted_cpu - plain_cpu) / (moved / GIB),
    }


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
