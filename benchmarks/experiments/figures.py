"""The experiments' figures."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from .peft import STEADY
from .summary import steady_cells

__all__ = ["draw_peft", "draw_sft"]

_COLOURS: Final = {"federated": "#1f77b4", "centralised": "#2ca02c", "combined": "#2ca02c"}
_SITE: Final = "#9a9a9a"
_ARMS: Final = ("#d98032", "#8c564b", "#9467bd", "#17becf")


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=80, bbox_inches="tight", metadata={"Software": None})


def _band(
    axes: Any, curves: Sequence[Sequence[float]], colour: str, label: str, steps: int = 1
) -> None:
    """Draw the mean of curves over the seeds, and the range between the least and the greatest."""
    columns = list(zip(*curves, strict=True))
    at = [place * steps for place in range(len(columns))]
    axes.plot(at, [statistics.fmean(c) for c in columns], color=colour, label=label, linewidth=1.6)
    axes.fill_between(
        at,
        [min(c) for c in columns],
        [max(c) for c in columns],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )


def _curves(cells: Mapping[str, Any], name: str, **wanted: str) -> list[list[float]]:
    return [
        result["curves"][name]["accuracy"]
        for result in cells.values()
        if name in result["curves"]
        and all(result["cell"][key] == value for key, value in wanted.items())
    ]


def _split_title(split: str) -> str:
    return "natural domains" if split == "natural" else f"Dirichlet alpha {split}"


def draw_peft(cells: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each method and split, and one for what steadies averaging."""
    from matplotlib.figure import Figure

    pairs = dict.fromkeys(
        (r["cell"]["method"], r["cell"]["split"])
        for r in cells.values()
        if r["cell"]["split"] != "pooled" and r["cell"]["steady"] == "plain"
    )
    tried = dict.fromkeys(r["cell"]["steady"] for r in cells.values())
    panels = len(pairs) + (len(tried) > 1)
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, (method, split) in zip(grid, pairs, strict=False):
        _panel(axes, cells, method, split)
    if len(tried) > 1:
        _steady_panel(grid[len(pairs)], cells)
    for axes in grid[panels:]:
        axes.set_visible(False)
    for axes in grid[:panels]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelleft=True)
        axes.legend(frameon=False, fontsize=7, loc="lower right")
    _save(figure, path)


def _panel(axes: Any, cells: Mapping[str, Any], method: str, split: str) -> None:
    first = next(
        r for r in cells.values() if (r["cell"]["method"], r["cell"]["split"]) == (method, split)
    )
    sites = [name for name in first["curves"] if name != "federated"]
    for number, site in enumerate(sites):
        label = (
            f"{site} alone" if split == "natural" else ("each site alone" if not number else "_")
        )
        colour = _ARMS[number % len(_ARMS)] if split == "natural" else _SITE
        _band(axes, _curves(cells, site, method=method, split=split, steady="plain"), colour, label)
    pooled = _curves(cells, "centralised", method=method, split="pooled", steady="plain")
    if pooled:
        _band(axes, pooled, _COLOURS["centralised"], "centralised")
    _band(
        axes,
        _curves(cells, "federated", method=method, split=split, steady="plain"),
        _COLOURS["federated"],
        "federated",
    )
    axes.set_title(f"{method}, {_split_title(split)}", fontsize=9, loc="left")
    axes.set(xlabel="round", ylabel="accuracy on all sites' test rows")


def _steady_panel(axes: Any, cells: Mapping[str, Any]) -> None:
    tried = next(r["cell"] for r in cells.values() if r["cell"]["steady"] != "plain")
    found = steady_cells(cells, tried["split"])
    for name, colour in zip(STEADY, (_COLOURS["federated"], *_ARMS), strict=False):
        if name in found:
            curves = [result["curves"]["federated"]["accuracy"] for result in found[name]]
            _band(axes, curves, colour, name, found[name][0]["steps_per_round"])
    title = f"{tried['method']}, {_split_title(tried['split'])}: what steadies"
    axes.set_title(title, fontsize=9, loc="left")
    axes.set(xlabel="local steps")


def draw_sft(curves: Mapping[str, Any], path: Path) -> None:
    """Draw the validation loss of every arm over steps; a federated site's curve jumps where a round starts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    sites = [name for name in curves if name not in ("federated", "combined")]
    colours = dict(zip(sites, _ARMS, strict=False)) | _COLOURS
    for name, curve in curves.items():
        points = [(p["step"], _mean(p)) for p in curve["points"] if p["who"] == name]
        style = "-" if name in ("federated", "combined") else "--"
        label = name if name in ("federated", "combined") else f"{name} alone"
        axes.plot(
            *zip(*points, strict=True),
            style,
            color=colours[name],
            label=label,
            marker="o",
            markersize=3,
        )
    shared = {p["step"]: _mean(p) for p in curves["federated"]["points"] if p["who"] == "federated"}
    starts = sorted(shared)
    for site in sites:
        ends = {p["step"]: _mean(p) for p in curves["federated"]["points"] if p["who"] == site}
        pieces = [(begin, end) for begin, end in itertools.pairwise(starts) if end in ends]
        for number, (begin, end) in enumerate(pieces):
            axes.plot(
                [begin, end, end],
                [shared[begin], ends[end], shared[end]],
                color=colours[site],
                linewidth=1,
                label="_" if number else f"{site} in the federation",
            )
    axes.set(xlabel="steps at each site", ylabel="validation loss, mean of the sites' sets")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    _save(figure, path)


def _mean(point: Mapping[str, Any]) -> float:
    return statistics.fmean(point["loss"].values())
