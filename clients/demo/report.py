"""What the demo leaves behind: the report, the plot and the table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedcore.files.pictures import ARMS, GREY, alone, caption, new_figure, save, styled
from fedcore.monitor.view import human_bytes

from .tasks import Task

__all__ = ["make_report", "plot", "show"]


def make_report(
    results: Mapping[str, Any], summary: Mapping[str, Any], task: Task, seconds: float
) -> dict[str, Any]:
    """Compare the arms.

    Args:
        results: what every arm wrote: each site's name, ``federated`` and ``centralised``.
        summary: the run's summary.json.
        task: the settings.
        seconds: how long all of it took.

    Returns:
        The report. ``lead_over_best_local`` is positive where the federated model is better, whether less or more
        of the metric is; its standard error is that of a mean of paired differences, row by row.
    """
    sign = 1 if task.mode == "max" else -1
    local = {name: results[name]["value"] for name in task.sites}
    best = max(local, key=lambda name: sign * local[name])
    pairs = zip(results["federated"]["each"], results[best]["each"], strict=True)
    differences = [sign * (f - b) for f, b in pairs]
    lead = sum(differences) / len(differences)
    spread = math.sqrt(sum((d - lead) ** 2 for d in differences) / (len(differences) - 1))
    return {
        "task": task.kind,
        "seed": task.seed,
        "metric": task.metric,
        "mode": task.mode,
        "test_examples": len(differences),
        "local": local,
        "federated": results["federated"]["value"],
        "centralised": results["centralised"]["value"],
        "by_site": {name: result["by_site"] for name, result in results.items()},
        "lead_over_best_local": lead,
        "lead_standard_error": spread / math.sqrt(len(differences)),
        "federated_beats_every_local": bool(summary["ok"]) and lead > 0,
        "validation_by_round": [v["metrics"] for v in summary["versions"]],
        "best_version": summary["best_version"],
        "seconds": seconds,
        "bytes_received": summary["bytes_in"],
        "bytes_sent": summary["bytes_out"],
    }


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write the report as JSON."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


@styled
def plot(report: Mapping[str, Any], task: Task, path: Path) -> None:
    """Draw the comparison, and the global model over the rounds."""
    figure, (left, right) = new_figure(1, 2, size=(9, 4))
    names = [*report["local"], *ARMS]
    values = [*report["local"].values(), *(report[arm] for arm in ARMS)]
    bars = left.bar(
        [alone(name).replace(" ", "\n") if name in report["local"] else name for name in names],
        values,
        color=[ARMS.get(name, GREY) for name in names],
    )
    left.bar_label(bars, fmt="%.3f", fontsize=8)
    label = task.metric_label + (" (less is better)" if task.mode == "min" else "")
    left.set(ylabel=label, title="after the last round")
    curve = [v.get(f"val_{task.metric}", math.nan) for v in report["validation_by_round"]]
    right.plot(range(len(curve)), curve, marker="o", color=ARMS["federated"], label="federated")
    best = report["best_version"]
    right.scatter(
        [best], [curve[best]], s=120, facecolors="none", edgecolors="black", label="best model"
    )
    right.set(
        xlabel="round", ylabel=f"validation {task.metric_label} at the sites", title="over rounds"
    )
    right.legend()
    right.xaxis.get_major_locator().set_params(integer=True)
    top = 1.0 if task.mode == "max" else 1.1 * max(*values, *curve)
    for axes in (left, right):
        axes.set_ylim(0, top)
    lead, error = report["lead_over_best_local"], report["lead_standard_error"]
    rows = f"Left: n = {report['test_examples']} held-out {task.held_out}, seed {report['seed']}."
    against = (
        f"The federated model leads the best site by {lead:.3f} ± {error:.3f} (its standard error)."
    )
    caption(figure, [rows, against])
    save(figure, path)


def show(console: Console, report: Mapping[str, Any], task: Task, out: Path) -> None:
    """Print the comparison as a table: over all held-out rows, and over each site's."""
    better = ", less is better" if task.mode == "min" else ""
    table = Table(
        title=f"{task.metric_label} on {report['test_examples']} held-out {task.held_out}{better}"
    )
    table.add_column("trained on")
    for name in ("all", *(f"{site}'s" for site in task.sites)):
        table.add_column(name, justify="right")
    labels = {name: f"{name} alone" for name in task.sites}
    labels |= {
        "federated": "all sites, federated",
        "centralised": "all texts in one place",
    }
    values = {**report["local"], **{name: report[name] for name in ("federated", "centralised")}}
    for name, label in labels.items():
        cells = [values[name], *(report["by_site"][name][site] for site in task.sites)]
        table.add_row(
            label, *(f"{cell:.3f}" for cell in cells), style="bold" if name == "federated" else ""
        )
    console.print(table)
    console.print(
        f"federated leads the best site by {report['lead_over_best_local']:.3f} "
        f"(standard error {report['lead_standard_error']:.3f}); {report['seconds']:.0f} s; "
        f"{human_bytes(report['bytes_received'] + report['bytes_sent'])} moved",
        soft_wrap=True,
    )
    console.print(
        f"best model: {report['best_model']}\nplot: {out / 'report.png'}\nreport: {out / 'report.json'}",
        soft_wrap=True,
    )
