"""Ends process groups when the process that started them is gone, however it ended.

Run as a script with a pipe on stdin: each line is ``+PID`` (a group to look after) or ``-PID`` (it has ended).
At the end of the input, which comes when the other process dies, what is left is terminated and then killed.
Uses the standard library only, so that it starts in no time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable
from typing import Final

_GRACE_SECONDS: Final = 2.0


def watch(lines: Iterable[str]) -> None:
    """Follow ``lines`` to their end, then end the groups that are left."""
    groups: set[int] = set()
    for line in lines:
        group = int(line[1:])
        if line[0] == "+":
            groups.add(group)
        else:
            groups.discard(group)
    for group in groups:
        end_group(group, signal.SIGTERM)
    until = time.monotonic() + _GRACE_SECONDS
    while groups and time.monotonic() < until:
        groups = {group for group in groups if end_group(group, 0)}
        time.sleep(0.05)
    for group in groups:
        end_group(group, signal.SIGKILL)


def end_group(group: int, number: int) -> bool:
    """Send a signal to a process group; False if there is none any more."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
        return True
    return False


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's business
    watch(sys.stdin)
