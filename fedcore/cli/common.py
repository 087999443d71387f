"""What the modules of commands share: errors as one clear line and an exit status."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Final, ParamSpec

import typer

from fedcore.errors import ConfigError, FedcoreError, WeightError

__all__ = ["INTERRUPTED", "WRONG_USE", "Timeout", "reported", "writable_output"]

WRONG_USE: Final = 2
INTERRUPTED: Final = 130

_P = ParamSpec("_P")
_MOST_SECONDS: Final = 366 * 24 * 3600.0


def _seconds(value: float) -> float:
    if not 0 < value <= _MOST_SECONDS:  # nor is it NaN
        raise typer.BadParameter("expected a number of seconds above 0, of a year at most")
    return value


Timeout = Annotated[float, typer.Option(help="Seconds to wait for an answer.", callback=_seconds)]


@contextlib.contextmanager
def writable_output() -> Iterator[None]:
    """Turn an output that can't be written, on a full disk or to a pipe that was closed, into one line at most."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:
            raise
        # What is still buffered would be written once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:
            typer.echo(f"error: cannot write the output: {error.strerror}", err=True)
        raise SystemExit(1) from None


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
