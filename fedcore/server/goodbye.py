"""A run's last messages: every site learns how the run ended, also one that was away when it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from fedcore import protocol
from fedcore.clock import Clock, milliseconds
from fedcore.transport.link import HEARTBEAT_MS

from .peers import Peers
from .run_link import RunLink

__all__ = ["Goodbye", "Patience"]

_TURN_SECONDS: Final = 0.2
_NOTE_MS: Final = 250
_LOOK_MS: Final = 250
_SURE_MS: Final = 2 * HEARTBEAT_MS + 500
"""A site that still beats this long after the message was sent has it: one connection keeps the order."""


@dataclass(frozen=True)
class Patience:
    """For how long, and for whom, a run that is over still answers.

    Attributes:
        leave: seconds for the sites that are there to leave, and for viewers to see the end.
        linger: seconds after that, for sites that may not know of the end.
        idle: seconds of silence after which a process counts as gone, so that its next one may join.
        hurried: whether it is to end at once.
        watched: whether a viewer does not know of the end yet.
        expected: the sites that have to know of it.
    """

    leave: float
    linger: float
    idle: float
    hurried: Callable[[], bool]
    watched: Callable[[], bool]
    expected: Callable[[], set[str]]


class Goodbye:
    """Answers sites once a run is over.

    Args:
        reached: how peers are reached, and the clock.
        peers: the sites that are there.
        finish: how the run ended.
        patience: for how long it answers, and for whom.
        forget: notes on disk that sites know, so that no later server tells them again.

    Attributes:
        patience: as given.
    """

    def __init__(
        self,
        reached: tuple[RunLink, Clock],
        peers: Peers,
        finish: protocol.Finish,
        patience: Patience,
        *,
        forget: Callable[[Collection[str]], object],
    ) -> None:
        self._link, self._clock = reached
        self._peers = peers
        self._finish = finish
        self.patience = patience
        self._forget = forget
        self._sent: dict[bytes, int] = {}
        self._noted: set[str] = set()
        self._next_note = self._next_look = 0
        self._told: set[str] = set()
        self._until: float | None = None
        self._over = False
        self._expected: set[str] | None = None
        for peer, _ in peers:
            self._tell(peer)
        for peer in peers.lost():  # a process that was stopped reads it when it goes on
            self._link.send(peer, finish)

    @property
    def next_look(self) -> float:
        """When `look` is due, if nothing arrives before; infinity if never."""
        if self._over:
            return self._next_look / 1000 if len(self._peers) else math.inf
        turn = self._clock.monotonic() + _TURN_SECONDS
        return turn if self._until is None else min(self._until, turn)

    @property
    def untold(self) -> set[str]:
        """The sites that may not know of the end."""
        return (self._expected or set()) - self._told

    def look(self) -> bool:
        """Note who knows of the end; returns whether nobody is waited for any more.

        After that it only forgets processes that have fallen silent, as long as other runs keep this server here.
        """
        self._look_at_peers()
        if self._over:
            return True
        self._note()
        now, patience = self._clock.monotonic(), self.patience
        if self._until is None:
            self._until = now + patience.leave
        over = patience.hurried() or now >= self._until
        if self._expected is None:
            if not over and (len(self._peers) or patience.watched()):
                return False
            self._expected = patience.expected()
            self._until = now + patience.linger
            over = patience.hurried() or patience.linger <= 0
        self._over = over or not self.untold
        return self._over

    def handle(self, peer: bytes, message: protocol.FromSite) -> None:
        """Answer a message."""
        if isinstance(message, protocol.Leave):
            known = self._peers.remove(peer)
            if known is not None:
                self._told.add(known.site)
        elif isinstance(message, protocol.Join):
            if not self._peers.turn_away(peer, message):
                if peer not in self._peers:
                    self._peers.add(peer, message.site, message.features)
                self._tell(peer)
        elif isinstance(message, protocol.Command):
            self._link.send(peer, protocol.CommandReply(ok=False, message="the run is over"))
        elif peer not in self._peers:
            self._link.send(peer, protocol.Rejoin())

    def _tell(self, peer: bytes) -> None:
        self._sent[peer] = milliseconds(self._clock)
        self._link.send(peer, self._finish)

    def _look_at_peers(self) -> None:
        """See who knows, as they are still there some beats later, and forget processes that have fallen silent:
        one that goes on is asked to join again, and is told then."""
        now = milliseconds(self._clock)
        if now < self._next_look:
            return
        for peer, known in self._peers:
            heard, sent = self._link.exchange.last_heard(peer), self._sent.get(peer)
            if heard is not None and sent is not None and heard > sent + _SURE_MS:
                self._told.add(known.site)
        gone, wait = self._peers.look(now, round(self.patience.idle * 1000), _LOOK_MS)
        self._next_look = now + wait
        for peer, _ in gone:
            self._peers.remove(peer, left=False)
            self._link.exchange.forget(peer)

    def _note(self) -> None:
        """Write down who knows."""
        # A thousand sites leave within a second: not each of them is a transaction of its own.
        now = milliseconds(self._clock)
        if (new := self._told - self._noted) and now >= self._next_note:
            self._forget(new)
            self._noted |= new
            self._next_note = now + _NOTE_MS
