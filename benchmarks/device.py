"""Means on a GPU, of raw and of encoded updates, beside the CPU in the same run."""

from __future__ import annotations

import statistics
import time
from typing import Any, Final

import numpy as np

from fedcore import _core
from fedcore._core import Codec
from fedcore._device import device_blocks, device_failure, use_device
from fedcore.errors import FedcoreError

from .encodings import Chunks, Flat, Reduction, Work

# Top-k is not decoded on a device.
CASES: Final = {
    "all weights, fp32": ("raw", "bf16", "fp16", "int8", "nf4"),
    "all weights, bf16": ("raw", "int8", "nf4"),
}


def _expected(work: Work, encoding: str, updates: list[Chunks]) -> Flat:
    """Return the mean of the decoded updates, on the CPU, by the kernels that ``kernels`` compares with NumPy."""
    codec = Codec(work.layout, encoding)
    flats = [np.empty_like(work.base) for _ in updates]
    for chunks, flat in zip(updates, flats, strict=True):
        work.decode(codec, chunks, flat)
    mean = np.empty_like(work.base)
    _core.mean(work.dtype, [f.data for f in flats], list(range(1, len(flats) + 1)), mean.data)
    return mean


def _seconds(reduction: Reduction) -> tuple[float, float]:
    """Return what a reduction takes by the clock, and of this thread's processor time."""
    clock, processor = time.perf_counter(), time.thread_time()
    reduction.run()
    return time.perf_counter() - clock, time.thread_time() - processor


def measure(work: Work, encoding: str, inputs: int, device: str, repeats: int) -> dict[str, Any]:
    """Return GB of the updates' flat bytes per second, of what a server does with each but the sockets.

    CPU and device take turns, chunk after chunk from one thread, and the medians count.

    Raises:
        ArithmeticError: a mean differs from that of the decoded updates in a bit.
        FedcoreError: the device left a chunk to the CPU.
    """
    codec = Codec(work.layout, encoding)
    updates = [work.encode(codec, work.trained(seed)) for seed in range(1, inputs + 1)]
    use_device("cpu")
    expected = _expected(work, encoding, updates).tobytes()
    reduction = Reduction(work, updates, encoding)
    places = {"cpu": "cpu", "device": device}
    samples: dict[str, list[tuple[float, float]]] = {place: [] for place in places}
    try:
        for turn in range(repeats + 1):
            for place, choice in places.items():
                use_device(choice)
                before = device_blocks()
                reduction.out.view()[:] = bytes(len(expected))
                taken = _seconds(reduction)
                computed = device_blocks() - before
                if choice != "cpu" and computed != work.layout.chunk_count:
                    raise FedcoreError(
                        f"{encoding}: of {work.layout.chunk_count} chunks the device computed {computed} "
                        f"({device_failure() or 'it declined the others'})"
                    )
                if bytes(reduction.out.view()) != expected:
                    raise ArithmeticError(
                        f"{encoding}: the mean of {work.name} on {choice} is wrong"
                    )
                if turn > 0:
                    samples[place].append(taken)
    finally:
        use_device("cpu")
    size = inputs * len(work.base)
    row: dict[str, Any] = {"tensors": work.name, "update": encoding, "inputs": inputs}
    for place, all_taken in samples.items():
        clock, processor = (statistics.median(kind) for kind in zip(*all_taken, strict=True))
        row[f"{place}_gb_s"] = size / clock / 1e9
        row[f"{place}_processor_s_per_gb"] = processor / size * 1e9
    row["bytes_each"] = len(work.base)
    row["device_over_cpu"] = row["device_gb_s"] / row["cpu_gb_s"]
    return row


def sweep(size: int, inputs: int, device: str, repeats: int) -> dict[str, Any]:
    """Measure raw and encoded updates on the CPU and on a device; ``cpu`` measures the CPU beside itself.

    Raises:
        ConfigError: there is no such device.
    """
    name = use_device(device)
    use_device("cpu")
    rows = []
    for tensors, encodings in CASES.items():
        work = Work(tensors, size)
        rows += [measure(work, encoding, inputs, device, repeats) for encoding in encodings]
    return {"device": name, "rows": rows}
