"""A run's status drawn for a terminal, or written as plain lines."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedcore.protocol import ENDED, SiteStatus, StatusReply, VersionStatus
from fedcore.words import plural

__all__ = ["LiveView", "PlainLines", "human_bytes", "human_seconds", "render"]

_STYLES: Final = {
    "training": "cyan",
    "uploading": "blue",
    "delivered": "green",
    "lost": "red",
    "dropped": "red",
    "left": "dim",
    "absent": "dim",
}
_SHOWN_VERSIONS: Final = 8
_SHOWN_LEFT_OUT: Final = 3
_SHOWN_SITES: Final = 12
"""Up to so many sites have a line each; of more, a line says how many are in each state."""
_SHOWN_NOTES: Final = 6
_SHOWN_NAMES: Final = 6
_BAR_WIDTH: Final = 40


def human_bytes(count: float) -> str:
    """Return a count of bytes with a unit that leaves up to four digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """Return a duration such as ``40 ms``, ``9.4 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    if seconds < 0.1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def render(reply: StatusReply, note: str = "") -> RenderableType:
    """Draw a snapshot: the run's line, the round's bar, the metrics of each model, and the sites.

    Args:
        reply: the snapshot.
        note: shown below it, such as that the server does not answer any more.
    """
    parts: list[RenderableType] = [Text(_headline(reply), style="bold"), Text(_traffic(reply))]
    done, total, what = _progress(reply)
    if total:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total, done, width=_BAR_WIDTH), Text(what))
        parts.append(bar)
    if reply.versions:
        parts.append(_model_table(reply))
    harmed = any(v.worse_at for v in reply.versions if v.version == reply.best_version)
    if reply.phase != "done" or harmed or any(site.message for site in reply.sites):
        parts += _sites(reply)
    if reply.message:
        style = "red" if reply.phase == "failed" else ""
        parts.append(Text(reply.message, style=style))
    if note:
        parts.append(Text(note, style="yellow"))
    return Group(*parts)


def _sites(reply: StatusReply) -> list[RenderableType]:
    if len(reply.sites) <= _SHOWN_SITES:
        return [_site_table(reply.sites)]
    noted = [site for site in reply.sites if site.message]
    parts: list[RenderableType] = [_state_table(reply)]
    if noted:
        parts.append(_site_table(noted[:_SHOWN_NOTES]))
    if len(noted) > _SHOWN_NOTES:
        parts.append(
            Text(f"{plural(len(noted) - _SHOWN_NOTES, 'more site')} with a note; --json shows all")
        )
    return parts


def _state_table(reply: StatusReply) -> Table:
    """Count the sites in each state, the state of most of them first."""
    groups: dict[str, list[SiteStatus]] = {}
    for site in reply.sites:
        groups.setdefault(site.state, []).append(site)
    table = Table("state", "sites", "examples", "who")
    for state, sites in sorted(groups.items(), key=lambda item: -len(item[1])):
        examples = sum(site.examples or 0 for site in sites)
        table.add_row(
            Text(state, style=_STYLES.get(state, "")),
            str(len(sites)),
            f"{examples:,}" if examples else "",
            _names([site.site for site in sites]),
        )
    return table


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES])
    return shown if len(names) <= _SHOWN_NAMES else f"{shown} and {len(names) - _SHOWN_NAMES} more"


def _headline(reply: StatusReply) -> str:
    left = ""
    if reply.eta is not None and reply.phase not in ENDED:
        left = f", about {human_seconds(reply.eta)} left"
    return (
        f"run {reply.run}: {reply.phase}, round {reply.round} of {reply.rounds}, "
        f"{human_seconds(reply.elapsed)}{left}"
    )


def _traffic(reply: StatusReply) -> str:
    model = f"model {human_bytes(reply.model_bytes)}, " if reply.model_bytes else ""
    return f"{model}received {human_bytes(reply.bytes_in)}, sent {human_bytes(reply.bytes_out)}"


def _progress(reply: StatusReply) -> tuple[int, int, str]:
    """Return how far the round is: chunks while they come in, else sites that have delivered."""
    if reply.phase in (*ENDED, "waiting"):
        return 0, 0, ""
    if reply.chunks:
        return reply.chunks_done, reply.chunks, f"{reply.chunks_done} of {reply.chunks} chunks"
    delivered = sum(site.state in ("delivered", "uploading") for site in reply.sites)
    return delivered, len(reply.sites), f"{delivered} of {len(reply.sites)} sites delivered"


def _site_table(sites: Sequence[SiteStatus]) -> Table:
    scored = any(site.score is not None for site in sites)
    scores = ("score", "of the best") if scored else ()
    table = Table("site", "state", "examples", "training", *scores, "note")
    for site in sites:
        values = (site.score, site.best_score) if scored else ()
        table.add_row(
            site.site,
            Text(site.state, style=_STYLES.get(site.state, "")),
            "" if site.examples is None else f"{site.examples:,}",
            Text(_numbers(site)),
            *("" if value is None else f"{value:.4g}" for value in values),
            Text(site.message, overflow="ellipsis"),
        )
    return table


def _numbers(site: SiteStatus) -> str:
    """Show the training losses of a site, or its first metrics if none is a loss."""
    values = [(name, value) for name, value in site.metrics.items() if "loss" in name.lower()]
    values = values or list(site.metrics.items())
    return "  ".join(f"{name} {value:.4g}" for name, value in values[:2])


def _model_table(reply: StatusReply) -> Table:
    names = _metric_names(reply)
    table = Table()
    off = ["factors off"] if any(version.factors for version in reply.versions) else []
    for header in ("model", *names, *off, "time", "sites"):
        table.add_column(Text(header))
    hidden = len(reply.versions) - _SHOWN_VERSIONS
    for position, version in enumerate(reply.versions):
        best = version.version == reply.best_version
        if position < hidden and not best:
            continue
        label = "initial" if version.version == 0 else f"round {version.version}"
        cells = [_cell(version, name) for name in names]
        cells += [_off(version) for _ in off]
        seconds = "" if not version.seconds else human_seconds(version.seconds)
        table.add_row(
            f"{label}{_remarks(version, best=best)}",
            *cells,
            seconds,
            _names(version.participants) + _left_out(version),
            style="bold green" if best else "",
        )
    return table


def _metric_names(reply: StatusReply) -> list[str]:
    """The metric that selects comes first, then up to two others."""
    found = {name for version in reply.versions for name in version.metrics}
    first = [reply.metric] if reply.metric else []
    return first + sorted(found - set(first))[: 3 - len(first)]


def _left_out(version: VersionStatus) -> str:
    """Say whose updates a rule of several passes left out, the greatest score first."""
    out = sorted((of for of in version.updates if not of.weight), key=lambda of: -of.score)
    if not out:
        return ""
    shown = ", ".join(f"{of.site} {of.score:.3g}" for of in out[:_SHOWN_LEFT_OUT])
    more = f" and {len(out) - _SHOWN_LEFT_OUT} more" if len(out) > _SHOWN_LEFT_OUT else ""
    return f"; left out: {shown}{more} ({version.measure})"


def _off(version: VersionStatus) -> str:
    """Show how far the mean of adapters' factors is off the mean of their products."""
    factors = version.factors
    return "" if factors is None or factors.of_norm is None else f"{100 * factors.of_norm:.3g} %"


def _cell(version: VersionStatus, name: str) -> str:
    value = version.metrics.get(name)
    return "" if value is None else f"{value:.4g}"


class LiveView:
    """Redraws snapshots in place on a terminal; use it in a ``with`` block, which restores the cursor."""

    def __init__(self, console: Console | None = None) -> None:
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")

    def __enter__(self) -> LiveView:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, reply: StatusReply, note: str = "") -> None:
        """Draw a snapshot in the place of the last one, with a note below it."""
        self._live.update(render(reply, note), refresh=True)


class PlainLines:
    """Writes a line for whatever changed since the last snapshot: for logs and pipes."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._phase = self._note = ""
        self._states: dict[str, str] = {}
        self._versions: dict[int, str] = {}

    def show(self, reply: StatusReply, note: str = "") -> None:
        """Write what is new in a snapshot, and a note if it is another one than before."""
        for line in self._news(reply):
            self._write(line)
        if note and not self._note:
            self._write(note)
        elif self._note and not note:
            self._write("the server answers again")
        self._note = note

    def _news(self, reply: StatusReply) -> Iterator[str]:
        for version in reply.versions:
            line = _version_line(version, reply)
            if self._versions.get(version.version) != line:
                self._versions[version.version] = line
                yield line
        for site in reply.sites:
            if self._states.get(site.site) != site.state:
                self._states[site.site] = site.state
                if site.state in ("joined", "lost", "dropped", "left"):
                    yield f"{site.site}: {site.state}" + (
                        f" ({site.message})" if site.message else ""
                    )
        phase = f"{reply.phase}, round {reply.round} of {reply.rounds}"
        if phase != self._phase:
            self._phase = phase
            yield f"run {reply.run}: {phase}" + (f": {reply.message}" if reply.message else "")


def _version_line(version: VersionStatus, reply: StatusReply) -> str:
    label = "initial model" if version.version == 0 else f"model of round {version.version}"
    metrics = "".join(f", {name} {value:.4g}" for name, value in version.metrics.items())
    sites = f" of {_names(version.participants)}" if version.participants else ""
    sites += _left_out(version)
    if off := _off(version):
        metrics += f", factors {off} off"
    best = version.version == reply.best_version
    return f"{label}{sites}{metrics}{_remarks(version, best=best)}"


def _remarks(version: VersionStatus, *, best: bool) -> str:
    """Say that a model is the best one, and at which sites a better one is worse than the best before it."""
    found = ["best"] if best else []
    if version.worse_at:
        found.append(f"worse at {_names(version.worse_at)}")
    return f" ({'; '.join(found)})" if found else ""
