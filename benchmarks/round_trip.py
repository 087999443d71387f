"""Whole rounds without training: each site adds a constant to every value and sends the full model back.

The values differ from tensor to tensor, and the constants from site to site: a framework that stores equal bytes
once must not be measured on fewer bytes. Site 1 adds 1, site 2 adds 2, so with K sites a round adds (K + 1) / 2.

A round lasts from the moment the first site gets its task to the moment the first site gets the next one: pull,
add, publish, aggregate, commit to disk. The result is checked before any figure is returned.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedcore._core import Layout
from fedcore.config import load_run_file
from fedcore.errors import FedcoreError
from fedcore.model_file import create_model, open_model
from fedcore.simulation.processes import simulate

from .limits import Limits
from .processes import Family
from .report import MIB
from .workload import TENSORS, Work

CLIENTS = ("reader", "plain")
_TIMES = "FEDCORE_BENCHMARK_TIMES"


def fedcore_rounds(
    work: Work, memory: int = 256 * MIB, client: str = "reader", *, encrypted: bool = False
) -> dict[str, Any]:
    """Run the work with fedcore: a server process and one process per site on loopback.

    Args:
        memory: the server's budget in bytes.
        client: "reader" hands tensors over one at a time, as the trainer adapters do; "plain" is
            ``fl.receive()`` and ``fl.send(dict)``, with the whole model twice in the site's memory.
        encrypted: whether the connections are, as they are in any run that does not ask for plain text.
    """
    with tempfile.TemporaryDirectory(dir=os.environ.get("FEDCORE_WORK")) as name:
        folder = Path(name)
        layout = Layout([(f"layer{i:03d}", "F32", [work.elements]) for i in range(TENSORS)])
        start = create_model(folder / "start.safetensors", layout)
        for index, view in enumerate(start.views().values()):
            np.frombuffer(view, np.float32)[:] = values(index, work.elements)
        start.file.sync()
        (folder / "run.toml").write_text(
            f'[run]\nname = "bench"\nrounds = {work.rounds}\n[model]\ninitial = "start.safetensors"\n'
            f'[participants]\ncount = {work.sites}\nidle_timeout = "30s"\n'
            f'[server]\nmemory = "{memory // MIB}MiB"\ninsecure = {str(not encrypted).lower()}\n',
            encoding="utf-8",
        )
        config = load_run_file(folder / "run.toml")
        command = [sys.executable, "-m", "benchmarks.round_trip", client]
        with Family() as family:
            os.environ |= {**family.environment, _TIMES: name}
            try:
                result = simulate(
                    folder / "run.toml",
                    config,
                    commands=dict.fromkeys(config.site_names, command),
                )
            finally:
                for variable in (*family.environment, _TIMES):
                    del os.environ[variable]
        if result.status != 0:
            raise FedcoreError(result.message)
        check_result(result.folder / "final" / "model.safetensors", work)
        seconds = _round_seconds(folder, work.rounds)
        return {
            "round_s": statistics.median(seconds),
            "round_samples_s": seconds,
            "server_peak_rss_bytes": family.peak("fedcore", "server"),
            "site_peak_rss_bytes": family.peak("benchmarks.round_trip"),
        }


def values(tensor: int, elements: int) -> np.ndarray[Any, Any]:
    """Return a tensor's first values: integers below 2^16, so that all sums here are exact in fp32."""
    drawn = np.random.default_rng(tensor).integers(0, 1 << 16, elements, np.uint16)
    return drawn.astype(np.float32)


def check_result(path: Path, work: Work) -> None:
    """Check every value of the last model, bit for bit.

    Raises:
        FedcoreError: one is not, or a tensor is missing.
    """
    views = open_model(path).views()
    right = len(views) == TENSORS and all(
        np.array_equal(np.frombuffer(view, np.float32), values(i, work.elements) + work.added)
        for i, view in enumerate(views.values())
    )
    if not right:
        raise FedcoreError("the aggregate is wrong: no time is reported")


def _round_seconds(folder: Path, rounds: int) -> list[float]:
    """Return the seconds between the tasks of successive rounds, by the site that got each one first."""
    starts: dict[int, float] = defaultdict(lambda: float("inf"))
    for path in folder.glob("*.times"):
        for line in path.read_text(encoding="utf-8").splitlines():
            task, at = json.loads(line)
            starts[task] = min(starts[task], at)
    if len(starts) != rounds + 1:
        raise FedcoreError(f"{len(starts) - 1} rounds were seen, {rounds} were asked for")
    return [starts[task + 1] - starts[task] for task in range(1, rounds + 1)]


def measure(work: Work, memory: int, client: str, peers: list[str]) -> dict[str, Any]:
    """Measure fedcore, the limits before and after it, and the peers in the same run."""
    from .peers import measure_peer

    limits = Limits(work.round_bytes)
    limits.sample()
    ours = fedcore_rounds(work, memory, client)
    limits.sample()
    compared = {name: measure_peer(name, work) for name in peers}
    if peers:
        limits.sample(1)
    limit = limits.result()
    for figures in compared.values():
        if "round_s" in figures:
            figures["ratio"] = figures["round_s"] / ours["round_s"]
    limit_s = limit["limit_s"]
    assert isinstance(limit_s, float)
    return {
        "bytes": work.model_bytes,
        "tensors": TENSORS,
        "sites": work.sites,
        "rounds": work.rounds,
        "memory_bytes": memory,
        "client": client,
        **ours,
        **limit,
        "round_over_limit": ours["round_s"] / limit_s,
        "peers": compared,
    }


def _site(client: str) -> None:
    """Take part as a site, and note when each task came. A model to be scored is the round after the last."""
    import fedcore.client as fl

    times = Path(os.environ[_TIMES]) / f"{os.environ['FEDCORE_SITE']}.times"
    constant = np.float32(os.environ["FEDCORE_SITE"].rpartition("-")[2])
    tasks = 0
    with times.open("a", encoding="utf-8") as out:
        while fl.is_running():
            tasks += 1
            out.write(json.dumps([tasks, time.time()]) + "\n")
            out.flush()
            (_change_plain if client == "plain" else _change_by_reader)(constant)


def _change_by_reader(constant: np.float32) -> None:
    from fedcore.client.current import get_session

    session = get_session()
    specs = session.offered_specs()
    assert specs is not None
    model = session.begin(specs, {}, lambda _: b"")
    if model.kind == "evaluate":
        session.end_task()
        return
    session.submit(_Changed(model.tensors, constant).read, 1)


class _Changed:
    """Tensors with a constant added, each made in the same memory when it is asked for."""

    def __init__(self, tensors: Mapping[str, memoryview], constant: np.float32) -> None:
        self._tensors = tensors
        self._constant = constant
        self._changed = np.empty(max(map(len, tensors.values())) // 4, np.float32)

    def read(self, name: str) -> memoryview:
        given = np.frombuffer(self._tensors[name], np.float32)
        return np.add(given, self._constant, out=self._changed[: len(given)]).data


def _change_plain(constant: np.float32) -> None:
    import fedcore.client as fl

    params = fl.receive()
    for value in params.values():
        np.add(value, constant, out=value)
    fl.send(params, weight=1)


if __name__ == "__main__":
    _site(sys.argv[1])
