"""Options that several commands of ``python -m benchmarks`` have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Size = Annotated[str, typer.Option(help="Bytes of the model (fp32).")]
Sites = Annotated[int, typer.Option(min=1, help="Site processes.")]
Rounds = Annotated[int, typer.Option(min=1)]
Inputs = Annotated[int, typer.Option(min=1, help="Updates that are averaged.")]
Repeats = Annotated[int, typer.Option(min=1, help="Of which the median is taken.")]
Budget = Annotated[str, typer.Option(help="The server's memory budget.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Draw the result into this file.")]
