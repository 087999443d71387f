"""``python -m benchmarks``: reduce, round-trip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcore.config import parse_size

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


def _finish(result: dict[str, Any], path: Path | None) -> None:
    for name, value in result.items():
        typer.echo(f"{name:<28} {value:.4g}" if isinstance(value, float) else f"{name:<28} {value}")
    if path is not None:
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


@app.command()
def reduce(
    size: Annotated[str, typer.Option(help="Bytes of each input.")] = "64MiB",
    inputs: Annotated[int, typer.Option(min=1)] = 4,
    dtype: Annotated[str, typer.Option(help="F64, F32, F16 or BF16.")] = "F32",
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time the mean kernel on one core against a copy of the same bytes in the same run."""
    from .kernels import measure

    _finish(measure(parse_size(size), inputs, dtype, repeats), json_file)


@app.command()
def round_trip(
    size: Annotated[str, typer.Option(help="Bytes of the model (fp32).")] = "512MiB",
    sites: Annotated[int, typer.Option(min=1)] = 3,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Time rounds without training (each site adds a constant) against the same bytes over raw loopback TCP."""
    from .round_trip import measure

    _finish(measure(parse_size(size), sites, rounds), json_file)


app(prog_name="python -m benchmarks")
