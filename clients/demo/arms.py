"""The demo's worker processes, as the command runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from fedcore.errors import FedcoreError
from fedcore.simulation.processes import tail

from .progress import ArmsView

__all__ = ["SITE_ENV", "run_arms", "worker"]

#: The workers share the cores, and find everything that they need on the disk.
SITE_ENV: Final = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
_AT_ONCE: Final = 2
_POLL_SECONDS: Final = 0.1


def worker(data: Path, model: Path) -> list[str]:
    """Return the command of a worker; without more arguments it is a site of the federated run."""
    command = [sys.executable, "-P", "-m", "fedcore.demo.work"]
    return [*command, "--data", str(data), "--model", str(model)]


def run_arms(
    console: Console,
    command: Sequence[str],
    arms: Mapping[str, Sequence[str]],
    out: Path,
    done: Callable[[str, Any, float], None] | None = None,
) -> dict[str, Any]:
    """Run arms, two at a time.

    Args:
        console: where a terminal sees how far they are.
        command: what `worker` returned.
        arms: the arguments of each arm by its name.
        out: folder for ``NAME.json`` and ``NAME.log``.
        done: called with an arm's name, result and seconds as soon as it is there.

    Returns:
        What each arm wrote.

    Raises:
        FedcoreError: an arm failed; the text holds the end of its log.
    """
    waiting = dict(arms)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    results: dict[str, Any] = {}
    with ArmsView(console) as view:
        for name in arms:
            view.expect(name)
        try:
            while waiting or running:
                while waiting and len(running) < _AT_ONCE:
                    name = next(iter(waiting))
                    child = start_arm([*command, *waiting.pop(name)], out / name)
                    running[name] = child, time.monotonic()
                    view.start(name)
                for name, (child, since) in list(running.items()):
                    view.look(name, out / f"{name}.json")
                    if child.poll() is None:
                        continue
                    del running[name]
                    if child.returncode != 0:
                        said = tail(out / f"{name}.log")
                        raise FedcoreError(f"{name} ended with status {child.returncode}:\n{said}")
                    results[name] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
                    view.end(name)
                    if done is not None:
                        done(name, results[name], time.monotonic() - since)
                time.sleep(_POLL_SECONDS)
        finally:
            for child, _ in running.values():
                child.kill()
                child.wait()
    return {name: results[name] for name in arms}


def start_arm(command: list[str], out: Path) -> subprocess.Popen[bytes]:
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--out", str(out.with_suffix(".json"))],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **SITE_ENV},
        )
