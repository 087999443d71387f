"""How much memory a site may take for what it receives, and how the C library deals with it."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import Final

__all__ = ["available_memory", "keep_warm"]

_MEMINFO: Final = Path("/proc/meminfo")
_CGROUPS: Final = Path("/sys/fs/cgroup")
OWN_GROUP: Final = Path("/proc/self/cgroup")
_WARM_BYTES: Final = 8 << 20  # half of what glibc keeps then


def available_memory(meminfo: Path = _MEMINFO, cgroups: Path = _CGROUPS) -> int:
    """Return the bytes that can be taken without swapping; 0 where the system does not say.

    The least of what the machine has left and what each control group (version 2) around this process has left,
    where a group's cached files count as taken.
    """
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text("ascii").splitlines())
        left = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return 0
    for group in _groups(cgroups):
        with contextlib.suppress(OSError, ValueError):  # no limit reads "max"
            limit = int((group / "memory.max").read_text("ascii"))
            left = min(left, limit - int((group / "memory.current").read_text("ascii")))
    return max(0, left)


def _groups(root: Path) -> list[Path]:
    """Return the control groups that this process is in, the innermost first."""
    with contextlib.suppress(OSError, StopIteration):
        lines = OWN_GROUP.read_text("ascii").splitlines()
        path = root / next(line[3:] for line in lines if line.startswith("0::")).strip("/")
        return [path, *(parent for parent in path.parents if parent.is_relative_to(root))]
    return []


def keep_warm() -> None:
    """Let the C library keep the memory of received chunks, for the next ones to find with its pages in place.

    glibc gives freed blocks of 1 MiB back to the system, which has to clear the pages of the next ones, until a
    larger block was freed once. This frees one, of which no page is ever touched. Elsewhere it does nothing.
    """
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.malloc.restype = ctypes.c_void_p
        library.malloc.argtypes = [ctypes.c_size_t]
        library.free.argtypes = [ctypes.c_void_p]
        library.free(library.malloc(_WARM_BYTES))
