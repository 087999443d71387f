"""Data sets by name: from the Hub, a folder that ``datasets`` opens, or a .jsonl file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedcore.errors import ConfigError

__all__ = ["load_columns"]


def load_columns(name: str, split: str, columns: Sequence[str]) -> list[tuple[str, ...]]:
    """Return some columns of a data set as texts, row by row.

    Args:
        name: a file that ends in .jsonl, or what ``datasets.load_dataset`` takes.
        split: which of a data set's splits.
        columns: names of columns.

    Raises:
        ConfigError: it cannot be read, lacks a column, or the package datasets is missing.
    """
    rows: Any
    if name.endswith(".jsonl"):
        rows = _lines(Path(name))
    else:
        try:
            import datasets
        except ImportError:
            raise ConfigError(
                "a data set by name needs the package datasets: pip install 'fedcore-fl[evaluate]'"
            ) from None
        try:
            rows = datasets.load_dataset(name, split=split)
        except (OSError, ValueError) as error:
            raise ConfigError(f"data set {name}, split {split}: {error}") from error
    found = []
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if column not in row]
        if missing:
            raise ConfigError(
                f"{name}, row {number}: no column {', '.join(missing)}; it has {', '.join(row)}"
            )
        found.append(tuple(str(row[column]) for column in columns))
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: expected a JSON object")
        rows.append(row)
    return rows
