"""The lock on a run folder: one server works on it at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from fedcore.errors import BusyError, StorageError

__all__ = ["FolderLock", "file_system"]

_TAKEN: Final = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
_MOUNTS: Final = Path("/proc/self/mountinfo")


def file_system(path: Path) -> str:
    """Return the type of the file system that holds ``path``, such as ``ext4`` or ``nfs4``; else ``unknown``."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
        real = path.resolve()
    except OSError:
        return "unknown"
    best, found = -1, "unknown"
    for line in lines:
        left, _, right = line.partition(" - ")
        fields = left.split()
        if len(fields) < 5 or not right:
            continue
        mount = fields[4].replace("\\040", " ")
        if len(mount) >= best and real.is_relative_to(mount):
            best, found = len(mount), right.split()[0]
    return found


class FolderLock:
    """Holds a run folder until `close`.

    The lock is on the folder itself, which nobody can remove while files are in it. The file ``.lock`` is locked
    as well: it names the process that holds the lock, and some file systems can lock files alone.

    Raises:
        BusyError: another process has the folder.
        StorageError: the file system can't lock it, or the folder can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / ".lock"
        try:
            self._handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise StorageError(f"cannot open run folder {folder}: {error.strerror}") from None
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            os.close(self._handle)
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from None
        try:
            self._take()
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        self._flock(self._handle, optional=True)
        self._flock(self._file)
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, str(os.getpid()).encode(), 0)
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error.strerror}") from None

    def _flock(self, descriptor: int, *, optional: bool = False) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                owner = os.pread(self._file, 20, 0).decode(errors="replace").strip()
                raise BusyError(
                    f"run folder {self._folder} is in use by another server (process {owner or 'unknown'}); "
                    "stop it, or give this run another name"
                ) from None
            if optional:  # some network file systems lock files alone
                return
            name = errno.errorcode.get(error.errno or 0, str(error.errno))
            raise StorageError(
                f"cannot lock run folder {self._folder}: {error.strerror} ({name}), on a file system of type "
                f"{file_system(self._folder)}; put the run file on a disk of this machine, or on one that "
                "supports locks"
            ) from None

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._file)
        os.close(self._handle)
