"""The one session of a training script's process: made on first use, and forgotten at its end.

Here is also what the script wants of it: to take part, and in which run. A script that ends without having taken
part is warned at its exit: a missing loop looks like success otherwise.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from dataclasses import replace
from typing import Protocol

from fedcore.errors import ConfigError, RunFailedError
from fedcore.security.keys import check_name
from fedcore.site.progress import TerminalHandler
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

__all__ = [
    "forget_intent",
    "get_session",
    "intend",
    "loop_goes_on",
    "made_session",
    "reset_session",
    "use_session",
    "wanted_run",
]

logger = logging.getLogger("fedcore.client")

_session: Session | None = None
_run: str | None = None
_intends = _registered = False


class _Loop(Protocol):
    """What a loop asks a session."""

    @property
    def outcome(self) -> str | None: ...

    def is_running(self) -> bool: ...


def get_session() -> Session:
    """Return this process's session, made on first use from the environment or the kit folder.

    Raises:
        ConfigError: neither says where the server is and which site this is; the text tells what to set.
    """
    global _session  # noqa: PLW0603 - one session per process is the contract
    if _session is None:
        _show_log()
        if (report := os.environ.get("FEDCORE_INSPECT", "0")) not in ("", "0"):
            from fedcore.site.inspecting import InspectingSession

            _session = InspectingSession(report)
        else:
            settings = SiteSettings.from_environment()
            _session = Session(replace(settings, run=wanted_run(settings.run)))
    return _session


def made_session() -> Session | None:
    """Return this process's session if there is one."""
    return _session


def use_session(session: Session) -> None:
    """Make a session this process's, in place of one from the environment; for tests.

    Raises:
        ConfigError: this process has one already.
    """
    global _session  # noqa: PLW0603
    if _session is not None:
        raise ConfigError(
            "this process has a session already; call fedcore.client.shutdown() first"
        )
    _session = session


def reset_session() -> None:
    """Close and forget this process's session."""
    global _session  # noqa: PLW0603
    if _session is not None:
        _session.close()
    _session = None
    forget_intent()


def _show_log() -> None:
    """Give the client's messages a handler on stderr unless the application configured logging."""
    if not logger.handlers and not logging.getLogger().handlers:
        handler = TerminalHandler()
        handler.setFormatter(logging.Formatter("fedcore %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def loop_goes_on(session: _Loop) -> bool:
    """Return whether another pass of a script's loop begins.

    Raises:
        RunFailedError: the run was given up, so that the script does not end as if all were well.
    """
    if session.is_running():
        return True
    if session.outcome == "failed":
        raise RunFailedError("the run was given up; the log says why")
    return False


def intend(run: str | None = None) -> None:
    """Note that this script wants to take part, in the run of this name or id if one is given.

    Raises:
        ConfigError: that is no name; or this process takes part in another run.
    """
    global _run, _intends, _registered  # noqa: PLW0603 - one session per process is the contract
    if run is not None:
        check_name(run, "run=")
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
    session = made_session()
    failed = getattr(sys, "last_value", None) is not None
    if not _intends or failed or session is None or session.took_part or os.getpid() != pid:
        return
    if (
        session.ended_by or session.outcome is not None
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
