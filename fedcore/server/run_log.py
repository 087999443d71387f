"""Which run a log line is of, where a process has several."""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Final

__all__ = ["RUN", "OfRun", "name_run"]

RUN: Final[ContextVar[str]] = ContextVar("fedcore-run", default="")
"""The name of the run that the server works for at present."""


class OfRun(logging.Filter):
    """Passes the lines of one run, and those of the process, which are of none."""

    def __init__(self, run: str) -> None:
        super().__init__()
        self._run = run

    def filter(self, _record: logging.LogRecord) -> bool:
        """Whether a line is shown."""
        return RUN.get() in ("", self._run)


def name_run(record: logging.LogRecord) -> bool:
    """Give a line what names its run, as the attribute ``run``; empty for a line of the process."""
    run = RUN.get()
    record.run = f"[{run}] " if run else ""
    return True
