"""How many files a process may have open. libzmq ends the process where it finds none left: so we ask before."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

from fedcore.errors import ConfigError

__all__ = ["file_limit", "require_files", "require_free_files"]

_UNKNOWN_OPEN: Final = 16
"""What is taken to be open where the system does not tell."""


def file_limit(wanted: int | None = None) -> int | None:
    """Return how many files this process may have open; None where there is no limit, or none is known.

    It is raised before, to ``wanted`` or (None) as far as it goes.
    """
    try:
        import resource
    except ImportError:
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and (wanted is None or soft < wanted):
        most = hard if wanted is None or hard != resource.RLIM_INFINITY else wanted
        more = most if wanted is None else min(wanted, most)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def require_files(needed: int, who: str) -> None:
    """Check that this process may have ``needed`` files open in all, and let it have as many as it may.

    Raises:
        ConfigError: it may not; the message says what ``who`` needs, and how to allow it.
    """
    limit = file_limit()
    if limit is not None and limit < needed:
        raise ConfigError(_too_few(limit, needed, who))


def require_free_files(needed: int, who: str) -> None:
    """As `require_files`, but beyond those that are open now; the limit is raised only where it has to be."""
    try:
        total = sum(1 for _ in Path("/proc/self/fd").iterdir()) + needed
    except OSError:
        total = _UNKNOWN_OPEN + needed
    limit = file_limit(total)
    if limit is not None and limit < total:
        raise ConfigError(_too_few(limit, total, who))


def _too_few(limit: int, needed: int, who: str) -> str:
    return (
        f"this process may have {limit} files open, and {who} needs {needed}: raise the limit, with "
        f"`ulimit -n {needed}` in the shell that starts it, LimitNOFILE={needed} in its systemd unit, or "
        f"`docker run --ulimit nofile={needed}`"
    )
