"""A run's status drawn for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .protocol import StatusReply

__all__ = ["human_bytes", "render"]


def human_bytes(count: float) -> str:
    """Return a count of bytes with a unit that leaves up to four digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def render(reply: StatusReply) -> RenderableType:
    """Draw a snapshot: the run's line, the sites, and the metrics of each model."""
    left = "" if reply.eta is None else f", about {reply.eta:.0f} s left"
    head = Text(
        f"run {reply.run}: {reply.phase}, round {reply.round} of {reply.rounds}, {reply.elapsed:.0f} s{left}; "
        f"received {human_bytes(reply.bytes_in)}, sent {human_bytes(reply.bytes_out)}"
    )
    sites = Table("site", "state", "examples", "training")
    for site in reply.sites:
        values = "  ".join(f"{name} {value:.3f}" for name, value in list(site.metrics.items())[:2])
        sites.add_row(
            site.site, site.state, "" if site.examples is None else str(site.examples), values
        )
    models = Table("model", *([reply.metric] if reply.metric else []), "sites")
    for version in reply.versions:
        mark = " *" if version.version == reply.best_version else ""
        value = version.metrics.get(reply.metric or "")
        cells = ["" if value is None else f"{value:.4f}"] if reply.metric else []
        models.add_row(f"{version.version}{mark}", *cells, ", ".join(version.participants))
    return Group(head, sites, models)
