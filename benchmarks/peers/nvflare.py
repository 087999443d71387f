"""NVFlare: FedAvg by the PyTorch recipe, in its simulator, which runs each client in a process of its own.

The simulator is the lighter of its ways to run on one machine: a provisioned one adds TLS and job processes.
A round lasts from one "Round N started." in the server's log to the next, the last one to "Finished FedAvg.".
"""

from __future__ import annotations

import itertools
import re
import shutil
from datetime import datetime
from pathlib import Path

from ..processes import Family
from ..workload import TENSORS, Work
from .run import Outcome, PeerError, finish, tail, time_limit

VERSION = "2.9.0"
REQUIREMENT = f"nvflare=={VERSION}"
SETTINGS = (
    "FedAvgRecipe, SimEnv with a process per client, PyTorch exchange format, client scripts in the "
    "client's process that add in place, tensor disk offload (as fast, less memory)"
)
_JOB = Path(__file__).parent / "nvflare_job"
_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ")


def run(python: Path, folder: Path, work: Work, family: Family) -> Outcome:
    """Run the job; the model that it saved is checked in its own environment, which has torch."""
    for source in _JOB.glob("*.py"):
        shutil.copy(source, folder)
    log = folder / "nvflare.log"
    arguments = [str(n) for n in (work.elements, TENSORS, work.sites, work.rounds)]
    job = family.start([str(python), "job.py", *arguments], log, {}, folder)
    finish(job, log, time_limit(work.round_bytes, work.rounds))
    if "RESULT RIGHT" not in log.read_text(encoding="utf-8", errors="replace"):
        raise PeerError(f"the result is wrong:\n{tail(log)}")
    server_log = folder / "workspace" / "bench" / "server" / "log.txt"
    return Outcome(
        round_seconds(server_log, work.rounds), "server (simulator)", ("simulator.simulator ",)
    )


def round_seconds(log: Path, rounds: int) -> list[float]:
    """Return the seconds of each round by the time stamps of a server's log.

    Raises:
        PeerError: the log does not show them all.
    """
    marks = []
    stamp = None
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if found := _STAMP.match(line):
            stamp = datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f")
        if stamp is not None and re.search(r"Round \d+ started\.|Finished FedAvg\.", line):
            marks.append(stamp)
    if len(marks) != rounds + 1:
        raise PeerError(f"the log shows {len(marks) - 1} rounds, not {rounds}")
    return [(b - a).total_seconds() for a, b in itertools.pairwise(marks)]
