"""What a script has said that it wants: to take part, and in which run.

A script that ends without having taken part is warned at its exit: a missing loop looks like success otherwise.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys

from fedcore.errors import ConfigError
from fedcore.security.keys import check_name

__all__ = ["forget_intent", "intend", "wanted_run"]

logger = logging.getLogger("fedcore.client")

_run: str | None = None
_intends = _registered = False


def intend(run: str | None = None) -> None:
    """Note that this script wants to take part, in the run of this name or id if one is given.

    Raises:
        ConfigError: that is no name; or this process takes part in another run.
    """
    global _run, _intends, _registered  # noqa: PLW0603 - one session per process is the contract
    if run is not None:
        check_name(run, "run=")
        from .current import made_session

        session = made_session()
        if session is not None:
            session.want_run(run)
        _run = run
    _intends = True
    if not _registered:
        atexit.register(_warn, os.getpid())
        _registered = True


def forget_intent() -> None:
    """Forget it; for scripts that take part in several runs in turn."""
    global _run, _intends
    _run, _intends = None, False


def wanted_run(settings: str | None) -> str | None:
    """Return the run that is wanted, by the script or else by its settings.

    Raises:
        ConfigError: they name two.
    """
    if _run is not None and settings not in (None, _run):
        raise ConfigError(
            f"the script wants run {_run!r} (run=...), and FEDCORE_RUN or its kit says {settings!r}: start the "
            "script of that run, or set one of them right"
        )
    return _run if _run is not None else settings


def _warn(pid: int) -> None:
    """Say at the exit that the script took no part; one that failed has said why."""
    from fedcore.site.signals import ended_by

    from .current import made_session

    session = made_session()
    failed = getattr(sys, "last_value", None) is not None
    if not _intends or failed or session is None or session.took_part or os.getpid() != pid:
        return
    if (
        ended_by() or session.outcome is not None
    ):  # a signal ended it, or it came after the end of the run
        return
    if session.run:
        logger.warning(
            "%s: the script ended before it took up a task, so it took no part in run %s; `while "
            "fl.is_running():` waits for each task", session.site, session.run,
        )  # fmt: skip
    else:
        logger.warning(
            "%s: the script ended without asking for a task, so it took no part in any run; the work of a round "
            "belongs in a loop, `while fl.is_running():`", session.site,
        )  # fmt: skip
