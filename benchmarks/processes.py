"""Processes under measurement: found however they were started, their memory sampled, none left behind.

A *family* is every process that has the family's mark in its environment, or a parent that does. So what a
framework starts by itself, in sessions of its own too, is measured and ended with the rest.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedcore.simulation import watchdog as _watchdog

_MARK = "FEDCORE_BENCHMARK_FAMILY"
_SAMPLE_SECONDS = 0.05
_END_SECONDS = 5.0


class Family:
    """Starts processes, follows their descendants, and ends all of them when the ``with`` block ends.

    Should this process be killed, a watchdog ends every process group of the family.
    """

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.peaks: dict[int, int] = {}
        self.commands: dict[int, str] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self._foreign: set[int] = set()
        self._doubtful: set[int] = set()
        self._groups: set[int] = set()
        self._alive: set[int] = set()
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample_until_stopped, name="memory-sampler")

    def __enter__(self) -> Family:
        self._watchdog = subprocess.Popen(
            [sys.executable, "-P", str(Path(_watchdog.__file__))],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._foreign = {*_pids(), self._watchdog.pid}
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._sampler.join()
        try:
            self._end()
        finally:
            for group in self._groups:
                self._tell("-", group)
            assert self._watchdog.stdin is not None
            self._watchdog.stdin.close()
            self._watchdog.wait()

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process one of the family."""
        return {_MARK: self.mark}

    def start(
        self, command: Sequence[str], log: Path, env: Mapping[str, str], folder: Path
    ) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own; its output goes to ``log``."""
        with log.open("ab") as out:
            child = subprocess.Popen(
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **env, **self.environment},
                start_new_session=True,
            )
        self._children.append(child)
        self._tell("+", child.pid)
        return child

    def peak(self, *words: str) -> int:
        """Return the largest peak RSS, in bytes, of a process whose command line has all the words."""
        found = [
            peak
            for pid, peak in self.peaks.items()
            if all(word in self.commands[pid] for word in words)
        ]
        return max(found, default=0)

    def _tell(self, sign: str, group: int) -> None:
        assert self._watchdog.stdin is not None
        if sign == "+":
            self._groups.add(group)
        with contextlib.suppress(BrokenPipeError):
            self._watchdog.stdin.write(f"{sign}{group}\n".encode())
            self._watchdog.stdin.flush()

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self.sample()

    def sample(self) -> None:
        """Look for new members and note every member's peak, which the kernel keeps between two looks."""
        pids = _pids()
        self._foreign &= pids
        for pid in sorted(pids - self._foreign):
            status = _status(pid)
            if pid not in self.commands:
                if not self._is_member(pid, status):
                    # A process has its parent's environment until it executes: look twice.
                    (self._foreign if pid in self._doubtful else self._doubtful).add(pid)
                    continue
                if _group(pid) == pid:
                    self._tell("+", pid)
            # It changes when a forked process executes, and is empty when a process has ended.
            self.commands[pid] = _command(pid) or self.commands.get(pid, "")
            if "VmHWM" in status:
                peak = int(status["VmHWM"].split()[0]) * 1024
                self.peaks[pid] = max(self.peaks.get(pid, 0), peak)
        self._alive = {pid for pid in self.commands if pid in pids}

    def _is_member(self, pid: int, status: Mapping[str, str]) -> bool:
        if pid in {child.pid for child in self._children}:
            return True
        if int(status.get("PPid", "0")) in self.commands:
            return True
        with contextlib.suppress(OSError):
            return f"{_MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
        return False

    def _end(self) -> None:
        """Ask the members to end, then end them."""
        self.sample()
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            until = time.monotonic() + _END_SECONDS
            while self._alive and time.monotonic() < until:
                for child in self._children:
                    child.poll()
                time.sleep(0.05)
                self.sample()
                self._alive = {
                    pid for pid in self._alive if _status(pid).get("State", "Z")[0] != "Z"
                }


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}  # noqa: PTH208


def _group(pid: int) -> int:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(pid)
    return 0


def _status(pid: int) -> dict[str, str]:
    """Return the fields of a process's status; empty if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        data = Path(f"/proc/{pid}/cmdline").read_bytes()
        return data.replace(b"\0", b" ").decode("utf-8", "replace").strip()
    return ""
