"""How far the demo's training arms are: told by the workers, shown by the command."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from fedcore.monitor.view import human_seconds

__all__ = ["ArmsView", "tell"]


def tell(out: Path, step: int, total: int, loss: float | None) -> None:
    """Note a worker's step beside the file that it will write."""
    text = json.dumps({"step": step, "total": total, "loss": loss})
    part = out.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(_told(out))


def _told(out: Path) -> Path:
    return out.with_suffix(".progress")


class _Elapsed(ProgressColumn):
    """How long an arm has been running."""

    def render(self, task: Task) -> Text:
        """Nothing before it starts."""
        return Text("" if task.elapsed is None else human_seconds(int(task.elapsed)))


@dataclass
class _Line:
    """An arm's line: its number at rich, the first step that was seen with its time, and the last one."""

    number: TaskID
    first: int = 0
    since: float = 0.0
    last: int = 0

    def left(self, step: int, total: int) -> str:
        """The time left, by the pace since the first step that was seen: loading is no part of it."""
        now = time.monotonic()
        self.last = step
        if not self.first:
            self.first, self.since = step, now
        if step == total:
            return "ending"
        if step == self.first:
            return ""
        return f"{human_seconds((now - self.since) / (step - self.first) * (total - step))} left"


class ArmsView:
    """One line per arm on a terminal: a bar, steps, loss and the time left; nothing elsewhere.

    Use it in a ``with`` block; the lines go away when it ends.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            _Elapsed(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )
        self._lines: dict[str, _Line] = {}

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
        number = self._progress.add_task(name, start=False, total=None, state="waiting", left="")
        self._lines[name] = _Line(number)

    def start(self, name: str) -> None:
        """The arm's process has started: its clock runs."""
        number = self._lines[name].number
        self._progress.start_task(number)
        self._progress.update(number, state="loading")

    def look(self, name: str, out: Path) -> None:
        """Show what the arm that will write ``out`` has told."""
        try:
            told = json.loads(_told(out).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        step, total, loss = told["step"], told["total"], told["loss"]
        line = self._lines[name]
        if step == line.last:
            return
        state = f"step {step} of {total}" + ("" if loss is None else f", loss {loss:.3f}")
        left = line.left(step, total)
        self._progress.update(line.number, total=total, completed=step, state=state, left=left)

    def refresh(self) -> None:
        """Draw now; otherwise it is drawn four times a second."""
        self._progress.refresh()

    def end(self, name: str) -> None:
        """The arm is done: its line goes."""
        self._progress.remove_task(self._lines.pop(name).number)
