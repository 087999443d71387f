"""The page of what goes together in a run file, made from the registries: ``python -P -m fedcore.rules.page``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from fedcore.protocol import LORA_METHODS, UPDATE_ENCODINGS

from .compatibility import TASKS, Choices, conflicts
from .finishers import FINISHERS
from .registry import RULES
from .several import SEVERAL

__all__ = ["page"]

_Values = Mapping[str, Mapping[str, Any]]  # what is chosen, by the text that stands for it

_OWN: Final = "module:Class"
_RULES: Final[_Values] = {
    **{f"`{name}`": {"rule": name} for name in (*RULES, *SEVERAL)},
    "a class in Python": {"rule": _OWN},
}
_TASKS: Final[_Values] = {f"`{name}`": {"task": name} for name in TASKS}
_ENCODINGS: Final[_Values] = {f"`{name}`": {"update": name} for name in UPDATE_ENCODINGS}
_OPTIMIZERS: Final[_Values] = {
    "none": {"optimizer": None},
    **{f"`{name}`": {"optimizer": name} for name in FINISHERS},
    "`ema`": {"ema": 0.9},
}
_LORA: Final[_Values] = {f"`{name}`": {"lora": name} for name in LORA_METHODS}
_WEIGHTS: Final[_Values] = {
    "`examples`": {"weights": "examples"},
    "`equal`": {"weights": "equal"},
    "`max_share`": {"max_share": 0.5},
}
_TABLES: Final[Sequence[tuple[str, _Values, str, _Values]]] = (
    ("rule", _RULES, "task", _TASKS),
    ("rule", _RULES, "encoding", _ENCODINGS),
    ("rule", _RULES, "optimizer", _OPTIMIZERS),
    ("rule", _RULES, "weights", _WEIGHTS),
    ("task", _TASKS, "encoding", _ENCODINGS),
    ("task", _TASKS, "optimizer", _OPTIMIZERS),
    ("optimizer", _OPTIMIZERS, "encoding", _ENCODINGS),
    ("method for LoRA", _LORA, "task", _TASKS),
    ("method for LoRA", _LORA, "rule", _RULES),
    ("method for LoRA", _LORA, "encoding", _ENCODINGS),
    ("method for LoRA", _LORA, "optimizer", _OPTIMIZERS),
)
_HEAD: Final = """\
# What goes together

`python -P -m fedcore.rules.page` makes this page from the registries of rules, optimizers, encodings and tasks,
with the function that refuses a run file (`fedcore/rules/compatibility.py`). A test checks that it is current.

- A number in a table means that the pair is refused when the run file is read. The list at the end has the
  reasons, and what would work.
- Columns that do not differ share one.
- The other limits of a run depend on numbers: how many updates a rule needs (`participants.min_results`), and
  [memory](#rule-and-memory).
"""
_MEMORY: Final = """\

## Rule and memory

If `server.memory` does not hold a chunk of each update, a rule that *folds* adds one update after the other to
sums. The other rules need a chunk of each update at the same time. Their runs have smaller chunks then, down to 64
KiB. Where these do not fit either, the run is refused at its start, and the error says how much memory it needs.
`fedcore aggregate` has no such limit.

| rule | less memory than a chunk of each update |
|---|---|
"""


def page() -> str:
    """Return the text of docs/compatibility.md."""
    notes: list[str] = []
    parts = [_HEAD]
    for rows, of_rows, columns, of_columns in _TABLES:
        parts.append(_table(rows, of_rows, columns, of_columns, notes))
    parts.append(_MEMORY)
    for name, rule in RULES.items():
        parts.append(f"| `{name}` | {'folds' if rule.folds else 'smaller chunks'} |\n")
    several = [f"`{name}`" for name in SEVERAL if not conflicts(Choices(rule=name))]
    parts.extend(f"| {name} | smaller chunks |\n" for name in (*several, "a class in Python"))
    parts.append("\n## Why a pair is refused\n\n")
    parts.extend(f"{number}. {note}.\n" for number, note in enumerate(notes, 1))
    return "".join(parts)


def _table(rows: str, of_rows: _Values, columns: str, of_columns: _Values, notes: list[str]) -> str:
    """Return a table of two choices with its heading; ``notes`` gets the messages that are new."""
    cells = {
        column: tuple(_cell({**row, **value}, (row, value), notes) for row in of_rows.values())
        for column, value in of_columns.items()
    }
    merged: dict[tuple[str, ...], list[str]] = {}
    for column, verdicts in cells.items():
        merged.setdefault(verdicts, []).append(column)
    text = f"\n## {rows[0].upper()}{rows[1:]} and {columns}\n\n"
    if all(verdict == "yes" for verdicts in merged for verdict in verdicts):
        return f"{text}Each {rows} goes with each {columns}: {', '.join(of_columns)}.\n"
    text += f"| {rows} | {' | '.join(', '.join(names) for names in merged.values())} |\n"
    text += "|---" * (1 + len(merged)) + "|\n"
    for place, row in enumerate(of_rows):
        text += f"| {row} | {' | '.join(verdicts[place] for verdicts in merged)} |\n"
    return text


def _cell(both: Mapping[str, Any], each: Sequence[Mapping[str, Any]], notes: list[str]) -> str:
    """Return whether two choices go together: yes, or the numbers of the notes that say why not."""
    alone = {found.text for choice in each for found in conflicts(replace(Choices(), **choice))}
    numbers = []
    for found in conflicts(replace(Choices(), **both)):
        if found.text in alone and "rule" in both and "task" not in both:
            continue
        note = f"`{found.key}`: {found.reason}"
        if note not in notes:
            notes.append(note)
        numbers.append(str(notes.index(note) + 1))
    return ", ".join(numbers) or "yes"


if __name__ == "__main__":
    sys.stdout.write(page())
