"""The commands that steer a run: pause, resume, stop; `fedcore evaluate` without tasks is one as well."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.errors import ConfigError, FedcoreError

from .common import Timeout, reported
from .security import Insecure, InsecureNetwork, KitFolder

if TYPE_CHECKING:
    from fedcore.protocol import Steer

__all__ = ["register", "say"]

Target = Annotated[
    str | None,
    typer.Argument(
        help="A run folder or a server's address.  [default: the kit's server]",
        metavar="[RUN_FOLDER|tcp://...]",
    ),
]


@reported
def pause(
    target: Target = None,
    kit: KitFolder = None,
    insecure: Insecure = False,
    insecure_network: InsecureNetwork = False,
    timeout: Timeout = 5.0,
) -> None:
    """Begin no other round after the one under way.

    `fedcore resume` lets the run go on. A server that is started again is no longer paused.

    \b
    Examples:
      fedcore pause runs/sentiment
      fedcore pause --kit kits/ops
    """
    say("pause", (target, kit, insecure, insecure_network), timeout)


@reported
def resume(
    target: Target = None,
    kit: KitFolder = None,
    insecure: Insecure = False,
    insecure_network: InsecureNetwork = False,
    timeout: Timeout = 5.0,
) -> None:
    """Let a paused run go on.

    \b
    Examples:
      fedcore resume runs/sentiment
      fedcore resume --kit kits/ops
    """
    say("resume", (target, kit, insecure, insecure_network), timeout)


@reported
def stop(
    target: Target = None,
    kit: KitFolder = None,
    insecure: Insecure = False,
    insecure_network: InsecureNetwork = False,
    timeout: Timeout = 5.0,
) -> None:
    """End a run with what is committed, as Ctrl-C does.

    \b
    Examples:
      fedcore stop runs/sentiment
      fedcore stop --kit kits/ops
    """
    say("stop", (target, kit, insecure, insecure_network), timeout)


def say(action: Steer, where: tuple[str | None, Path | None, bool, bool], timeout: float) -> None:
    """Tell a server to do something, and print its answer.

    Args:
        action: what to do.
        where: run folder or address, kit folder, and whether an insecure link and an insecure network will do.
        timeout: seconds to wait for an answer.
    """
    from fedcore.monitor.ask import find_target, why_unserved

    found = find_target(*where)
    if found is None:
        raise ConfigError(f"no server works on {where[0]}{why_unserved(Path(str(where[0])))}")
    with found.connect() as client:
        reply = client.command(action, timeout)
    if not reply.ok:
        raise FedcoreError(reply.message)
    typer.echo(reply.message)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (pause, resume, stop):
        app.command()(command)
