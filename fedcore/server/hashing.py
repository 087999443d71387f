"""SHA-256 of committed model files, computed beside the run.

A digest of 50 GB takes half a minute that no site should wait for. The files are complete and never change,
so they are read in the background, at the lowest priority and past the mapping, while the sites train.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from pathlib import Path
from typing import Final

__all__ = ["Hasher"]

_BLOCK: Final = 1 << 20


class Hasher:
    """One background thread. All methods belong to the thread that made it."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[int, Path, int] | None] = queue.Queue()
        self._done: queue.Queue[tuple[int, str]] = queue.Queue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fedcore-hasher", daemon=True)
        self._thread.start()

    def add(self, version: int, path: Path, data_offset: int) -> None:
        """Queue a file: its bytes from ``data_offset`` to the end are hashed."""
        self._waiting.put((version, path, data_offset))

    def results(self) -> list[tuple[int, str]]:
        """Return what was finished since the last call: versions and their digests in hex."""
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._done.get_nowait())
        return found

    def finish(self) -> None:
        """Wait until everything that was queued is hashed; what is added afterwards never is."""
        self._waiting.put(None)
        self._thread.join()

    def stop(self) -> None:
        """Give up what is left."""
        self._stopping.set()
        self.finish()

    def _work(self) -> None:
        with contextlib.suppress(
            OSError, AttributeError
        ):  # where threads have no priority of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        block = bytearray(_BLOCK)
        while (item := self._waiting.get()) is not None:
            version, path, offset = item
            digest = hashlib.sha256()
            try:
                with path.open("rb", buffering=0) as file:
                    file.seek(offset)
                    while (got := file.readinto(block)) and not self._stopping.is_set():
                        digest.update(memoryview(block)[:got])
            except OSError:
                continue  # removed by hand; its digest stays unknown
            if not self._stopping.is_set():
                self._done.put((version, digest.hexdigest()))
