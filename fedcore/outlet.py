"""A way out that can be held shut: what must not leave before something else is on disk waits in it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Outlet"]

_Item = TypeVar("_Item")


class Outlet(Generic[_Item]):
    """Passes items on in their order, at once or when nobody holds it any more. One thread uses it.

    Args:
        pass_on: takes an item that leaves.
    """

    def __init__(self, pass_on: Callable[[_Item], object]) -> None:
        self._pass_on = pass_on
        self._holders = 0
        self._waiting: deque[_Item] = deque()

    @property
    def held(self) -> bool:
        """Whether what is put in has to wait."""
        return self._holders > 0

    def put(self, item: _Item) -> None:
        """Pass an item on, behind those that wait."""
        self._waiting.append(item)
        self._drain()

    def hold(self) -> None:
        """Let nothing leave until `release` or `discard` is called as often as this."""
        self._holders += 1

    def release(self) -> None:
        """End one hold; what waits leaves if that was the last one."""
        self._holders -= 1
        self._drain()

    def discard(self) -> None:
        """End one hold, and drop all that waits: it must never leave."""
        self._waiting.clear()
        self._holders -= 1

    def _drain(self) -> None:
        while self._waiting and not self._holders:
            self._pass_on(self._waiting.popleft())
