"""Secrets that a container platform mounts: which files no other user can have written or exchanged.

A Kubernetes Secret is a memory-backed, read-only volume that belongs to root: its files are links into a folder of
the same volume, with mode 0644, in a folder of mode 1777. A Docker secret is a file of mode 0444 in such a volume.
Modes say little there: whoever sees the mount runs in this container.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Mount", "find_mount", "is_secret_mount", "others_can_replace"]

_TABLE: Final = Path("/proc/self/mountinfo")
_MEMORY: Final = ("tmpfs", "ramfs")
_SHARED: Final = re.compile(r"/|/tmp|/var/tmp|/dev(/shm)?|/run(/lock|/user(/\d+)?)?")
"""Mount points that all users of a machine share, or that are no mount of a secret."""


@dataclass(frozen=True)
class Mount:
    """One line of the system's table of mounts."""

    point: str
    kind: str
    read_only: bool


def find_mount(path: Path, table: Path | None = None) -> Mount | None:
    """Return the mount that a path without links lies on, or None where the system has no table of mounts."""
    try:
        lines = (table or _TABLE).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    found: Mount | None = None
    for line in lines:
        fields = line.split(" ")
        try:
            kind = fields[fields.index("-", 6) + 1]
        except (ValueError, IndexError):
            continue
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        inside = path == Path(point) or Path(point) in path.parents
        # A later mount on the same point covers the earlier one.
        if inside and (found is None or len(point) >= len(found.point)):
            found = Mount(point, kind, "ro" in fields[5].split(","))
    return found


def is_secret_mount(path: Path, table: Path | None = None) -> bool:
    """Return whether a path without links lies on a mount that only a container platform fills.

    That is a read-only or memory-backed mount of its own, and none that all users of a machine share.
    """
    mount = find_mount(path, table)
    if mount is None or _SHARED.fullmatch(mount.point):
        return False
    return mount.read_only or mount.kind in _MEMORY


def others_can_replace(folder: Path) -> bool:
    """Return whether another user than this one and root may exchange a file in ``folder`` for one of theirs.

    In a folder of root with the sticky bit they may add files, but not rename or remove those of others.
    """
    about = folder.stat()
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return False
    if about.st_uid not in (os.geteuid(), 0):
        return True
    return bool(about.st_mode & 0o022) and not about.st_mode & stat.S_ISVTX
