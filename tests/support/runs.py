"""Whole runs over loopback sockets: sites as threads that speak the protocol through `Session`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.config import parse_run
from fedcore.errors import ClosedError
from fedcore.server.outcome import RunResult
from fedcore.server.service import Server
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

SPECS = [("w", "F32", [5000]), ("n", "I64", [2])]


def run_config(tmp_path: Path, keep_versions: int | None = None, **people: Any) -> Any:
    kept = {} if keep_versions is None else {"keep_versions": keep_versions}
    return parse_run(
        {
            "run": {"name": "t", "rounds": people.pop("rounds", 3)},
            "participants": {"round_deadline": "300s", **people},
            "selection": {"metric": "loss", "mode": "min"},
            "server": {"listen": "tcp://127.0.0.1:0", "insecure": True, **kept},
        },
        folder=tmp_path,
    )


def writer(value: float) -> Callable[[str], bytes]:
    tensors = {"w": np.full(5000, value, np.float32), "n": np.array([1, 2])}
    return lambda name: tensors[name].tobytes()


def site(
    address: str, name: str, step: float, weight: int = 1, *, nan_in: int = 0, die_in: int = 0
) -> int:
    """Add ``step`` in each round; return the number of rounds trained."""
    session = Session(SiteSettings(server=address, site=name, connect_timeout=200))
    trained = 0
    try:
        while session.is_running():
            try:
                model = session.begin(SPECS, {"config.json": "{}"}, writer(0))
            except ClosedError:  # stopped between the task and its model
                return trained
            value = float(np.frombuffer(model.tensors["w"], np.float32)[0])
            session.score({"loss": abs(value - 4)}, weight)
            if model.kind == "evaluate":
                session.end_task()
                continue
            if model.round == die_in:
                return trained
            session.submit(writer(np.nan if model.round == nan_in else value + step), weight)
            trained += 1
    finally:
        session.close()
    return trained


def run(server: Server, *sites: Callable[[], int]) -> tuple[RunResult, list[int]]:
    with ThreadPoolExecutor(len(sites) + 1) as pool:
        result = pool.submit(server.run)
        done = [pool.submit(s) for s in sites]
        try:
            return result.result(200), [d.result(200) for d in done]
        finally:
            server.stop()  # it waits for sites that have failed
