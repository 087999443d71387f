"""What a round costs a site beside its training: time, processor and memory, for an adapter of a given size.

One site with a LoRA adapter takes part through what the trainers' adapters share; in place of training it adds 1
to every value, so all of a round's time is fedcore's: download, load, publish, the server's reduction and commit.
The same bytes over raw loopback TCP are timed in the same run. The last model is checked before any figure is
returned.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedcore.config import load_run_file
from fedcore.errors import FedcoreError
from fedcore.model_file import open_model
from fedcore.simulation.processes import simulate

from .limits import Limits
from .memory import status

_LAYERS: Final = 12
_WIDTH: Final = 1024
_TIMES: Final = "FEDCORE_BENCHMARK_TIMES"
_RUN: Final = """
[run]
name = "adapter"
rounds = {rounds}
[participants]
sites = ["a"]
idle_timeout = "60s"
"""


def rank(size: int) -> int:
    """Return the LoRA rank with which the adapter has about ``size`` bytes."""
    return max(1, round(size / (_LAYERS * 2 * _WIDTH * 4)))


def measure(size: int, rounds: int) -> dict[str, Any]:
    """Run ``rounds`` rounds with an adapter of about ``size`` bytes, and return what they took.

    Returns:
        Of each round: seconds, those of the same bytes over TCP, the site's CPU seconds; and the peak of the
        site's memory above what it held with the model loaded, beside the update's size.
    """
    adapter = rank(size) * _LAYERS * 2 * _WIDTH * 4
    limits = Limits(2 * adapter)
    limits.sample()
    with tempfile.TemporaryDirectory(dir=os.environ.get("FEDCORE_WORK")) as name:
        folder = Path(name)
        (folder / "run.toml").write_text(_RUN.format(rounds=rounds), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.adapter", str(rank(size))]
        os.environ[_TIMES] = str(folder / "times.json")
        try:
            config = load_run_file(folder / "run.toml")
            result = simulate(folder / "run.toml", config, commands={"a": command})
        finally:
            del os.environ[_TIMES]
        if result.status != 0:
            raise FedcoreError(result.message)
        models = result.folder / "models"
        check_result(
            models / "round-0000.safetensors", models / f"round-{rounds:04d}.safetensors", rounds
        )
        found: dict[str, Any] = json.loads((folder / "times.json").read_text(encoding="utf-8"))
    limits.sample()
    return {"bytes": adapter, "rounds": rounds, **found, **limits.result()}


def check_result(first: Path, last: Path, rounds: int) -> None:
    """Check that every value is the first model's with 1 added in each round, bit for bit.

    Raises:
        FedcoreError: one is not.
    """
    before, after = open_model(first).views(), open_model(last).views()
    for tensor, view in before.items():
        expected = np.frombuffer(view, np.float32).copy()
        for _ in range(rounds):
            expected += np.float32(1)
        if not np.array_equal(np.frombuffer(after[tensor], np.float32), expected):
            raise FedcoreError(f"{tensor} is wrong: no figure is reported")


class _Clock:
    """Wall and processor time of a round, by what it went into.

    Attributes:
        laps: seconds of each lap by its name; ``NAME_cpu``: processor time of it; ``cpu_s``: of all so far.
    """

    def __init__(self) -> None:
        self.laps: dict[str, float] = {"cpu_s": 0.0}
        self._at, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, name: str) -> None:
        """End a lap."""
        at, cpu = time.perf_counter(), time.process_time()
        self.laps |= {name: at - self._at, f"{name}_cpu": cpu - self._cpu}
        self.laps["cpu_s"] += cpu - self._cpu
        self._at, self._cpu = at, cpu


def _site(lora_rank: int) -> None:
    """Take part as the site, and note what each round took."""
    import torch
    from peft import LoraConfig, get_peft_model

    from fedcore.client.counting import ExampleCounter
    from fedcore.client.torch import current_site

    torch.manual_seed(0)
    base = torch.nn.Sequential(*(torch.nn.Linear(_WIDTH, _WIDTH) for _ in range(_LAYERS)))
    names = [str(index) for index in range(_LAYERS)]
    model = get_peft_model(base, LoraConfig(r=lora_rank, target_modules=names))
    trained = [p for p in model.parameters() if p.requires_grad]
    site = current_site()
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts at what is held now
    held = status(os.getpid())["VmRSS"]
    rounds: list[dict[str, float]] = []
    running = site.is_running()
    while running:
        clock = _Clock()
        task = site.receive(model)
        assert task is not None
        clock.lap("receive_s")
        if task.trains:
            with torch.no_grad():
                for parameter in trained:
                    parameter.add_(1)
            clock.lap("trained_s")
            counted = ExampleCounter(1)
            counted.add(None)
            site.submit(model, counted, {})
            clock.lap("submit_s")
        else:
            site.end()
        running = site.is_running()
        clock.lap("wait_s")
        if task.trains:
            rounds.append(clock.laps)
    calls = ("receive_s", "submit_s", "wait_s")
    found = {
        "round_samples_s": [sum(laps[call] for call in calls) for laps in rounds],
        "site_cpu_samples_s": [laps["cpu_s"] - laps["trained_s_cpu"] for laps in rounds],
        **{call: [laps[call] for laps in rounds] for call in calls},
        "held_bytes": held,
        "peak_bytes_above_held": status(os.getpid())["VmHWM"] - held,
    }
    Path(os.environ[_TIMES]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    _site(int(sys.argv[1]))
