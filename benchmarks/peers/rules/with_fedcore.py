"""``with_fedcore.py FOLDER RULE``: the same from files to a file, which is how a server has updates.

It has a thread for each core, as the peers' arrays and tensors may use all of them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fedcore import _core
from fedcore._core import Finisher, MappedFile
from fedcore.errors import NonFiniteError
from fedcore.files.average import aggregate_files
from fedcore.model_file import create_model, open_model

REPEATS = 3
CHUNK = 1 << 20
THREADS = len(os.sched_getaffinity(0))
ROUNDS, RATE = 10, 0.1
SETTINGS = {"median": {}, "trimmed-mean": {"trim": 4.0}, "krum": {"f": 1.0}}
ADAM = {"learning_rate": 0.01, "beta1": 0.9, "beta2": 0.99, "tau": 0.001}


def peak() -> int:
    """Return the most bytes that this process had resident, pages of mapped files included."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def timed(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def by_rule(folder: Path, rule: str, paths: list[Path]) -> dict[str, Any]:
    out = folder / "out.safetensors"
    try:
        seconds = [
            timed(
                lambda: aggregate_files(
                    paths,
                    None,
                    out,
                    rule=rule,
                    settings=SETTINGS[rule],
                    force=True,
                    threads=THREADS,
                )
            )
            for _ in range(REPEATS)
        ]
    except NonFiniteError as error:
        return {"seconds": [], "refused": str(error)}
    most = peak()
    model = open_model(out)
    np.concatenate(
        [np.frombuffer(view, np.float32) for _, view in sorted(model.views().items())]
    ).tofile(folder / "out.raw")
    return {"seconds": seconds, "peak": most}


def adam(folder: Path, paths: list[Path]) -> dict[str, Any]:
    """One round, chunk by chunk, with states in files as a server has them."""
    base, *models = [open_model(path) for path in (folder / "base.safetensors", *paths)]
    out = create_model(folder / "out.safetensors", base.layout)
    size = base.layout.total_bytes
    files = {n: MappedFile.create(str(folder / n), size) for n in ("momentum", "variance")}
    weights = [1] * len(models)

    chunks = [
        (name, offset, at, min(CHUNK, nbytes - at))
        for name, _, _, offset, nbytes in base.layout.tensors
        for at in range(0, nbytes, CHUNK)
    ]

    def one_chunk(chunk: tuple[str, int, int, int]) -> None:
        name, offset, at, nbytes = chunk
        finisher = Finisher(_core.Layout([(name, "F32", [nbytes // 4])]), "adam", ADAM)
        states = {state: (file, offset + at) for state, file in files.items()}
        before, after, *updates = [m.view(name)[at : at + nbytes] for m in (base, out, *models)]
        _core.finish_mean(finisher, updates, weights, before, after, states)
        for model in (base, out, *models):
            model.file.release(model.data_offset + model.offsets[name] + at, nbytes)

    def one_round() -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one_chunk, chunks))

    seconds = [timed(one_round) for _ in range(REPEATS)]
    most = peak()
    np.frombuffer(out.file.view(out.data_offset, size), np.float32).tofile(folder / "out.raw")
    return {"seconds": seconds, "peak": most}


def small_steps() -> dict[str, Any]:
    """A bf16 model of 1.0, whose sites are one step of bf16 above it, round after round."""
    layout = _core.Layout([("w", "BF16", [1024])])
    options = {"learning_rate": RATE, "momentum": 0.0}
    first = Finisher(layout, "momentum", options)
    before, model = None, np.full(1024, 0x3F80, np.uint16)
    for _ in range(ROUNDS):
        finisher = first if before is None else Finisher(layout, "momentum", options, set(), before)
        after = {n: (MappedFile.anonymous(of.total_bytes), 0) for n, of in first.states}
        out, update = np.empty_like(model), model + np.uint16(1)
        _core.finish_mean(finisher, [update.data] * 3, [1] * 3, model.data, out.data, after)
        before, model = after, out
    return {"seconds": [], "value": float((model[:1].astype(np.uint32) << 16).view(np.float32)[0])}


def main() -> None:
    folder, rule = Path(sys.argv[1]), sys.argv[2]
    if rule == "small-steps":
        print(json.dumps(small_steps()))
        return
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    paths = [folder / f"{name}.safetensors" for name in plan["updates"]]
    result = adam(folder, paths) if rule == "adam" else by_rule(folder, rule, paths)
    print(json.dumps({**result, "dtype": "float32"}))


main()
