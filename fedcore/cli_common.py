"""What the modules of commands share: errors as one clear line and an exit status."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Final, ParamSpec

import typer

from .errors import ConfigError, FedcoreError, WeightError

__all__ = ["INTERRUPTED", "WRONG_USE", "reported"]

WRONG_USE: Final = 2
INTERRUPTED: Final = 130

_P = ParamSpec("_P")


def reported(command: Callable[_P, None]) -> Callable[_P, None]:
    """Turn the package's errors into one clear line and an exit status."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except FedcoreError as error:
            if os.environ.get("FEDCORE_DEBUG") == "1":
                raise
            typer.echo(f"error: {error}", err=True)
            wrong_use = isinstance(error, ConfigError | WeightError)
            raise typer.Exit(WRONG_USE if wrong_use else 1) from None
        except OSError as error:
            if os.environ.get("FEDCORE_DEBUG") == "1" or error.filename is None:
                raise
            typer.echo(f"error: {error.filename}: {error.strerror}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(INTERRUPTED) from None

    return run
