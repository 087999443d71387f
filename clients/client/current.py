"""The one session of a training script's process: made on first use, and forgotten at its end."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from fedcore.errors import RunFailedError
from fedcore.site.progress import TerminalHandler
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

from .intent import forget_intent, wanted_run

if TYPE_CHECKING:
    from .ranks import RankedSession

__all__ = ["get_session", "loop_goes_on", "made_session", "reset_session"]

logger = logging.getLogger("fedcore.client")

_session: Session | None = None


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


def loop_goes_on(session: Session | RankedSession) -> bool:
    """Return whether another pass of a script's loop begins.

    Raises:
        RunFailedError: the run was given up, so that the script does not end as if all were well.
    """
    if session.is_running():
        return True
    if session.outcome == "failed":
        raise RunFailedError("the run was given up; the log says why")
    return False
