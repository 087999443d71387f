"""A thousand virtual sites in one process and one thread: the seconds of a round, and the memory of a site.

``python -m benchmarks.fleet ADDRESS SITES BYTES FOLDER`` takes part with so many sites and prints what that cost
as JSON. Each site offers another window of one mapped file, so that the exact mean is known and no update takes
memory of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedcore import protocol
from fedcore._core import Layout, MappedFile, crc32c
from fedcore.encoding import EncodedUpdate
from fedcore.errors import FedcoreError
from fedcore.layout import DEFAULT_CHUNK_BYTES
from fedcore.model_file import ModelFile, create_model, open_model
from fedcore.site import outputs as out
from fedcore.site.fleet import Fleet, Trained

from .report import KIB

_STEP: Final = 64  # bytes between the first values of one site and of the next
_HIGHEST_WEIGHT: Final = 7
_START_SECONDS: Final = 30.0


def layout(size: int) -> Layout:
    """Return the layout of a model of so many bytes of fp32."""
    return Layout([("w", "F32", [size // 4])])


def name(number: int) -> str:
    return f"site-{number:05d}"


def weight(number: int) -> int:
    return 1 + number % _HIGHEST_WEIGHT


class Offers:
    """The updates of all sites: integers below 2^16, each site's another window of one file."""

    def __init__(self, path: Path, sites: int, size: int) -> None:
        self.size = size
        values = np.random.default_rng(1).integers(0, 1 << 16, (size + sites * _STEP) // 4)
        self._values = values.astype(np.float32)
        self._file = MappedFile.create(str(path), self._values.nbytes)
        self._file.write(0, self._values.data)

    def update(self, number: int) -> EncodedUpdate:
        """Return a site's update, with the checksums of its chunks."""
        first, total = number * _STEP, self.size
        cuts = [*range(first, first + total, DEFAULT_CHUNK_BYTES), first + total]
        checksums = [crc32c(self._file.view(a, b - a)) for a, b in pairwise(cuts)]
        return EncodedUpdate(self._file, cuts, bytes(len(checksums)), checksums)

    def mean(self, sites: int) -> np.ndarray[Any, Any]:
        """Return the weighted mean of all updates; the sums are exact."""
        total = np.zeros(self.size // 4)
        for number in range(sites):
            total += weight(number) * self._values[number * _STEP // 4 :][: total.size]
        return (total / sum(map(weight, range(sites)))).astype(np.float32)


class OfferingSite:
    """What one site does: it offers its window and scores nothing."""

    def __init__(self, offers: Offers, number: int) -> None:
        self._offers, self._number = offers, number

    def train(self, task: protocol.Task, model: ModelFile | None) -> Trained:
        assert task.round == 1
        assert model is not None
        return Trained(self._offers.update(self._number), weight(self._number))

    def score(self, *_: object) -> None:
        return None


def take_part(address: str, sites: int, size: int, folder: Path) -> dict[str, Any]:
    """Take part in a run of one round to its end; return what it cost this process.

    ``growth_bytes`` is by how much the memory of this process that no file backs has grown at most, and
    ``round_s`` the time from the first task to the last commit.
    """
    offers = Offers(folder / "updates", sites, size)
    times: dict[str, float] = {}

    def listen(_: str, event: out.Event) -> None:
        if isinstance(event, out.Tasked) and event.task.kind == "train":
            times.setdefault("first_task", time.monotonic())
        elif isinstance(event, out.Committed) and event.commit.version == 1:
            assert event.commit.included
            times["last_commit"] = time.monotonic()

    before, began = private_memory(), time.monotonic()
    cpu = time.process_time()
    trainers = {name(number): OfferingSite(offers, number) for number in range(sites)}
    fleet = Fleet(address, layout(size), trainers, listen)
    most, look_at = before, 0.0
    while fleet.running:
        fleet.step()
        if time.monotonic() >= look_at:
            look_at = time.monotonic() + 0.05
            most = max(most, private_memory())
    most = max(most, private_memory())
    figures = {
        "sites": sites,
        "bytes": size,
        "total_s": time.monotonic() - began,
        "round_s": times["last_commit"] - times["first_task"],
        "cpu_s": time.process_time() - cpu,
        "growth_bytes": most - before,
        "bytes_per_site": (most - before) / sites,
    }
    fleet.close()
    return figures


def private_memory() -> int:
    """Return the bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * KIB
    raise AssertionError("no RssAnon in /proc")


def measure(sites: int, size: int, timeout: float = 600) -> dict[str, Any]:
    """Run one round of a real server and of virtual sites in one other process, and check the model.

    Raises:
        FedcoreError: the run failed, or the model is not the exact mean.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        create_model(folder / "start.safetensors", layout(size)).file.sync()
        (folder / "run.toml").write_text(
            '[run]\nname = "fleet"\nrounds = 1\n[model]\ninitial = "start.safetensors"\n'
            f'[participants]\ncount = {sites}\nidle_timeout = "60s"\n'
            '[server]\ninsecure = true\nlisten = "tcp://127.0.0.1:0"\n',
            encoding="utf-8",
        )
        endpoint, log = folder / "endpoint", folder / "server.log"
        command = [sys.executable, "-P", "-m", "fedcore", "server", str(folder / "run.toml")]
        with log.open("wb") as text:
            server = subprocess.Popen(
                [*command, "--endpoint-file", str(endpoint)], stdout=text, stderr=text
            )
        try:
            words = [_address(endpoint, server, log), str(sites), str(size), str(folder)]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.fleet", *words], cwd=Path(__file__).parents[1],
                stdout=subprocess.PIPE, text=True, check=False, timeout=timeout,
            )  # fmt: skip
            if done.returncode or server.wait(30):
                raise FedcoreError(f"the run failed: {log.read_text(encoding='utf-8')}")
        finally:
            server.kill()
            server.wait()
        model = open_model(folder / "runs" / "fleet" / "final" / "model.safetensors")
        found = np.frombuffer(model.views()["w"], np.float32)
        if not np.array_equal(found, Offers(folder / "again", sites, size).mean(sites)):
            raise FedcoreError("the model is not the exact mean of the updates")
        figures: dict[str, Any] = json.loads(done.stdout)
        return figures


def _address(endpoint: Path, server: subprocess.Popen[bytes], log: Path) -> str:
    """Return where a server listens, once it does."""
    until = time.monotonic() + _START_SECONDS
    while not endpoint.exists():
        if server.poll() is not None or time.monotonic() > until:
            raise FedcoreError(f"the server did not start: {log.read_text(encoding='utf-8')}")
        time.sleep(0.01)
    return endpoint.read_text(encoding="utf-8")


if __name__ == "__main__":
    address, many, large, where = sys.argv[1:]
    print(json.dumps(take_part(address, int(many), int(large), Path(where))), flush=True)
