"""``fedcore inspect``: what would leave this site, before anything does."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.errors import ConfigError, FedcoreError

from .common import reported

if TYPE_CHECKING:
    from fedcore.files.inspection import Inspection

__all__ = ["inspect"]


@reported
def inspect(
    context: typer.Context,
    target: Annotated[
        Path,
        typer.Argument(
            help="A training script, or a .safetensors file or folder.", metavar="TARGET"
        ),
    ],
    *,
    include: Annotated[
        list[str], typer.Option(help="Only tensors of this name travel; * for any characters.")
    ] = [],  # noqa: B006 - typer reads the default, nobody changes it
    exclude: Annotated[
        list[str], typer.Option(help="Tensors of this name stay; * for any characters.")
    ] = [],  # noqa: B006
    run: Annotated[
        Path | None, typer.Option(help="Show the encoding that this run file asks for.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print it as JSON, with the texts of the files.")
    ] = False,
) -> None:
    """List what a training script would send, without a server.

    Runs the script as it stands up to the point where it would first show its tensors to a server, and ends it
    there. What follows TARGET is passed to the script. --include and --exclude are those of FEDCORE_INCLUDE and
    FEDCORE_EXCLUDE.

    \b
    Examples:
      fedcore inspect train.py
      fedcore inspect --run run.toml train.py
      fedcore inspect --exclude '*.bias' train.py --data notes.jsonl
      fedcore inspect --json runs/sentiment/best
    """
    from fedcore.config import load_run_file

    transfer = None if run is None else load_run_file(run).transfer.message
    patterns = {"FEDCORE_INCLUDE": include, "FEDCORE_EXCLUDE": exclude}
    given = {name: ",".join(values) for name, values in patterns.items() if values}
    if target.suffix == ".py":
        found = _run_script(target, context.args, given)
    else:
        from fedcore.files.inspection import inspect_file

        if given or context.args:
            raise ConfigError(
                f"{target} is no training script, so it takes no patterns or arguments"
            )
        found = inspect_file(target)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
        return
    from fedcore.files.inspection import lines

    for line in lines(found, transfer):
        typer.echo(line)


def _run_script(script: Path, arguments: list[str], env: dict[str, str]) -> Inspection:
    from fedcore.files.inspection import Inspection

    if not script.is_file():
        raise ConfigError(f"{script} does not exist")
    with tempfile.TemporaryDirectory(prefix="fedcore-") as folder:
        report = Path(folder) / "inspection.json"
        done = subprocess.run(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **env, "FEDCORE_INSPECT": str(report)},
            stdout=sys.stderr,
            check=False,
        )
        if report.exists():
            return Inspection.model_validate_json(report.read_text(encoding="utf-8"))
    if done.returncode:
        raise FedcoreError(
            f"{script} ended with status {done.returncode} before it showed its tensors"
        )
    raise FedcoreError(
        f"{script} ended without taking part in a run: it never received a model inside "
        "`while fl.is_running()`"
    )
