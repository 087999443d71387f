"""The lock on a site's work folder: one process at a time, and one object in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import ClassVar, Final

__all__ = ["FolderLock"]

_ATTEMPTS: Final = 5


class FolderLock:
    """Holds a folder until `release`, or until the process ends. `take` makes one.

    It is a record lock: a child that outlives a killed process must not hold the folder, as it would with a lock
    of an open file. The system keeps a record lock for the process and not for an object in it: it would grant a
    second one, and end both when either's file is closed. So the class lists the folders of this process; nothing
    else takes such locks.
    """

    _of_process: ClassVar[set[Path]] = set()

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._folder = folder
        self._descriptor = descriptor
        self._of_process.add(folder)

    @classmethod
    def take(cls, folder: Path) -> FolderLock | None:
        """Make a folder and lock it; None if another process, or another object of this one, has it.

        Raises:
            OSError: the folder can't be made, or its file system can't lock it.
        """
        if folder in cls._of_process:
            return None
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):  # removed by another process just now
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                path = folder / "lock"
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.path.samestat(os.fstat(descriptor), path.stat()):
                        return cls(folder, descriptor)
                except BlockingIOError:
                    os.close(descriptor)
                    return None
                except OSError:
                    os.close(descriptor)
                    raise
                os.close(descriptor)
        return None

    def release(self) -> None:
        """Let another process have the folder."""
        self._of_process.discard(self._folder)
        os.close(self._descriptor)
