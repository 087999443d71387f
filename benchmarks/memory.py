"""The server's peak memory against the number of sites and the size of the model, under a hard limit.

The real server process runs one round with `light_sites`, one of which keeps back a chunk from the middle
until all have sent what they were asked for: what the server may hold, it holds. Then its peak is read, and the
model is checked.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq

from fedcore.errors import FedcoreError
from fedcore.model_file import create_model, open_model
from fedcore.protocol import DEFAULT_CHUNK_BYTES

from .light_sites import Values, layout
from .report import KIB, MIB

SITES: Final = (2, 8, 32, 256)
SIZES: Final = (128 * MIB, 256 * MIB, 512 * MIB, 1024 * MIB)
_START_SECONDS: Final = 200.0
_END_SECONDS: Final = 200.0


@dataclass(frozen=True)
class Load:
    """What the server is given to do.

    Attributes:
        laggard: whether the first site keeps a chunk from the middle back.
        spill: whether chunks of the others may go to a file.
        strangers: connections that are opened before the round and say nothing.
        update: how updates travel, as `transfer.update`; with ``+lossless``, compressed, and the model, too.
    """

    size: int
    sites: int
    budget: int
    laggard: bool = True
    spill: bool = False
    strangers: int = 0
    update: str = "raw"

    @property
    def chunks(self) -> int:
        return max(1, self.size // DEFAULT_CHUNK_BYTES)


def measure(load: Load, *, limit: bool = True, timeout: float = 1800) -> dict[str, Any]:
    """Run one round and return the server's figures, in bytes.

    ``idle_rss_bytes`` is resident before any site is there, ``connected_rss_bytes`` once the strangers are;
    ``peak_rss_bytes`` is the most that ever was, and ``peak_anonymous_bytes`` what of it no file backed, as often
    as it was looked at. ``cpu_s`` are the processor's seconds from the strangers on. With ``limit``, the server's
    private memory (RLIMIT_DATA) can grow by the budget from where it stands then, and no more.

    Raises:
        FedcoreError: the run failed, or the model is not the exact mean.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = Values(load.chunks, load.update)
        start = create_model(folder / "start.safetensors", layout(load.chunks))
        start.file.sync()
        (folder / "run.toml").write_text(
            '[run]\nname = "memory"\nrounds = 1\n[model]\ninitial = "start.safetensors"\n'
            f'[participants]\ncount = {load.sites}\nidle_timeout = "60s"\n'
            f'[server]\ninsecure = true\nlisten = "tcp://127.0.0.1:0"\nmemory = "{load.budget // KIB}KiB"\n'
            f"spill = {str(load.spill).lower()}\n"
            f'[transfer]\nupdate = "{load.update.partition("+")[0]}"\n'
            f"lossless = {str(values.lossless).lower()}\n",
            encoding="utf-8",
        )
        del start
        figures = _run(folder, load, limit, timeout)
        model = open_model(folder / "runs" / "memory" / "final" / "model.safetensors")
        _check(model.views(), values, load)
        return {"sites": load.sites, "bytes": load.chunks * DEFAULT_CHUNK_BYTES, **figures}


def sweep(
    budget: int,
    size: int,
    sites: int,
    *,
    all_sites: tuple[int, ...],
    sizes: tuple[int, ...],
    spill: bool = False,
) -> dict[str, Any]:
    """Return the peaks for ``all_sites`` at one model size, then for ``sizes`` at one number of sites."""
    cases = [Load(size, count, budget, spill=spill) for count in all_sites]
    cases += [Load(each, sites, budget, spill=spill) for each in sizes]
    rows = [measure(load) for load in dict.fromkeys(cases)]
    idle = max(row["idle_rss_bytes"] for row in rows)
    return {"memory_bytes": budget, "idle_rss_bytes": idle, "spill": spill, "rows": rows}


def _run(folder: Path, load: Load, limit: bool, timeout: float) -> dict[str, Any]:
    log = folder / "server.log"
    endpoint = folder / "endpoint"
    command = [sys.executable, "-P", "-m", "fedcore", "server", str(folder / "run.toml")]
    sites = None
    strangers = Strangers()
    with log.open("wb") as out:
        server = subprocess.Popen(
            [*command, "--endpoint-file", str(endpoint)], stdout=out, stderr=out
        )
    try:
        until = time.monotonic() + _START_SECONDS
        while not endpoint.exists() or b"listening" not in log.read_bytes():
            if server.poll() is not None or time.monotonic() > until:
                raise FedcoreError(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.01)
        idle = status(server.pid)
        strangers.connect(endpoint.read_text(), load.strangers)
        while len(os.listdir(f"/proc/{server.pid}/fd")) < load.strangers:  # noqa: PTH208
            time.sleep(0.01)
        connected, cpu = status(server.pid), cpu_seconds(server.pid)
        if limit:
            most = connected["VmData"] + load.budget
            resource.prlimit(server.pid, resource.RLIMIT_DATA, (most, most))
        words = [endpoint.read_text(), str(load.sites), str(load.chunks), load.update]
        began = time.monotonic()
        sites = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.light_sites", *words]
            + (["0"] if load.laggard else []),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
        )
        os.set_blocking(sites.stdout.fileno(), False)  # type: ignore[union-attr]
        peak, anonymous, spilled = 0, 0, 0
        while sites.stdout.read() is None:  # type: ignore[union-attr]
            now = status(server.pid)
            late = time.monotonic() - began > timeout
            if late or sites.poll() is not None or "VmHWM" not in now:
                raise FedcoreError(f"the round failed: {log.read_text()[-2000:]}")
            peak, anonymous = now["VmHWM"], max(anonymous, now["RssAnon"])
            for path in (folder / "runs" / "memory").glob(".*.spill"):
                with contextlib.suppress(FileNotFoundError):  # the server removes it in the end
                    spilled = max(spilled, path.stat().st_size)
            time.sleep(0.02)
        seconds = time.monotonic() - began
        last, cpu = status(server.pid), cpu_seconds(server.pid) - cpu
        sites.communicate()
        if sites.returncode != 0 or server.wait(_END_SECONDS) != 0:
            raise FedcoreError(f"the run failed: {log.read_text()[-2000:]}")
        return {
            "seconds": seconds,
            "cpu_s": cpu,
            "idle_rss_bytes": idle["VmRSS"],
            "connected_rss_bytes": connected["VmRSS"],
            "peak_rss_bytes": max(peak, last.get("VmHWM", 0)),
            "peak_anonymous_bytes": anonymous,
            "spill_file_bytes": spilled,
            "idle_data_bytes": idle["VmData"],
            "data_bytes": last.get("VmData", 0),
            "page_table_bytes": last.get("VmPTE", 0),
        }
    finally:
        strangers.close()
        for process in (server, sites):
            if process is not None:
                process.kill()
                process.wait()


class Strangers:
    """Connections that say nothing."""

    def __init__(self) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []

    def connect(self, address: str, count: int) -> None:
        """Open so many more."""
        self._context.set(zmq.MAX_SOCKETS, count + 16)
        for _ in range(count):
            socket = self._context.socket(zmq.DEALER)
            self._sockets.append(socket)
            socket.connect(address)

    def close(self) -> None:
        """Close all of them."""
        for socket in self._sockets:
            socket.close(linger=0)
        self._context.term()


def cpu_seconds(pid: int) -> float:
    """Return the processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def status(pid: int) -> dict[str, int]:
    """Return the sizes in a process's status, in bytes; empty for one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = (line.partition(":") for line in lines)
    return {key: int(value.split()[0]) * KIB for key, _, value in fields if value.endswith(" kB")}


def _check(views: Any, values: Values, load: Load) -> None:
    index = 0
    for view in views.values():
        for at in range(0, len(view), DEFAULT_CHUNK_BYTES):
            got = np.frombuffer(view[at : at + DEFAULT_CHUNK_BYTES], np.float32)
            if not np.array_equal(got, values.expected(load.sites, index)):
                raise FedcoreError(f"chunk {index} is not the mean: no figure is reported")
            index += 1
    if index != load.chunks:
        raise FedcoreError("the model has another size: no figure is reported")
