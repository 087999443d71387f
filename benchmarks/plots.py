"""Plots of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import MIB, console

_OURS, _LIMIT, _PEERS = "#1f77b4", "#7f7f7f", "#d98032"


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
    console.print(f"drawn: {path}", highlight=False)


def _axes(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2))
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_rounds(result: dict[str, Any], path: Path) -> None:
    """Draw the seconds of a round as bars on a logarithmic axis."""
    bars = [
        ("raw TCP", result["limit_s"], _LIMIT),
        ("bare ZeroMQ", result["zeromq_s"], _LIMIT),
        ("fedcore", result["round_s"], _OURS),
    ]
    bars += [
        (f"{name} {peer['version']}", peer["round_s"], _PEERS)
        for name, peer in result["peers"].items()
        if "round_s" in peer
    ]
    figure, axes = _axes(
        f"Seconds per round: {result['bytes'] / MIB:.0f} MiB fp32, {result['sites']} sites, no training"
    )
    names, values, colors = zip(*bars, strict=True)
    drawn = axes.barh(names, values, color=colors)
    axes.bar_label(drawn, labels=[f" {value:.3g} s" for value in values])
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 2, max(values) * 2)
    axes.invert_yaxis()
    _save(figure, path)


def plot_memory(result: dict[str, Any], path: Path) -> None:
    """Draw the server's peak RSS as a bar per case, with the idle server's share below."""
    figure, axes = _axes(
        f"Server peak RSS in MiB at a budget of {result['memory_bytes'] / MIB:.0f} MiB"
    )
    names = [f"{row['bytes'] / MIB:.0f} MiB\n{row['sites']} sites" for row in result["rows"]]
    idle = result["idle_rss_bytes"] / MIB
    axes.bar(names, [idle] * len(names), color=_LIMIT, label="idle")
    over = [row["peak_rss_bytes"] / MIB - idle for row in result["rows"]]
    drawn = axes.bar(names, over, bottom=idle, color=_OURS, label="over that")
    axes.bar_label(drawn, labels=[f"{idle + x:.0f}" for x in over])
    bound = idle + result["memory_bytes"] / MIB
    axes.axhline(bound, color="black", linewidth=0.8, linestyle="--", label="idle + budget")
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def plot_kernels(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw GB/s of update bytes per dtype, one bar for each instruction set, and memcpy's line."""
    figure, axes = _axes(f"Mean of {rows[0]['inputs']} updates, one core: GB/s of update bytes")
    levels = list(dict.fromkeys(row["simd"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    width = 0.8 / len(levels)
    for i, level in enumerate(levels):
        values = [row["mean_read_gb_s"] for row in rows if row["simd"] == level]
        places = [j + (i - (len(levels) - 1) / 2) * width for j in range(len(dtypes))]
        axes.bar_label(axes.bar(places, values, width, label=level), fmt="%.1f", fontsize=7)
    axes.set_xticks(range(len(dtypes)), dtypes)
    copies = sorted(row["memcpy_read_gb_s"] for row in rows)
    axes.axhline(
        copies[len(copies) // 2], color="black", linewidth=0.8, linestyle="--", label="memcpy reads"
    )
    axes.legend(frameon=False, fontsize=8)
    _save(figure, path)
