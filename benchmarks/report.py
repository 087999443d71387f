"""What every benchmark prints and writes: a table, and JSON that says on which machine it was measured."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

console = Console()

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; all columns but the first are numbers and stand to the right."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(text(cell) for cell in row))
    console.print(table)


def text(value: object) -> str:
    """Return a cell's text: three significant digits for a number, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")
    return str(value)


def size_text(count: int) -> str:
    """Return a number of bytes in the largest binary unit that keeps it at one or more."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if count >= factor:
            number = count / factor
            return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
    return f"{count} B"


def machine() -> dict[str, Any]:
    """Return what a figure depends on: processor, cores, memory, versions, and the load of others just now."""
    from fedcore import __version__, _core
    from fedcore.transport.link import pump_name

    return {
        "processor": _first_field("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(_first_field("/proc/meminfo", "MemTotal").split()[0]) * KIB,
        "load_1min": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "python": platform.python_version(),
        "fedcore": __version__,
        "simd": _core.simd_level(),
        "pump": pump_name(),
    }


def _first_field(path: str, name: str) -> str:
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "0"


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write a benchmark's result with its machine, where a file was asked for."""
    if path is not None:
        content = {**result, "machine": machine()}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        console.print(f"written: {path}", highlight=False)
