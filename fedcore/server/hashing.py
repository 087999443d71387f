"""SHA-256 of committed model files, computed beside the run.

A digest of 50 GB takes half a minute that no site should wait for. The files are complete and never change,
so they are read in the background, past the mapping, in time that no other thread wants: while the sites train.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from collections import deque
from pathlib import Path
from typing import Final

__all__ = ["Hasher"]

_BLOCK: Final = 1 << 20


class _File:
    """A file that is being hashed: its bytes from ``offset`` to the end."""

    def __init__(self, version: int, path: Path, offset: int) -> None:
        self.version = version
        self._path = path
        self._offset = offset
        self._digest = hashlib.sha256()

    def hash(self, stopped: threading.Event) -> str | None:
        """Go on to the end and return the digest in hex; None if it was stopped before, or the file is gone."""
        block = bytearray(_BLOCK)
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(self._offset)
                while got := file.readinto(block):
                    self._digest.update(memoryview(block)[:got])
                    self._offset += got
                    if stopped.is_set():
                        return None
        except OSError:  # removed by hand; its digest stays unknown
            return None
        return self._digest.hexdigest()


class Hasher:
    """One background thread. All methods belong to the thread that made it."""

    def __init__(self) -> None:
        self._waiting: deque[_File] = deque()
        self._done: queue.Queue[tuple[int, str]] = queue.Queue()
        self._added = threading.Semaphore(0)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fedcore-hasher", daemon=True)
        self._thread.start()

    def add(self, version: int, path: Path, data_offset: int) -> None:
        """Queue a file: its bytes from ``data_offset`` to the end are hashed."""
        self._waiting.append(_File(version, path, data_offset))
        self._added.release()

    def results(self) -> list[tuple[int, str]]:
        """Return what was finished since the last call: versions and their digests in hex."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._done.get_nowait())
        return found

    def finish(self) -> None:
        """Hash what is left at this thread's own priority; what is added afterwards never is."""
        self.stop()
        never = threading.Event()
        while self._waiting:
            self._next(never)

    def stop(self) -> None:
        """Give up what is left."""
        self._stopped.set()
        self._added.release()
        self._thread.join()

    def _work(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # not every system has this class
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        while True:
            self._added.acquire()
            if self._stopped.is_set():
                return
            self._next(self._stopped)

    def _next(self, stopped: threading.Event) -> None:
        file = self._waiting[0]
        digest = file.hash(stopped)
        if digest is not None:
            self._done.put((file.version, digest))
        if digest is not None or not stopped.is_set():
            self._waiting.popleft()
