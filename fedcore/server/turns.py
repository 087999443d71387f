"""Which runs of a host may be worked on: one whose journal another process has locked waits, the others go on."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Final

from fedcore._core import SourceStalled
from fedcore.transport.link import DataEvent

from .run import Run

__all__ = ["Turns"]

_AGAIN_SECONDS: Final = 0.25
_MOST_PUT_OFF: Final = 1024


@dataclass
class _PutOff:
    """What is done for a run once its journal is free."""

    acts: list[tuple[Hashable, Callable[[], None]]] = field(default_factory=list)
    messages: int = 0
    size: int = 0
    joining: set[bytes] = field(default_factory=set)
    lost: Counter[tuple[str, str]] = field(default_factory=Counter)


class Turns:
    """Reserves the journals of several runs while the host works on them, and puts off what is for a locked one.

    Args:
        runs: the host's runs.
        working_on: in its ``with`` block is what is done for one run.
        together: the rows of runs that are written in its ``with`` block reach the device together.
        room: bytes of messages that may be put off for one run. Others are lost: a site without an answer repeats.
        alone: the host has one run and never another. It needs none of this: it waits for its journal itself.

    Attributes:
        room: as given.
        most: as many messages may be put off for one run.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        working_on: Callable[[Run], AbstractContextManager[None]],
        together: Callable[[Sequence[Run]], AbstractContextManager[None]],
        room: int,
        *,
        alone: bool,
    ) -> None:
        self._runs = runs
        self._alone = alone
        self._working_on = working_on
        self._together = together
        self.room, self.most = room, _MOST_PUT_OFF
        self._put_off: dict[Run, _PutOff] = {}

    @property
    def longest(self) -> float:
        """Seconds until the journals are tried again; infinity if none is locked."""
        return _AGAIN_SECONDS if self._put_off else float("inf")

    def waits(self, run: Run | None) -> bool:
        """Whether a run waits for its journal: nothing may be done for it."""
        return run in self._put_off

    def put_off(self, run: Run) -> int:
        """Return how much waits to be done for a run."""
        return len(self._put_off[run].acts) if run in self._put_off else 0

    @property
    def free(self) -> list[Run]:
        """The runs that do not wait."""
        return [run for run in self._runs if run not in self._put_off]

    @property
    def deadlines(self) -> list[float]:
        """When the plans of these runs have something to decide."""
        return [run.deadline for run in self.free if run.deadline is not None]

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Work on runs within the ``with`` block: their journals are reserved, or they wait."""
        if self._alone:
            yield
            return
        reserved = [run for run in self._runs if run.error is None and self._reserve(run)]
        try:
            for run in [run for run in self._put_off if run in reserved or run.error is not None]:
                self._resume(run)
            yield
        finally:
            for run in reserved:
                if run.error is None:
                    with self._working_on(run):
                        run.store.release()

    def holding(self, inside: Run | None, peer: bytes) -> Run | None:
        """Return the run for whose journal a peer's messages wait; None if they need not.

        It is the run in which the peer takes part (``inside``), or one for which it waits to join.
        """
        if inside in self._put_off:
            return inside
        return next((run for run, at in self._put_off.items() if peer in at.joining), None)

    def do(self, run: Run, act: Callable[[], None], key: Hashable = None) -> None:
        """Do something for one run, now or once its journal is free; it is never lost.

        Of what has the same ``key`` the last is done alone, where more than one waits.
        """
        waiting = self._put_off.get(run)
        if waiting is None:
            with self._working_on(run):
                act()
            return
        if key is not None:
            waiting.acts = [found for found in waiting.acts if found[0] != key]
        waiting.acts.append((key, act))

    def take(
        self, run: Run, act: Callable[[], None], size: int, joining: bytes | None = None
    ) -> bool:
        """Handle a message of so many bytes for one run, now or once its journal is free, if there is room.

        ``joining`` is the peer that asks to take part, if the message is that. Returns whether there is room.
        """
        waiting = self._put_off.get(run)
        if waiting is None:
            self.do(run, act)
        elif waiting.messages < self.most and waiting.size + size <= self.room:
            waiting.acts.append((None, act))
            waiting.messages += 1
            waiting.size += size
            if joining is not None:
                waiting.joining.add(joining)
        else:
            return False
        return True

    def lose(self, run: Run, site: str, what: str, number: int) -> None:
        """Note that so many values or problems of a site are lost: it does not send them again."""
        waiting = self._put_off.get(run)
        if waiting is not None:
            waiting.lost[site, what] += number

    def hand_over(self, run: Run, event: DataEvent) -> None:
        """Hand an event of the core to a run, now or once its journal is free; every one of its own arrives."""
        waiting = self._put_off.get(run)
        if waiting is None:
            with self._working_on(run):
                run.on_event(event)
        elif run.concerns(event) and not isinstance(event, SourceStalled):  # which comes again
            waiting.acts.append((None, lambda: run.on_event(event)))

    def _reserve(self, run: Run) -> bool:
        with self._working_on(run):
            if run.store.reserve():
                return True
            self._put_off.setdefault(run, _PutOff())
        return False

    def _resume(self, run: Run) -> None:
        waited = self._put_off.pop(run)
        with self._together([run]):
            for _, act in waited.acts:
                with self._working_on(run):
                    act()
            for (site, what), number in waited.lost.items():
                with self._working_on(run):
                    run.note_lost(site, what, number)
