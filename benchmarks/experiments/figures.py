"""The experiments' figures."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedcore.files.pictures import ARMS, GREY, SITES, alone, caption, new_figure, save, styled

from .peft import STEADY
from .summary import steady_cells

__all__ = ["draw_peft", "draw_sft", "draw_steady", "draw_swing"]

_BAND: Final = "Line: mean over the seeds; band: least to greatest of them."
_THIN: Final = "Thin lines: one seed each; thick line: their mean."


def _band(axes: Any, curves: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """Draw the mean of curves over the seeds, and the range between the least and the greatest."""
    columns = list(zip(*curves, strict=True))
    at = range(len(columns))
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


def _grid(panels: int, columns: int) -> tuple[Any, list[Any]]:
    """Return a figure and its panels, row by row, all with the same scale of accuracy."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure, grid = new_figure(rows, columns, size=(3.6 * columns, 2.9 * rows), share_y=True)
    for axes in grid[panels:]:
        axes.set_visible(False)
    for number, axes in enumerate(grid[:panels]):
        axes.tick_params(labelleft=True)
        if number % columns == 0:
            axes.set_ylabel("accuracy on all sites' test rows")
    return figure, grid[:panels]


@styled
def draw_peft(cells: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each method and split."""
    pairs = dict.fromkeys(
        (r["cell"]["method"], r["cell"]["split"])
        for r in cells.values()
        if r["cell"]["split"] != "pooled" and r["cell"]["steady"] == "plain"
    )
    figure, grid = _grid(len(pairs), 3)
    for axes, (method, split) in zip(grid, pairs, strict=True):
        _panel(axes, cells, method, split)
        axes.legend(loc="lower right")
    low, high = grid[0].get_ylim()
    grid[0].set_ylim(bottom=low - 0.4 * (high - low))  # room for the keys
    caption(figure, [_BAND])
    save(figure, path)


@styled
def draw_steady(cells: Mapping[str, Any], split: str, path: Path) -> bool:
    """Draw plain averaging beside each of what was tried against its swings: a thin line for a seed, a thick mean.

    Returns:
        Whether anything was tried; nothing is drawn if not.
    """
    found = steady_cells(cells, split)
    tried = [name for name in STEADY if name in found and name != "plain"]
    if not tried:
        return False
    figure, grid = _grid(len(tried), 2)
    for axes, name in zip(grid, tried, strict=True):
        for steady, colour in (("plain", GREY), (name, ARMS["federated"])):
            steps = found[steady][0]["steps_per_round"]
            curves = [result["curves"]["federated"]["accuracy"] for result in found[steady]]
            label = f"{steady}: {len(curves[0]) - 1} rounds of {steps} steps"
            _seeds(axes, curves, steps, colour, label)
        method = found[name][0]["cell"]["method"]
        axes.set_title(f"{method}, {_split_title(split)}: {name}")
        axes.set_xlabel("steps at each site")
        axes.legend(loc="lower right")
    caption(figure, [_THIN])
    save(figure, path)
    return True


def _seeds(
    axes: Any, curves: Sequence[Sequence[float]], steps: int, colour: str, label: str
) -> None:
    """Draw a thin line for each seed, and a thick one for their mean; ``steps`` lie between two points."""
    at = [place * steps for place in range(len(curves[0]))]
    for curve in curves:
        axes.plot(at, curve, color=colour, linewidth=0.7, alpha=0.7)
    means = [statistics.fmean(column) for column in zip(*curves, strict=True)]
    axes.plot(at, means, color=colour, linewidth=2.2, label=label)


@styled
def draw_swing(found: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Draw plain averaging beside each other way."""
    plain, *others = found
    figure, grid = _grid(len(others), 3)
    for axes, name in zip(grid, others, strict=True):
        for way, colour in ((plain, GREY), (name, ARMS["federated"])):
            first = found[way][0]
            curves = [result["accuracy"] for result in found[way]]
            steps = first["rounds"] * first["steps_per_round"] // (len(curves[0]) - 1)
            label = (
                f"{way}: {first['sampled']} sites a round, {first['steps_per_round']} steps each"
            )
            _seeds(axes, curves, steps, colour, label)
        axes.set_title(name)
        axes.set_xlabel("steps of a site that always takes part")
        axes.legend(loc="lower right")
    caption(figure, [_THIN])
    save(figure, path)


def _panel(axes: Any, cells: Mapping[str, Any], method: str, split: str) -> None:
    first = next(
        r for r in cells.values() if (r["cell"]["method"], r["cell"]["split"]) == (method, split)
    )
    sites = [name for name in first["curves"] if name != "federated"]
    for number, site in enumerate(sites):
        label = alone(site) if split == "natural" else ("each site alone" if not number else "_")
        colour = SITES[number % len(SITES)] if split == "natural" else GREY
        _band(axes, _curves(cells, site, method=method, split=split, steady="plain"), colour, label)
    pooled = _curves(cells, "centralised", method=method, split="pooled", steady="plain")
    if pooled:
        _band(axes, pooled, ARMS["centralised"], "centralised")
    _band(
        axes,
        _curves(cells, "federated", method=method, split=split, steady="plain"),
        ARMS["federated"],
        "federated",
    )
    axes.set_title(f"{method}, {_split_title(split)}")
    axes.set_xlabel("round")


@styled
def draw_sft(runs: Mapping[int, Mapping[str, Any]], path: Path) -> None:
    """Draw the validation loss of every arm over steps; a panel for each seed."""
    figure, row = new_figure(1, len(runs), size=(4.6 * len(runs) + 1.6, 3.8), share_y=True)
    for axes, (seed, curves) in zip(row, runs.items(), strict=True):
        _sft_panel(axes, curves)
        axes.set_title(f"seed {seed}")
        axes.set_xlabel("steps at each site")
    row[0].set_ylabel("validation loss, mean of the sites' sets")
    caption(
        figure,
        [
            "One panel a seed. A site in the federation jumps to the shared model where a round starts."
        ],
    )
    row[-1].legend(bbox_to_anchor=(1.0, 1.0), loc="upper left")
    save(figure, path)


def _sft_panel(axes: Any, curves: Mapping[str, Any]) -> None:
    """Draw the arms of one seed; a federated site's curve jumps where a round starts."""
    sites = [name for name in curves if name not in ARMS]
    colours = dict(zip(sites, SITES, strict=False)) | ARMS
    for name, curve in curves.items():
        points = [(p["step"], _mean(p)) for p in curve["points"] if p["who"] == name]
        whole = name in ARMS
        axes.plot(
            *zip(*points, strict=True),
            "-" if whole else "--",
            color=colours[name],
            label=name if whole else alone(name),
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


def _mean(point: Mapping[str, Any]) -> float:
    return statistics.fmean(point["loss"].values())
