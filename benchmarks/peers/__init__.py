"""Other frameworks on the same work: each in a virtual environment of its own, which is set up here.

A peer that cannot be installed or run is reported with its error and costs the rest nothing. A peer's figure is
the median of its rounds after the first, which it spends in part on starting its processes.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fedcore.errors import ConfigError, FedcoreError

from ..processes import Family
from ..report import console
from ..workload import Work
from . import flower, nvflare
from .run import Outcome, PeerError

PEERS = {"nvflare": nvflare, "flower": flower}
_TORCH = "torch=="


def parse_peers(text: str) -> list[str]:
    """Return the names in a comma-separated list.

    Raises:
        ConfigError: one is not known.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in PEERS:
            raise ConfigError(f"--peers {name}: expected one or more of {', '.join(PEERS)}")
    return names


def measure_peer(name: str, work: Work) -> dict[str, Any]:
    """Return the peer's round times and peaks, or ``error`` with what went wrong."""
    peer = PEERS[name]
    result: dict[str, Any] = {"version": peer.VERSION, "settings": peer.SETTINGS}
    try:
        python = install(name, peer.REQUIREMENT)
        with tempfile.TemporaryDirectory(dir=os.environ.get("FEDCORE_WORK")) as folder:
            console.print(f"{name} {peer.VERSION}: {work.rounds} rounds, {work.sites} sites ...")
            with Family() as family:
                outcome: Outcome = peer.run(python, Path(folder), work, family)
    except (PeerError, FedcoreError, OSError, subprocess.SubprocessError) as error:
        console.print(f"{name}: not measured: {error}", highlight=False, markup=False)
        return {**result, "error": str(error)}
    return {
        **result,
        "round_s": typical(outcome.seconds),
        "round_samples_s": outcome.seconds,
        "peak_rss_bytes": family.peak(*outcome.server_words),
        "peak_rss_process": outcome.server_process,
        "peaks_by_process": _by_command(family),
    }


def typical(seconds: list[float]) -> float:
    """Return the median of the rounds after the first, into which the start of a peer's processes falls."""
    return statistics.median(seconds[1:] or seconds)


def _by_command(family: Family) -> list[dict[str, Any]]:
    """Return the largest processes, for a reader who wants to know more than the server's peak."""
    order = sorted(family.peaks, key=lambda pid: -family.peaks[pid])[:12]
    return [
        {"command": family.commands[pid][:160], "peak_rss_bytes": family.peaks[pid]}
        for pid in order
    ]


def cache_folder() -> Path:
    """Return where the peers' environments are kept."""
    root = os.environ.get("FEDCORE_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "fedcore") / "peers"


def torch_pin() -> str:
    """Return the version of torch that this project is tested with."""
    lines = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(_TORCH))


def install(name: str, requirement: str) -> Path:
    """Return the interpreter of the peer's environment, which is made on first use.

    Raises:
        PeerError: it could not be installed; the text ends with pip's last lines.
    """
    wanted = [requirement, torch_pin()]
    folder = cache_folder() / requirement.replace("==", "-")
    python = folder / "bin" / "python"
    done = folder / "installed"
    if done.exists() and done.read_text(encoding="utf-8").split() == wanted:
        return python
    console.print(f"{name}: installing {' '.join(wanted)} in {folder} ...", highlight=False)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", *wanted],
    ):
        done_process = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        if done_process.returncode != 0:
            lines = (done_process.stdout + done_process.stderr).strip().splitlines()
            raise PeerError("cannot be installed:\n" + "\n".join(lines[-5:]))
    done.write_text("\n".join(wanted) + "\n", encoding="utf-8")
    console.print(f"{name}: installed in {time.monotonic() - begin:.0f} s")
    return python
