"""Peers that break the rules: what they are told, and how their part in the run ends."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fedcore import __version__, protocol
from fedcore.security.keys import Identity
from fedcore.transport.link import DataEvent, ServerLink, other_version

from .access import Access
from .peers import Peers, unlike_version

__all__ = ["Guard"]

_REVOKED = "this site's key was revoked; ask the server's operator"

logger = logging.getLogger("fedcore.server")


class Guard:
    """Tells peers that they are refused, and ends the part of those that take part.

    Args:
        link, peers, access: who is there, and who may be.
        end: takes a site's process out of the run, with the reason.
    """

    def __init__(
        self, link: ServerLink, peers: Peers, access: Access, end: Callable[[bytes, str], None]
    ) -> None:
        self._link = link
        self._peers = peers
        self._access = access
        self._end = end

    def heard(self, event: DataEvent) -> bool:
        """Answer an event of the link that is about a peer; False if it is about a collection."""
        if event[0] == "malformed":
            self._on_malformed(event[1], event[2])
        elif event[0] == "stranger":
            if event[1] not in self._peers:
                self._link.send(event[1], protocol.Rejoin())  # at once, after a restart
        elif event[0] == "flooded":
            self._on_flood(event[1], event[2])
        elif event[0] == "crowded":
            self._peers.complain(
                "%s has %s: the others are cut", self._peers.name(event[1]), event[2]
            )
            self._link.look()
        else:
            return False
        return True

    def invalid(self, peer: bytes, error: str, greeting: protocol.Greeting | None = None) -> None:
        """A message that breaks the protocol ends its sender's part; a stranger that joins is told."""
        known = self._peers.get(peer)
        self._peers.complain("%s sent a %s", self._peers.name(peer), error)
        if known is not None:
            text = f"the server did not understand this site: {error}"
            self._link.send(peer, protocol.Refused(code="message", message=text[:4096]))
            self._end(peer, f"it sent a {error}")
        elif greeting is not None:
            self._link.send(peer, unlike_version(greeting, error))
        if Identity.of_peer(peer) is not None:
            self._link.mute(peer)  # to find the fault takes the server's time

    def put_out(self, peer: bytes, site: str, code: str, text: str) -> None:
        """Refuse a site that has joined."""
        text = text[:4096]
        self._peers.tell(site, "refused %s: %s", text, level=logging.ERROR)
        self._link.send(peer, protocol.Refused(code=code, message=text))
        self._end(peer, text)

    def take_out_revoked(self) -> list[str]:
        """Take out whose key was revoked, in the middle of a round too; returns the names that have none left."""
        gone = []
        for who in self._access.revoked():
            if not self._access.knows(who.name):  # where a key was replaced, the site is the same
                gone.append(who.name)
            for peer, known in self._peers:
                if Identity.of_peer(peer) == who:
                    self._link.send(peer, protocol.Refused(code="revoked", message=_REVOKED))
                    self._end(peer, "its key was revoked")
                    logger.warning("%s is taken out of the run: its key was revoked", known.site)
        return gone

    def _on_malformed(self, peer: bytes, what: str) -> None:
        self._peers.complain("dropped a frame from %s: %s", self._peers.name(peer), what)
        version = other_version(what)
        if version is not None:
            text = (
                f"this site speaks protocol {version}, the server {protocol.PROTOCOL_VERSION} (fedcore "
                f"{__version__}); install the same version of fedcore on both sides"
            )
            self._link.send(peer, protocol.Refused(code="version", message=text), version)

    def _on_flood(self, peer: bytes, waiting: str) -> None:
        """A key sends more than it may: what waits of it is thrown away, its site's part ends, and with keys it is
        not heard for a while."""
        self._link.exchange.discard(peer)
        self._peers.complain("%s floods the server: %s", self._peers.name(peer), waiting)
        who = Identity.of_peer(peer)
        refusal = protocol.Refused(code="flood", message=f"this key floods the server: {waiting}")
        if who is not None and peer not in self._peers:
            self._link.send(peer, refusal)
        for other, _ in self._peers:
            if other == peer or (who is not None and Identity.of_peer(other) == who):
                self._link.send(other, refusal)
                self._end(other, f"it floods the server: {waiting}")
        if who is not None:
            self._link.mute(peer)
