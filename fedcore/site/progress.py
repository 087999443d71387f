"""What a site waits for, as one line on a terminal: a transfer, or the other sites.

It is drawn only while the script's own thread waits inside a call of this package, so it never meets a trainer's
bars, and only from the second second on. Off a terminal, or with ``FEDCORE_PROGRESS=0``, nothing is drawn.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress, TaskID

__all__ = ["Bar", "State", "TerminalHandler"]

_PATIENCE_SECONDS: Final = 1.0
_DRAW_SECONDS: Final = 0.1
IDLE_SECONDS: Final = 0.5


@dataclass(frozen=True)
class State:
    """How far something is: ``done`` of ``total`` bytes, or rounds."""

    what: str
    done: int
    total: int
    in_bytes: bool


class Bar:
    """One line at the bottom of the terminal for as long as the block lasts; call `tick` now and then.

    Args:
        site: stands in front.
        state: is asked for what to draw, each time; None: what is drawn may stay.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        site: str,
        state: Callable[[], State | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._site = site
        self._state = state
        self._clock = clock
        self._began = clock()
        self._enabled = _wanted()
        self._drawn: tuple[Progress, TaskID] | None = None
        self._line: tuple[str, State, str] | None = None
        self._since: tuple[str, float, int] = ("", self._began, 0)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._drawn is not None:
            self._drawn[0].stop()

    @property
    def interval(self) -> float:
        """Seconds up to the next `tick` that is worth while."""
        return _DRAW_SECONDS if self._enabled else IDLE_SECONDS

    def tick(self) -> None:
        """Draw how things stand."""
        if not self._enabled:
            return
        now, state = self._clock(), self._state()
        if state is None:
            return
        if state.what != self._since[0]:
            self._since = (state.what, now, state.done)
        if now - self._began < _PATIENCE_SECONDS:
            return
        line = (f"fedcore {self._site}: {state.what}", state, self._amount(state, now))
        if line == self._line:
            return
        self._line = line
        if self._drawn is None:
            self._drawn = _prepare()
        progress, task = self._drawn
        progress.update(
            task, description=line[0], completed=state.done, total=state.total, amount=line[2]
        )
        progress.start()  # which draws, the first time
        progress.refresh()

    def _amount(self, state: State, now: float) -> str:
        seconds = now - self._since[1]
        if not state.in_bytes:
            return f"{int(now - self._began)} s"
        text = f"{state.done / 1e6:.1f} of {state.total / 1e6:.1f} MB"
        if seconds <= 0 or state.done <= self._since[2]:
            return text
        rate = (state.done - self._since[2]) / seconds
        return f"{text}, {rate / 1e6:.1f} MB/s, {(state.total - state.done) / rate:.0f} s left"


class TerminalHandler(logging.Handler):
    """Writes to what ``sys.stderr`` is at the moment: above a line that is being drawn, not into it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        print(self.format(record), file=sys.stderr, flush=True)


def _wanted() -> bool:
    return os.environ.get("FEDCORE_PROGRESS") != "0" and sys.stderr.isatty()


def _prepare() -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[amount]}", markup=False),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
        # What other threads print goes above the line; a redirected stdout stays where it is.
        redirect_stdout=sys.stdout.isatty(),
    )
    return progress, progress.add_task("", amount="", total=None)
