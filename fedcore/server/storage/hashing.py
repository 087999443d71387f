"""SHA-256 of committed model files, computed beside the run.

A digest of 50 GB takes half a minute that no site should wait for. The files are complete and never change,
so they are read in the background, past the mapping, while the sites train: at the lowest priority, and not while
chunks move fast, as reading and hashing take memory bandwidth and cache from them at any priority.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedcore._core import crc32c
from fedcore.layout import DEFAULT_CHUNK_BYTES

from .integrity import checksum_of

__all__ = ["Hasher"]

_LOOK_AFTER: Final = 16 << 20  # bytes between two looks at the traffic: 10 ms of hashing
_LOOK_SECONDS: Final = 0.25
_STALE_SECONDS: Final = 1.0  # what moved since an older look says nothing of now
_FAST: Final = 100e6  # bytes a second; slower traffic leaves the machine enough


class _File:
    """A file that is being hashed: its bytes from ``offset`` to the end, whose checksum was recorded."""

    def __init__(
        self, version: int, path: Path, offset: int, checksum: str, chunk_bytes: int
    ) -> None:
        self.version = version
        self._checksum = checksum
        self._chunk_bytes = chunk_bytes
        self._chunks: list[int] = []
        self._path = path
        self._offset = offset
        self._digest = hashlib.sha256()

    def hash(
        self, stopped: threading.Event, wait: Callable[[], object] = lambda: None
    ) -> str | None:
        """Go on to the end and return the digest in hex, empty if these are not the bytes that were committed.

        None if it was stopped before, or the file is gone.

        ``wait`` is called now and then, before the next bytes are read.
        """
        block = bytearray(self._chunk_bytes)
        until_look = 0
        try:
            with self._path.open("rb", buffering=0) as file:
                file.seek(self._offset)
                while True:
                    if until_look <= 0:
                        wait()
                        until_look = _LOOK_AFTER
                    if not (got := _fill(file, block)):
                        break
                    until_look -= got
                    with memoryview(block)[:got] as data:
                        self._digest.update(data)
                        self._chunks.append(crc32c(data))
                    self._offset += got
                    if stopped.is_set():
                        return None
        except OSError:  # removed by hand; its digest stays unknown
            return None
        return self._digest.hexdigest() if checksum_of(self._chunks) == self._checksum else ""


def _fill(file: io.FileIO, block: bytearray) -> int:
    """Read a whole block, or what is left of the file; returns how many bytes."""
    done = 0
    with memoryview(block) as view:
        while done < len(block) and (got := file.readinto(view[done:])):
            done += got
    return done


class Hasher:
    """One background thread. All methods belong to the thread that made it.

    Args:
        moved: returns the bytes that have been sent and received so far, from any thread.
        behind: with more files than this left to hash, it goes on whatever moves.
        chunk_bytes: how large the chunks are that the files' checksums were taken of.
        stopped: set once it is to stop; looked at after each block of a file.
    """

    def __init__(
        self,
        moved: Callable[[], int] = lambda: 0,
        behind: int = 8,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        stopped: threading.Event | None = None,
    ) -> None:
        self._moved = moved
        self._chunk_bytes = chunk_bytes
        self._behind = behind
        self._seen, self._looked_at = 0, float("-inf")
        self._waiting: deque[_File] = deque()
        self._done: queue.Queue[tuple[int, str | None]] = queue.Queue()
        self._added = threading.Semaphore(0)
        self._stopped = stopped or threading.Event()
        self._thread = threading.Thread(target=self._work, name="fedcore-hasher", daemon=True)
        self._thread.start()

    def add(self, version: int, path: Path, data_offset: int, checksum: str) -> None:
        """Queue a file: its bytes from ``data_offset`` to the end are hashed, and compared with ``checksum``."""
        self._waiting.append(_File(version, path, data_offset, checksum, self._chunk_bytes))
        self._added.release()

    def results(self, wait: float = 0.0) -> list[tuple[int, str | None]]:
        """Return what was finished since the last call: versions and their digests in hex.

        None in place of a digest: the file does not hold what was committed. ``wait``: for so many seconds, if
        nothing is finished yet.
        """
        found = []
        if wait:
            with contextlib.suppress(queue.Empty):
                found.append(self._done.get(timeout=wait))
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
            self._next(self._stopped, self._wait_for_quiet)

    def _wait_for_quiet(self) -> None:
        """Return once little moves, or too many files wait, or it is to stop."""
        while len(self._waiting) <= self._behind:
            moved, now = self._moved(), time.monotonic()
            spent = now - self._looked_at
            quiet = spent < _STALE_SECONDS and moved - self._seen < _FAST * spent
            self._seen, self._looked_at = moved, now
            if quiet or self._stopped.wait(_LOOK_SECONDS):
                return

    def _next(self, stopped: threading.Event, wait: Callable[[], object] = lambda: None) -> None:
        file = self._waiting[0]
        digest = file.hash(stopped, wait)
        if digest is not None:
            self._done.put((file.version, digest or None))
        if digest is not None or not stopped.is_set():
            self._waiting.popleft()
