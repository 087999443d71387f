"""What the peers' runs share."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

JOIN_SECONDS = 120.0


class PeerError(Exception):
    """A peer could not be installed or run, or its result is wrong."""


@dataclass(frozen=True)
class Outcome:
    """Seconds of each round; which process serves, in words and by words of its command line."""

    seconds: list[float]
    server_process: str
    server_words: tuple[str, ...]


def finish(process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """Wait for a process to end well.

    Raises:
        PeerError: it failed or took too long; the text ends with the last lines of its log.
    """
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise PeerError(f"not done after {seconds:.0f} s:\n{tail(log)}") from None
    if status != 0:
        raise PeerError(f"ended with status {status}:\n{tail(log)}")


def await_true(what: str, condition: Callable[[], bool], log: Path) -> None:
    """Wait until ``condition`` holds.

    Raises:
        PeerError: it did not within two minutes.
    """
    until = time.monotonic() + JOIN_SECONDS
    while not condition():
        if time.monotonic() > until:
            raise PeerError(f"{what}: not within {JOIN_SECONDS:.0f} s:\n{tail(log)}")
        time.sleep(0.1)


def tail(log: Path) -> str:
    """Return the last lines of a log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "\n".join(text.splitlines()[-10:])


def time_limit(round_bytes: int, rounds: int) -> float:
    """Return the seconds after which a run is given up: 40 MB/s and five minutes."""
    return 300 + rounds * round_bytes / 40e6
