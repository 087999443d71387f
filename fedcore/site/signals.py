"""SIGTERM and SIGHUP at a site: its script ends in order, as by Ctrl-C, unless something else handles them.

By default they end a process at once, and the server notices only when the site has been silent for long enough.
The first process of a container would not even notice SIGTERM.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Final

__all__ = ["end_in_order", "ended_by", "let_go"]

_NUMBERS: Final = (signal.SIGTERM, signal.SIGHUP)

_ended_by = ""
_follows_forks = False


def _end(number: int, _: FrameType | None) -> None:
    """End the script by SystemExit, on which blocks are left and the session says goodbye."""
    global _ended_by  # noqa: PLW0603 - a signal is the process's
    if signal.getsignal(number) is not _end:
        return  # a trainer put its own handler in front and calls this one too: it decides when to end
    _ended_by = signal.Signals(number).name
    raise SystemExit(128 + number)


def end_in_order() -> None:
    """Have SIGTERM and SIGHUP end this process in order where they would end it at once.

    What the script or a library handles or ignores stays as it is. Only the main thread can change that; in
    another one nothing happens.
    """
    global _follows_forks  # noqa: PLW0603
    if threading.current_thread() is not threading.main_thread():
        return
    if not _follows_forks:
        # A forked worker has no session to end.
        os.register_at_fork(after_in_child=let_go)
        _follows_forks = True
    for number in _NUMBERS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)


def let_go() -> None:
    """Give the signals back their default action, where nobody has put another handler in front."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _NUMBERS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_DFL)


def ended_by() -> str:
    """Return the name of the signal that ends this process; empty if none does."""
    return _ended_by
