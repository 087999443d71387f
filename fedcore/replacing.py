"""Files that take the place of others: whole or not at all, and never of what is no regular file."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from fedcore.errors import StorageError

__all__ = ["partial_of", "place_of", "put_in_place", "sync_folder"]


def place_of(path: Path) -> Path:
    """Return where a file of this name is written: a link is followed.

    Raises:
        StorageError: a device, a pipe, a socket or a folder has the name; its kind is named.
    """
    try:
        place = path.resolve()
        mode = place.lstat().st_mode
    except FileNotFoundError:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise StorageError(f"cannot write {path}: {error}") from None
    if not stat.S_ISREG(mode):
        kinds = {
            stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket",
            stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFLNK: "a link in a circle",
        }  # fmt: skip
        kind = kinds.get(stat.S_IFMT(mode), "something else")
        raise StorageError(f"cannot write {path}: it is {kind}, not a regular file; name a file")
    return place


def put_in_place(partial: Path, place: Path) -> None:
    """Rename a written file to its place; it takes the mode and the owner of the file that was there."""
    with contextlib.suppress(FileNotFoundError):
        before = place.stat()
        now = partial.stat()
        if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
            with contextlib.suppress(PermissionError):  # another user's file becomes this one's
                os.chown(partial, before.st_uid, before.st_gid)
        partial.chmod(stat.S_IMODE(before.st_mode))
    partial.rename(place)


@contextlib.contextmanager
def partial_of(place: Path) -> Iterator[Path]:
    """Give a name beside ``place`` for a file that is being made, and remove what has that name afterwards.

    What killed processes left under such names is removed first. One that still runs has a lock on its own.
    """
    for other in place.parent.glob(f".{_escaped(place.name)}.*.partial"):
        if re.fullmatch(rf"\.{re.escape(place.name)}\.\d+\.partial", other.name):
            _remove_if_left(other)
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    lock = place.with_name(f"{partial.name}.lock")
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
        yield partial
    finally:
        for path in (partial, lock):
            path.unlink(missing_ok=True)
        os.close(handle)


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _remove_if_left(partial: Path) -> None:
    lock = partial.with_name(f"{partial.name}.lock")
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        if not lock.exists():
            partial.unlink(missing_ok=True)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    else:
        partial.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, after a file in it was created or renamed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
