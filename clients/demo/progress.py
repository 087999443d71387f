"""How far the demo's training arms are: told by the workers, shown by the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedcore.view import human_seconds

__all__ = ["ArmsView", "tell"]


def tell(out: Path, step: int, total: int, loss: float | None) -> None:
    """Note a worker's step beside the file that it will write."""
    text = json.dumps({"step": step, "total": total, "loss": loss})
    part = out.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(_told(out))


def _told(out: Path) -> Path:
    return out.with_suffix(".progress")


def _left(seconds: float, step: int, total: int) -> str:
    if step == total:
        return "scoring"
    return f"{human_seconds(seconds / step * (total - step))} left"


class ArmsView:
    """One line per arm on a terminal: a bar, steps, loss and the time left; nothing elsewhere.

    Use it in a ``with`` block; the lines go away when it ends.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._lines: dict[str, TaskID] = {}

    def __enter__(self) -> ArmsView:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def expect(self, name: str) -> None:
        """Give an arm that has not started its line."""
        self._lines[name] = self._progress.add_task(
            name, start=False, total=None, state="waiting", left=""
        )

    def start(self, name: str) -> None:
        """The arm's process has started: its clock runs."""
        self._progress.start_task(self._lines[name])
        self._progress.update(self._lines[name], state="loading")

    def look(self, name: str, out: Path) -> None:
        """Show what the arm that will write ``out`` has told."""
        try:
            told = json.loads(_told(out).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        step, total, loss = told["step"], told["total"], told["loss"]
        line = self._lines[name]
        seconds = self._progress.tasks[self._progress.task_ids.index(line)].elapsed or 0.0
        state = f"step {step} of {total}" + ("" if loss is None else f", loss {loss:.3f}")
        left = _left(seconds, step, total)
        self._progress.update(line, total=total, completed=step, state=state, left=left)

    def end(self, name: str) -> None:
        """The arm is done: its line goes."""
        self._progress.remove_task(self._lines.pop(name))
