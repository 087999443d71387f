"""The server's last words: every site learns how the run ended, also one that was away when it did."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from fedcore import protocol
from fedcore._core import PeerUnknown
from fedcore.clock import Clock, milliseconds
from fedcore.errors import ProtocolError
from fedcore.transport.ends import ServerEnd
from fedcore.transport.link import HEARTBEAT_MS, Control, DataEvent

from .access import Access
from .peers import Peers

__all__ = ["Goodbye"]

_TURN_SECONDS: Final = 0.2
_NOTE_MS: Final = 250
_SURE_MS: Final = 2 * HEARTBEAT_MS + 500
"""A site that still beats this long after the message was sent has it: one connection keeps the order."""


class Goodbye:
    """Answers sites and viewers once the run is over.

    Args:
        reached: how peers are reached, and the clock.
        peers, access: who is there, and who may be.
        finish: how the run ended.
        idle_ms: a process that is silent for longer (milliseconds) counts as gone, so that its next one may join.
        status: answers a peer that asks how the run stands.
        forget: notes on disk that sites know, so that no later server tells them again.
    """

    def __init__(
        self,
        reached: tuple[ServerEnd, Clock],
        peers: Peers,
        access: Access,
        finish: protocol.Finish,
        *,
        idle_ms: int,
        status: Callable[[bytes], object],
        forget: Callable[[Collection[str]], object],
    ) -> None:
        self._link, self._clock = reached
        self._peers = peers
        self._access = access
        self._finish = finish
        self._idle_ms = idle_ms
        self._status = status
        self._forget = forget
        self._sent: dict[bytes, int] = {}
        self._noted: set[str] = set()
        self._next_note = 0
        self.told: set[str] = set()
        """The sites that know."""
        for peer, _ in peers:
            self._tell(peer)
        for peer in peers.lost():  # a process that was stopped reads it when it goes on
            self._link.send(peer, finish)

    def _tell(self, peer: bytes) -> None:
        self._sent[peer] = milliseconds(self._clock)
        self._link.send(peer, self._finish)

    def until_gone(
        self, seconds: float, hurried: Callable[[], bool], watched: Callable[[], bool]
    ) -> None:
        """Answer for a moment, as long as sites are there that have not left, or somebody watches the status."""
        self._wait(seconds, lambda: hurried() or not (len(self._peers) or watched()))

    def until_told(
        self, sites: Collection[str], seconds: float, hurried: Callable[[], bool]
    ) -> set[str]:
        """Answer until each of ``sites`` knows, for at most so many seconds; returns those that do not."""
        self._note()
        self._wait(seconds, lambda: hurried() or self.told.issuperset(sites))
        return set(sites) - self.told

    def _wait(self, seconds: float, done: Callable[[], bool]) -> None:
        until = self._clock.monotonic() + seconds
        while not done() and (left := until - self._clock.monotonic()) > 0:
            try:
                arrived = self._link.recv(min(left, _TURN_SECONDS))
            except KeyboardInterrupt:
                return
            if isinstance(arrived, Control):
                self._answer(arrived)
            elif arrived is not None:
                self._on_event(arrived)
            self._note()
            self._let_go()

    def _let_go(self) -> None:
        """Forget processes that have fallen silent: one that goes on is asked to join again, and is told then."""
        now = milliseconds(self._clock)
        for peer, _ in self._peers:
            _, left = self._peers.silence(peer, now, self._idle_ms)
            if left < 0:
                self._peers.remove(peer, left=False)
                self._link.exchange.forget(peer)

    def _note(self) -> None:
        """Note who knows: those that left, and those that are still there some beats later."""
        for peer, known in self._peers:
            heard, sent = self._link.exchange.last_heard(peer), self._sent.get(peer)
            if heard is not None and sent is not None and heard > sent + _SURE_MS:
                self.told.add(known.site)
        # A thousand sites leave within a second: not each of them is a transaction of its own.
        if (new := self.told - self._noted) and milliseconds(self._clock) >= self._next_note:
            self._forget(new)
            self._noted |= new
            self._next_note = milliseconds(self._clock) + _NOTE_MS

    def _on_event(self, event: DataEvent) -> None:
        if isinstance(event, PeerUnknown) and event.peer not in self._peers:
            self._link.send(event.peer, protocol.Rejoin())

    def _answer(self, arrived: Control) -> None:
        peer = arrived.peer
        try:
            message = protocol.decode_from_site(arrived.body)
        except ProtocolError:
            return
        if self._access.refusal(peer, message) is not None:
            return
        if isinstance(message, protocol.StatusRequest):
            self._status(peer)
        elif isinstance(message, protocol.Leave):
            known = self._peers.remove(peer)
            if known is not None:
                self.told.add(known.site)
        elif isinstance(message, protocol.Join):
            if not self._peers.turn_away(peer, message):
                if peer not in self._peers:
                    self._peers.add(peer, message.site, message.features)
                self._tell(peer)
        elif isinstance(message, protocol.Command):
            self._link.send(peer, protocol.CommandReply(ok=False, message="the run is over"))
        elif peer not in self._peers:
            self._link.send(peer, protocol.Rejoin())
