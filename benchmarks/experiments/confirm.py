"""Run one cell of the PEFT experiment again, with a real server and a process for each site, and compare."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from fedcore.config import load_run_file
from fedcore.errors import FedcoreError
from fedcore.simulation.processes import simulate

from .peft import Cell, Lab, Settings, Source, fingerprint, shares

__all__ = ["confirm"]


#: Sites that share a busy machine's cores load their models for minutes.
_PATIENT: Final = 'FEDCORE_CONNECT_TIMEOUT = "10min"'


def confirm(
    folder: Path, settings: Settings, source: Source, cell: Cell, threads: int
) -> dict[str, Any]:
    """Return how far the real run's last model is from the one that was made in one process.

    Args:
        folder: that of the experiment, with the cell in it.
        settings: those of the cell.
        source: model and texts.
        cell: a federated one, with nothing that steadies it.
        threads: of each site, the same as in one process.

    Raises:
        FedcoreError: the run failed.
    """
    import torch
    from safetensors.torch import load_file

    kept, mark = folder / "confirmed.json", fingerprint(settings, source, cell)
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if found["settings"] == mark:
            return found
    begun = time.monotonic()
    ours = load_file(folder / "cells" / f"{cell.name}.safetensors")
    theirs = load_file(_run(folder, settings, source, cell, threads))
    apart = [float((ours[name] - theirs[name]).abs().max()) for name in ours]
    result = {
        "settings": mark,
        "cell": asdict(cell),
        "tensors": len(ours),
        "elements": sum(tensor.numel() for tensor in ours.values()),
        "equal": ours.keys() == theirs.keys()
        and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()),
        "largest_difference": max(apart),
        "seconds": time.monotonic() - begun,
    }
    kept.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def _run(folder: Path, settings: Settings, source: Source, cell: Cell, threads: int) -> Path:
    """Run the cell with real processes, and return the file of its last model."""
    work = folder / "real"
    work.mkdir(exist_ok=True)
    name = f"{cell.name.replace('.', '_')}-{time.strftime('%H%M%S')}"
    lab_pool = Lab.draw(settings, source, cell.seed)
    names = sorted(shares(lab_pool, cell.split, cell.seed, settings.batch_size))
    given = {
        "settings": asdict(settings),
        "cell": asdict(cell),
        "model": str(source.model),
        "texts": [asdict(text) for text in source.texts],
        "name": source.name,
        "threads": threads,
    }
    (work / "settings.json").write_text(json.dumps(given), encoding="utf-8")
    quoted = ", ".join(f'"{site}"' for site in names)
    run_file = work / "run.toml"
    run_file.write_text(
        f'[run]\nname = "{name}"\nrounds = {settings.rounds}\ndir = "."\n'
        f'[participants]\nsites = [{quoted}]\nround_deadline = "2h"\nidle_timeout = "60s"\n'
        f'[simulate]\nenv = {{ OMP_NUM_THREADS = "{threads}", HF_HUB_OFFLINE = "1", {_PATIENT} }}\n',
        encoding="utf-8",
    )
    root = str(Path(__file__).resolve().parents[2])
    start = [sys.executable, "-c", _START, root, str((work / "settings.json").resolve())]
    result = simulate(run_file, load_run_file(run_file), commands=dict.fromkeys(names, start))
    if result.status != 0:
        raise FedcoreError(result.message)
    return result.folder / "final" / "model.safetensors"


#: Finds the benchmarks, which are not installed, and leaves the path without the repository's root again.
_START = """
import runpy, sys
root = sys.argv.pop(1)
sys.path.insert(0, root)
import benchmarks
runpy.run_module("benchmarks.experiments.site", run_name="__main__", alter_sys=True)
"""
