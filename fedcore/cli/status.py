"""``fedcore status``: how a run stands, once or until it ends."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Protocol

import typer

from .common import INTERRUPTED, Timeout, reported
from .security import Insecure, InsecureNetwork, KitFolder

if TYPE_CHECKING:
    from fedcore.monitor.ask import Target
    from fedcore.protocol import StatusReply
    from fedcore.server.storage.logged import Series

__all__ = ["WATCH_SECONDS", "status"]

WATCH_SECONDS: Final = 0.5


class _Show(Protocol):
    def __call__(self, reply: StatusReply, note: str = "") -> object:
        """Show a snapshot, and a note below it."""


@reported
def status(  # noqa: PLR0917
    target: Annotated[
        str | None,
        typer.Argument(
            help="A run folder or a server's address.  [default: the kit's server]",
            metavar="[RUN_FOLDER|tcp://...]",
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Show it until the run ends.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole reply as JSON.")] = False,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Show the sites' training metrics.")
    ] = False,
    as_csv: Annotated[
        bool, typer.Option("--csv", help="With --metrics: print each point as a line of CSV.")
    ] = False,
    timeout: Timeout = 5.0,
    kit: KitFolder = None,
    insecure: Insecure = False,
    insecure_network: InsecureNetwork = False,
) -> None:
    """Show how a run stands: rounds, sites, bytes, metrics.

    Given a run folder, asks the server that works on it; without a server, shows what the folder holds.
    With --watch, a terminal gets a live view, a pipe one line per change (with --json, one JSON text per line).
    It goes on while the server is away, and ends with the run.
    With --metrics, shows what the sites logged while they trained.

    \b
    Examples:
      fedcore status runs/sentiment
      fedcore status runs/sentiment --watch
      fedcore status --kit kits/dashboard --json
      fedcore status runs/sentiment --metrics --csv > metrics.csv
    """
    folder = Path(target) if target is not None and not target.startswith("tcp://") else None
    if metrics or as_csv:
        if not metrics:
            raise typer.BadParameter("--csv needs --metrics")
        if watch or (as_json and as_csv):
            raise typer.BadParameter("--metrics goes with --json or --csv, and not with --watch")
        if folder is not None:
            series = _training_in(folder)
        else:
            from fedcore.monitor.ask import find_target

            series = _training_at(find_target(target, kit, insecure, insecure_network), timeout)
        _print_training(series, as_json=as_json, as_csv=as_csv)
        return
    from fedcore.monitor.ask import ask_status, find_target
    from fedcore.protocol import ENDED

    found = find_target(target, kit, insecure, insecure_network)
    if found is None:
        assert folder is not None
        from fedcore.server.storage.past import read_past

        reply = read_past(folder)
        _print_status(reply, as_json)
        if watch and reply.phase not in ENDED:
            typer.echo(f"no server works on {folder}; start it, then watch it", err=True)
    elif watch:
        _watch(found, folder, timeout, as_json)
    else:
        _print_status(ask_status(found.address, timeout, found.credentials, found.proxy), as_json)


def _training_in(folder: Path) -> list[Series]:
    from fedcore.monitor.ask import find_server
    from fedcore.server.storage.past import read_training

    find_server(folder)  # it raises where that is no run folder
    return read_training(folder)


def _training_at(server: Target | None, timeout: float) -> list[Series]:
    from fedcore.server.storage.logged import Series
    from fedcore.server.storage.metrics import Point

    assert server is not None
    with server.connect() as client:
        found = client.training(timeout)
    return [Series(one.site, one.name, [Point(*point) for point in one.points]) for one in found]


def _print_training(series: list[Series], *, as_json: bool, as_csv: bool) -> None:
    from . import training

    if as_json:
        typer.echo(training.as_json(series))
    elif as_csv:
        training.write_csv(series, sys.stdout)
    else:
        from rich.console import Console

        Console().print(training.table(series) if series else "no site has logged a metric yet")


def _print_status(reply: StatusReply, as_json: bool) -> None:
    if as_json:
        from fedcore.protocol import strict_json

        typer.echo(strict_json(reply.model_dump(exclude=reply.left_out()), indent=2))
        return
    from rich.console import Console

    from fedcore.monitor.view import render

    Console().print(render(reply))


@contextlib.contextmanager
def _shown(as_json: bool) -> Iterator[_Show]:
    """Give what shows snapshots: a live view on a terminal, else lines."""
    from fedcore.monitor.view import LiveView, PlainLines
    from fedcore.protocol import strict_json

    if as_json:

        def show(reply: StatusReply, note: str = "") -> None:
            if note:
                typer.echo(note, err=True)
            else:
                typer.echo(strict_json(reply.model_dump(exclude=reply.left_out())))

        yield show
    elif sys.stdout.isatty():
        with LiveView() as view:
            yield view.show
    else:
        yield PlainLines(typer.echo).show


def _watch(target: Target, folder: Path | None, timeout: float, as_json: bool) -> None:
    """Show snapshots until the run is over; a server that goes away and comes back is no error."""
    from fedcore.monitor.ask import snapshots
    from fedcore.protocol import ENDED

    phase = ""
    with _shown(as_json) as show:
        for reply, note in snapshots(target, folder, timeout):
            show(reply, note)
            phase = reply.phase
            if phase in ENDED:
                break
            time.sleep(WATCH_SECONDS)
    if phase != "done":
        raise typer.Exit(INTERRUPTED if phase == "stopped" else 1)
