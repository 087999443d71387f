"""Peers that break the rules: how they are answered, and how their part in the run ends.

A log line about a peer that takes part in a run is the run's, any other is the host's.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

from fedcore import __version__, protocol
from fedcore._core import ConnectionsExceeded, FrameMalformed, PeerUnknown, RateExceeded
from fedcore.security.keys import Identity
from fedcore.transport.ends import ServerEnd
from fedcore.transport.link import DataEvent, other_version

from .access import Access
from .peers import Peers, name_of, unlike_version
from .replies import Replies

__all__ = ["Guard"]

_REVOKED = "this site's key was revoked; ask the server's operator"

logger = logging.getLogger("fedcore.server")


class _Run(Protocol):
    """What the guard asks of a run."""

    @property
    def peers(self) -> Peers: ...

    def send(self, peer: bytes, message: protocol.FromServer) -> None: ...

    def end_part(self, peer: bytes, reason: str) -> None: ...


_R = TypeVar("_R", bound=_Run)


class Guard(Generic[_R]):
    """Answers peers that are refused, and ends the part of those that take part.

    Args:
        link, access, replies: how peers are reached, who may be there, and what is logged of them.
        runs: the host's runs.
        working_on: in its ``with`` block is what is done for one run.
        do: does something for one run, now or once its journal is free; of what has the same key the last alone.
    """

    def __init__(
        self,
        link: ServerEnd,
        access: Access,
        replies: Replies,
        runs: Sequence[_R],
        *,
        working_on: Callable[[_R], AbstractContextManager[None]],
        do: Callable[[_R, Callable[[], None], Hashable], None],
    ) -> None:
        self._link = link
        self._access = access
        self._replies = replies
        self._runs = runs
        self._working_on = working_on
        self._do = do

    def run_of(self, peer: bytes) -> _R | None:
        """Return the run in which a peer takes part; None if in none."""
        return next((run for run in self._runs if peer in run.peers), None)

    def name(self, peer: bytes) -> str:
        """Return what a log line calls the sender of a frame."""
        run = self.run_of(peer)
        return name_of(peer, None if run is None else run.peers.get(peer))

    def of_run_of(self, peer: bytes) -> AbstractContextManager[None]:
        """What is done in this ``with`` block is done for the run in which a peer takes part, if in any."""
        run = self.run_of(peer)
        return contextlib.nullcontext() if run is None else self._working_on(run)

    def handle(self, event: DataEvent) -> bool:
        """Answer an event of the link that is about a peer; False if it is about a collection."""
        if not isinstance(event, FrameMalformed | PeerUnknown | RateExceeded | ConnectionsExceeded):
            return False
        with self.of_run_of(event.peer):
            self._answer(event)
        return True

    def _answer(
        self, event: FrameMalformed | PeerUnknown | RateExceeded | ConnectionsExceeded
    ) -> None:
        if isinstance(event, FrameMalformed):
            self._on_malformed(event.peer, event.message)
        elif isinstance(event, PeerUnknown):
            if self.run_of(event.peer) is None:
                self._link.send(event.peer, protocol.Rejoin())  # at once, after a restart
        elif isinstance(event, RateExceeded):
            self._on_flood(event.peer, event.message)
        else:
            name = self.name(event.peer)
            self._replies.complain("%s has %s: the others are cut", name, event.message)
            self._link.look()

    def invalid(self, peer: bytes, error: str, greeting: protocol.Greeting | None = None) -> None:
        """A message that breaks the protocol ends its sender's part; who joins gets the reason."""
        run = self.run_of(peer)
        self._replies.complain("%s sent a %s", self.name(peer), error)
        if run is not None:
            text = f"the server did not understand this site: {error}"
            run.send(peer, protocol.Refused(code="message", message=text[:4096]))
            run.end_part(peer, f"it sent a {error}")
        elif greeting is not None:
            self._link.send(peer, unlike_version(greeting, error))
        if Identity.of_peer(peer) is not None:
            self._link.mute(peer)  # to find the fault takes the server's time

    def take_out_revoked(self) -> list[str]:
        """Take out whose key was revoked, in the middle of a round too; returns the names that have none left."""
        gone = []
        for who in self._access.revoked():
            if not self._access.knows(who.name):  # where a key was replaced, the site is the same
                gone.append(who.name)
            for run, peer, site in self._all():
                if Identity.of_peer(peer) == who:
                    self._do(
                        run, functools.partial(self._take_out, run, peer, site), (peer, "revoked")
                    )
        return gone

    def _take_out(self, run: _R, peer: bytes, site: str) -> None:
        run.send(peer, protocol.Refused(code="revoked", message=_REVOKED))
        run.end_part(peer, "its key was revoked")
        logger.warning("%s is taken out of the run: its key was revoked", site)

    def _all(self) -> list[tuple[_R, bytes, str]]:
        """Return all peers with their runs and sites."""
        return [(run, peer, known.site) for run in self._runs for peer, known in run.peers]

    def _on_malformed(self, peer: bytes, what: str) -> None:
        self._replies.complain("dropped a frame from %s: %s", self.name(peer), what)
        version = other_version(what)
        if version is not None:
            text = (
                f"this site speaks protocol {version}, the server {protocol.PROTOCOL_VERSION} (fedcore "
                f"{__version__}); install the same version of fedcore on both sides"
            )
            self._link.send(peer, protocol.Refused(code="version", message=text), version)

    def _end_flood(self, run: _R, peer: bytes, refusal: protocol.Refused, waiting: str) -> None:
        run.send(peer, refusal)
        run.end_part(peer, f"it floods the server: {waiting}")

    def _on_flood(self, peer: bytes, waiting: str) -> None:
        """A key sends more than it may: what waits of it is thrown away, and with keys it is ignored for a while.

        Its part ends in the run of the peer that floods, or in all runs if that peer is in none.
        """
        self._link.exchange.discard(peer)
        self._replies.complain("%s floods the server: %s", self.name(peer), waiting)
        who = Identity.of_peer(peer)
        refusal = protocol.Refused(code="flood", message=f"this key floods the server: {waiting}")
        inside = self.run_of(peer)
        if who is not None and inside is None:
            self._link.send(peer, refusal)
        for run, other, _ in self._all():
            same_key = who is not None and Identity.of_peer(other) == who
            if other == peer or (same_key and inside in (None, run)):
                self._do(
                    run,
                    functools.partial(self._end_flood, run, other, refusal, waiting),
                    (other, "flood"),
                )
        if who is not None:
            self._link.mute(peer)
