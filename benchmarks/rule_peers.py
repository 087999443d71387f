"""Rules and optimizers beside those of other frameworks, on the same updates: time, memory, and what is right.

Another framework's function gets its updates in memory and is timed alone. fedcore reads them from files and
writes a file. Each call is a process of its own; its peak is that of the whole process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedcore import _core
from fedcore.errors import FedcoreError
from fedcore.model_file import create_model

from .peers import flower, install, nvflare
from .peers.run import PeerError
from .report import console

TENSORS = 16
PAIRS = {
    "median": {"flower": "FedMedian"},
    "trimmed-mean": {"flower": "FedTrimmedAvg"},
    "krum": {"flower": "Krum"},
    "adam": {"flower": "FedAdam", "nvflare": "FedOpt (torch.optim.Adam)"},
}
_REQUIREMENTS = {"flower": flower.REQUIREMENT, "nvflare": nvflare.REQUIREMENT}
_SCRIPTS = Path(__file__).parent / "peers" / "rules"
_HEAD, _TRIM, _NOISE = 1 << 20, 4, 1e-3
_RATE, _BETA1, _BETA2, _TAU = 0.01, 0.9, 0.99, 0.001

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Updates:
    """Files of updates, each as a flat array and as a model; they lie about 1e-3 from the base in each element."""

    folder: Path
    names: list[str]

    def head(self, name: str, count: int = _HEAD) -> Array:
        return np.fromfile(self.folder / f"{name}.f32", np.float32, count).astype(np.float64)

    def heads(self) -> Array:
        return np.stack([self.head(name) for name in self.names])


def make(folder: Path, size: int, sites: int, bad: float | None = None) -> Updates:
    """Write a base and an update for each site; `bad` is in every element of the last one."""
    count = size // 4 // TENSORS * TENSORS
    layout = _core.Layout([(f"t{i:02d}", "F32", [count // TENSORS]) for i in range(TENSORS)])
    names = [f"update-{k:02d}" for k in range(sites)]
    base = np.random.default_rng(sites).standard_normal(count).astype(np.float32)
    for k, name in enumerate(["base", *names]):
        values = base
        if name != "base":
            noise = np.random.default_rng(k).standard_normal(count).astype(np.float32)
            # Krum's choice is the one whose noise is the least: of the site in the middle.
            values = base + np.float32(_NOISE * (1 + 0.01 * abs(k - 1 - sites // 2))) * noise
        if bad is not None and name == names[-1]:
            values = np.full_like(base, bad)
        values.tofile(folder / f"{name}.f32")
        model = create_model(folder / f"{name}.safetensors", layout)
        for i, view in enumerate(model.views().values()):
            view[:] = values[i * count // TENSORS : (i + 1) * count // TENSORS].view(np.uint8).data
        model.file.sync()
    (folder / "plan.json").write_text(json.dumps({"tensors": TENSORS, "updates": names}), "utf-8")
    return Updates(folder, names)


def run(framework: str, rule: str, folder: Path) -> dict[str, Any]:
    """Call a framework's rule in a process of its own.

    Raises:
        PeerError: it could not be installed, or failed.
    """
    requirement = _REQUIREMENTS.get(framework)
    python = Path(sys.executable) if requirement is None else install(framework, requirement)
    (folder / "out.raw").unlink(missing_ok=True)
    for left in ("out.safetensors", "momentum", "variance"):
        (folder / left).unlink(missing_ok=True)
    done = subprocess.run(
        [str(python), "-P", str(_SCRIPTS / f"with_{framework}.py"), str(folder), rule],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0"},
    )
    if done.returncode != 0:
        raise PeerError("\n".join(done.stderr.strip().splitlines()[-5:]))
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def expected(rule: str, updates: Updates, framework: str) -> Array:
    """Return what the first elements of a result are, by NumPy in binary64 from the papers' formulas.

    FedAdam begins with v = tau^2 (Reddi et al. 2021), and keeps m and v in
    binary32. NVFlare's Adam is torch's: v begins with 0, and both moments are corrected.
    """
    heads = updates.heads()
    if rule == "median":
        return np.asarray(np.median(heads, axis=0))
    if rule == "trimmed-mean":
        return np.asarray(np.sort(heads, axis=0)[_TRIM:-_TRIM].mean(axis=0))
    base = updates.head("base")
    step = heads.mean(axis=0) - base
    if framework == "nvflare":
        return np.asarray(base + _RATE * step / (np.abs(step) + _TAU))
    m = ((1 - _BETA1) * step).astype(np.float32).astype(np.float64)
    v = (_BETA2 * _TAU**2 + (1 - _BETA2) * step**2).astype(np.float32).astype(np.float64)
    return np.asarray(base + _RATE * m / (np.sqrt(v) + _TAU))


def judge(rule: str, updates: Updates, result: dict[str, Any], framework: str) -> str:
    """Say in a phrase how a result compares with what is right."""
    found = np.fromfile(updates.folder / "out.raw", result["dtype"])
    if rule == "krum":
        right = f"update-{len(updates.names) // 2:02d}"
        chosen = [n for n in updates.names if np.array_equal(updates.head(n), found[:_HEAD])]
        return "right" if chosen == [right] else f"{' '.join(chosen)} chosen, not {right}"
    want = expected(rule, updates, framework)
    off = np.abs(found[: len(want)].astype(np.float64) - want)
    wide = " as float64" if result["dtype"] == "float64" else ""
    # Half a unit in the last place of the exact value, and a hair.
    rounded = off <= np.spacing(np.abs(want).astype(np.float32)).astype(np.float64) * 0.5001
    wrong = 1 - rounded.mean()
    if off.max() > _NOISE / 100:
        return f"another formula: off by up to {off.max():.2g}" + wide
    if wrong < 1e-4:
        return "right" + wide
    return f"{wrong:.1%} not rounded right, by up to {off.max():.2g}" + wide


def compare(
    size: int, sites: int, rules: Sequence[str] = tuple(PAIRS), peers: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Measure fedcore and each peer on the same updates, rule after rule."""
    rows = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("FEDCORE_WORK")) as folder:
        updates = make(Path(folder), size, sites)
        for rule in rules:
            ours: dict[str, Any] | None = None
            for framework in ("fedcore", *(p for p in PAIRS[rule] if p in peers)):
                called = PAIRS[rule].get(framework, rule)
                row: dict[str, Any] = {"rule": rule, "framework": framework, "called": called}
                console.print(f"{framework}: {called} ...", highlight=False)
                try:
                    result = run(framework, rule, updates.folder)
                    row |= {
                        "seconds": statistics.median(result["seconds"]),
                        "peak_rss_bytes": result["peak"],
                        "verdict": judge(rule, updates, result, framework),
                    }
                except (PeerError, FedcoreError, OSError) as error:
                    row["error"] = str(error)
                ours = ours or row
                if "seconds" in row and "seconds" in ours:
                    row["times_as_long"] = row["seconds"] / ours["seconds"]
                    row["times_the_memory"] = row["peak_rss_bytes"] / ours["peak_rss_bytes"]
                rows.append(row)
    return rows


def faults(peers: Sequence[str]) -> list[dict[str, Any]]:
    """Give inputs that show where a result is wrong: what each framework makes of them."""
    rows = []
    with tempfile.TemporaryDirectory(dir=os.environ.get("FEDCORE_WORK")) as folder:
        updates = make(Path(folder), 1 << 16, 16, bad=float("nan"))
        for framework in ("fedcore", *(p for p in peers if p == "flower")):
            result = run(framework, "median", updates.folder)
            if "refused" in result:
                text = "refused, and the update is named"
            else:
                out = np.fromfile(updates.folder / "out.raw", result["dtype"])
                text = f"{np.isnan(out).mean():.0%} of the elements are NaN"
            rows.append(
                {"input": "median; NaN from 1 of 16", "framework": framework, "gives": text}
            )
        for framework in ("fedcore", *(p for p in peers if p == "nvflare")):
            value = run(framework, "small-steps", updates.folder)["value"]
            what = "a bf16 model of 1, ten steps of 0.00078"
            rows.append({"input": what, "framework": framework, "gives": f"{value:.6f}"})
    return rows
