"""Plots of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedcore.files.pictures import ARMS, GREY, SITES, caption, new_figure, save, styled

from .report import MIB, console

_OURS, _LIMIT, _PEERS = ARMS["federated"], GREY, SITES[3]


def _save(figure: Any, path: Path) -> None:
    save(figure, path)
    console.print(f"drawn: {path}, .svg, .pdf", highlight=False)


def _axes(title: str) -> tuple[Any, Any]:
    figure, (axes,) = new_figure(size=(7, 3.2))
    axes.set_title(title)
    return figure, axes


@styled
def plot_rounds(result: dict[str, Any], path: Path) -> None:
    """Draw the seconds of a round as points on a logarithmic axis, where a bar's length would mean nothing."""
    points = [
        ("raw TCP", result["limit_s"], _LIMIT),
        ("bare ZeroMQ", result["zeromq_s"], _LIMIT),
        ("fedcore", result["round_s"], _OURS),
    ]
    points += [
        (f"{name} {peer['version']}", peer["round_s"], _PEERS)
        for name, peer in result["peers"].items()
        if "round_s" in peer
    ]
    figure, axes = _axes("Seconds per round")
    names, values, colors = zip(*points, strict=True)
    axes.hlines(names, min(values) / 2, values, color="#D0D0D0", linewidth=1, zorder=1)
    axes.scatter(values, names, color=colors, s=60, zorder=2)
    for name, value in zip(names, values, strict=True):
        axes.annotate(
            f"{value:.3g} s", (value, name), (8, 0), textcoords="offset points", va="center"
        )
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 2, max(values) * 3)
    axes.set_xlabel("seconds, logarithmic")
    axes.invert_yaxis()
    caption(
        figure,
        [
            f"{result['bytes'] / MIB:.0f} MiB fp32, {result['sites']} sites, no training; medians of one run."
        ],
    )
    _save(figure, path)


@styled
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
    axes.set_ylabel("MiB")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption(
        figure, ["The highest of several rounds a case. Idle: the interpreter with its libraries."]
    )
    _save(figure, path)


@styled
def plot_kernels(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw GB/s of update bytes per dtype, one bar for each instruction set, and memcpy's line."""
    figure, axes = _axes(f"Mean of {rows[0]['inputs']} updates, one core: GB/s of update bytes")
    levels = list(dict.fromkeys(row["simd"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    width = 0.8 / len(levels)
    for i, level in enumerate(levels):
        values = [row["mean_read_gb_s"] for row in rows if row["simd"] == level]
        places = [j + (i - (len(levels) - 1) / 2) * width for j in range(len(dtypes))]
        axes.bar_label(
            axes.bar(places, values, width, label=level, color=SITES[i]), fmt="%.1f", fontsize=8
        )
    axes.set_xticks(range(len(dtypes)), dtypes)
    copies = sorted(row["memcpy_read_gb_s"] for row in rows)
    axes.axhline(
        copies[len(copies) // 2], color="black", linewidth=0.8, linestyle="--", label="memcpy reads"
    )
    axes.legend()
    _save(figure, path)
