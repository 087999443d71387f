"""SIGTERM and SIGHUP at a site: its script ends in order, as by Ctrl-C, unless something else handles them.

By default they end a process at once, and the server notices only when the site has been silent for long enough.
The first process of a container would not even notice SIGTERM.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
from types import FrameType
from typing import Final

__all__ = ["InOrder", "end_in_order", "let_go"]

_NUMBERS: Final = (signal.SIGTERM, signal.SIGHUP)


class InOrder:
    """The handler of a process's signals that ends its script in order.

    Attributes:
        ended_by: the name of the signal that ends this process; empty if none does.
    """

    def __init__(self) -> None:
        self.ended_by = ""

    def __call__(self, number: int, _: FrameType | None) -> None:
        """End the script by SystemExit, on which blocks are left and the session says goodbye."""
        current: object = signal.getsignal(number)
        if current is not self:
            return  # a trainer put its own handler in front and calls this one too: it decides when to end
        self.ended_by = signal.Signals(number).name
        raise SystemExit(128 + number)


def end_in_order() -> InOrder:
    """Have SIGTERM and SIGHUP end this process in order where they would end it at once.

    What the script or a library handles or ignores stays as it is. Only the main thread can change that; in
    another one nothing happens. Returns this process's handler, or one that no signal reaches.
    """
    there = [signal.getsignal(number) for number in _NUMBERS]
    standing = [one for one in there if isinstance(one, InOrder)]
    handler = standing[0] if standing else InOrder()
    if threading.current_thread() is not threading.main_thread():
        return handler
    _follow_forks()
    for number, before in zip(_NUMBERS, there, strict=True):
        if before is signal.SIG_DFL:
            signal.signal(number, handler)
    return handler


@functools.cache
def _follow_forks() -> None:
    """A forked worker has no session to end."""
    os.register_at_fork(after_in_child=let_go)


def let_go() -> None:
    """Give the signals back their default action, where nobody has put another handler in front."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _NUMBERS:
        if isinstance(signal.getsignal(number), InOrder):
            signal.signal(number, signal.SIG_DFL)
