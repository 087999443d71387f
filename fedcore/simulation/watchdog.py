"""Ends process groups when the process that started them is gone, however it ended.

Run as a script with a pipe on stdin: each line is ``+PID`` (a group to look after), ``-PID`` (it has ended) or
``=MARK`` (a value of the environment variable ``FEDCORE_SIMULATION``: whoever has it is looked after as well, in
whatever group or session). At the end of the input, which comes when the other process dies, what is left is
terminated and then killed.
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
_SWEEPS: Final = 20
MARK: Final = "FEDCORE_SIMULATION"


def watch(lines: Iterable[str]) -> None:
    """Follow ``lines`` to their end, then end the groups that are left."""
    groups: set[int] = set()
    mark = ""
    for line in lines:
        if line[0] == "=":
            mark = line[1:].strip()
        elif line[0] == "+":
            groups.add(int(line[1:]))
        else:
            groups.discard(int(line[1:]))
    for group in groups:
        end_group(group, signal.SIGTERM)
    until = time.monotonic() + _GRACE_SECONDS
    while groups and time.monotonic() < until:
        groups = {group for group in groups if end_group(group, 0)}
        time.sleep(0.05)
    for group in groups:
        end_group(group, signal.SIGKILL)
    end_marked(mark)


def end_marked(mark: str) -> None:
    """Kill every process whose environment holds this mark: those that left their group and session, too."""
    own = {os.getpid(), os.getppid()}
    for _ in range(_SWEEPS):  # one may fork while they are looked for
        found = [pid for pid in _marked(mark) if pid not in own] if mark else []
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            return
        time.sleep(0.02)


def _marked(mark: str) -> list[int]:
    wanted = f"{MARK}={mark}".encode()
    found = []
    with contextlib.suppress(OSError):  # a system without /proc: process groups must do
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError), open(f"/proc/{entry.name}/environ", "rb") as file:  # noqa: PTH123
                if wanted in file.read().split(b"\0"):
                    found.append(int(entry.name))
    return found


def end_group(group: int, number: int) -> bool:
    """Send a signal to a process group; False if there is none any more."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
        return True
    return False


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the other process's business
    watch(sys.stdin)
