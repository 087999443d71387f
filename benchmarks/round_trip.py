"""Whole rounds without training: a server process and site processes on loopback."""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedcore._core import Layout
from fedcore.config import load_run_file
from fedcore.errors import FedcoreError
from fedcore.layout import Reader, create_model, open_model
from fedcore.simulate import simulate

_TENSORS = 148


def measure(size: int, sites: int, rounds: int) -> dict[str, Any]:
    """Return the median seconds of a round, the raw TCP seconds for its bytes, and the server's peak RSS."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("FEDCORE_WORK")) as name:
        folder = Path(name)
        each = size // _TENSORS // 4
        layout = Layout([(f"layer{i:03d}", "F32", [each]) for i in range(_TENSORS)])
        create_model(folder / "start.safetensors", layout).file.sync()
        (folder / "run.toml").write_text(
            f'[run]\nname = "bench"\nrounds = {rounds}\n[model]\ninitial = "start.safetensors"\n'
            f'[participants]\ncount = {sites}\nidle_timeout = "30s"\n',
            encoding="utf-8",
        )
        config = load_run_file(folder / "run.toml")
        command = [sys.executable, "-m", "benchmarks.round_trip"]
        peak = 0

        def sample(_: str) -> None:
            nonlocal peak
            peak = max(peak, _server_peak(folder))

        limit = _raw_tcp(2 * sites * layout.total_bytes)
        result = simulate(
            folder / "run.toml",
            config,
            commands=dict.fromkeys(config.site_names, command),
            tick=sample,
        )
        if result.status != 0:
            raise FedcoreError(result.message)
        final = open_model(result.folder / "final" / "model.safetensors")
        for view in final.views().values():
            assert (np.frombuffer(view, np.float32) == rounds).all(), "the aggregate is wrong"
        summary = json.loads((result.folder / "summary.json").read_text())
        seconds = [v["seconds"] for v in summary["versions"] if v["version"]]
        round_s = statistics.median(seconds)
        return {
            "bytes": layout.total_bytes,
            "sites": sites,
            "rounds": rounds,
            "round_s": round_s,
            "limit_s": limit,
            "round_over_limit": round_s / limit,
            "server_peak_rss_bytes": peak,
        }


def _server_peak(folder: Path) -> int:
    lock = folder / "runs" / "bench" / ".lock"
    try:
        status = Path(f"/proc/{lock.read_text().strip()}/status").read_text()
    except (OSError, ValueError):
        return 0  # not started yet, or ended already
    line = next((x for x in status.splitlines() if x.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


def _raw_tcp(total: int) -> float:
    listener = socket.create_server(("127.0.0.1", 0))
    received = 0

    def drain() -> None:
        nonlocal received
        buffer = bytearray(1 << 20)
        connection, _ = listener.accept()
        with connection:
            while got := connection.recv_into(buffer):
                received += got

    thread = threading.Thread(target=drain)
    thread.start()
    block = bytes(1 << 20)
    begin = time.perf_counter()
    with socket.create_connection(listener.getsockname()) as sender:
        for _ in range(total // len(block)):
            sender.sendall(block)
    thread.join()
    seconds = time.perf_counter() - begin
    listener.close()
    assert received == total // len(block) * len(block)
    return seconds


def _site() -> None:
    from fedcore.client.session import GlobalModel, get_session

    session = get_session()
    changed = np.empty(0, np.float32)

    def add_one(model: GlobalModel) -> Reader:
        def read(name: str) -> memoryview:
            nonlocal changed
            values = np.frombuffer(model.tensors[name], np.float32)
            if len(changed) < len(values):
                changed = np.empty(len(values), np.float32)
            return np.add(values, np.float32(1), out=changed[: len(values)]).data

        return read

    while session.is_running():
        specs = session.offered_specs()
        assert specs is not None
        model = session.begin(specs, {}, lambda _: b"")
        if model.kind == "evaluate":
            session.end_task()
        else:
            session.submit(add_one(model), 1)


if __name__ == "__main__":
    _site()
