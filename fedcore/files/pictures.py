"""The look of every picture that fedcore draws: sizes, colours, names of the arms, and the files it is kept in.

Colours are those of Okabe and Ito (2008), which people who see few colours can tell apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

from fedcore.errors import ConfigError

__all__ = ["ARMS", "GREY", "SITES", "alone", "caption", "new_figure", "save", "styled"]

ARMS: Final = {"federated": "#0072B2", "centralised": "#009E73"}
"""What is trained on the data of all sites."""
SITES: Final = ("#E69F00", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
"""One site after the other, where they are told apart."""
GREY: Final = "#8C8C8C"
"""Whatever something is compared with."""
_P = ParamSpec("_P")
_R = TypeVar("_R")
_DPI: Final = 300
_STYLE: Final[dict[Any, Any]] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedcore",
    "pdf.fonttype": 42,
    "savefig.dpi": _DPI,
}


def alone(site: str) -> str:
    """Return what a site is called that trains by itself."""
    return f"{site} alone"


def styled(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    """Give a function that draws the style of this module while it runs; the caller's own settings stay.

    Raises:
        ConfigError: when the function is called, if matplotlib is not installed.
    """

    @functools.wraps(draw)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            import matplotlib as mpl
        except ImportError:
            raise ConfigError(
                "a plot needs matplotlib; install it with: pip install 'fedcore-fl[plot]'"
            ) from None
        with mpl.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return run


def new_figure(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float], share_y: bool = False
) -> tuple[Any, list[Any]]:
    """Return a figure and its panels, row by row; call it in a function that is `styled`.

    Args:
        rows, columns: of panels.
        size: of the whole figure, in inches.
        share_y: whether all panels have one scale.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    return figure, list(panels.ravel())


def caption(figure: Any, lines: Sequence[str]) -> None:
    """Write below a figure what its numbers and bands are."""
    figure.supxlabel("\n".join(lines), fontsize=8, color="#404040", x=0.01, ha="left")


def save(figure: Any, path: Path, *, beside: tuple[str, ...] = (".svg", ".pdf")) -> None:
    """Write a figure, of which a PNG has 300 dots an inch; equal figures give equal files.

    Args:
        figure: what `new_figure` gave.
        path: the picture; its ending says which kind.
        beside: endings of further files with its name.
    """
    metadata = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    for ending in dict.fromkeys((path.suffix, *beside)):
        figure.savefig(path.with_suffix(ending), metadata=metadata.get(ending))
