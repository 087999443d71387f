"""The sites' processes as the link sees them, and who may join."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fedcore import __version__, protocol
from fedcore.security.keys import Identity
from fedcore.server.rounds.participation import Roster
from fedcore.transport.ends import ServerEnd

from .replies import Replies

__all__ = ["Peer", "Peers", "name_of", "unlike_version"]


@dataclass
class Peer:
    """A site's process.

    Attributes:
        metrics: the last that it reported of its training.
        features: what it can do.
        lacks_room: whether the disk has no room for the first model that it declared.
    """

    site: str
    features: Mapping[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    lacks_room: bool = False


def unlike_version(join: protocol.Greeting | protocol.Join, error: str = "") -> protocol.Refused:
    """Return the refusal of a site that is not of this server's version; ``error`` is what was not understood."""
    return protocol.Refused(
        code="version",
        message=f"site {join.site!r} speaks protocol {join.protocol} (fedcore {join.version}), the server "
        f"{protocol.PROTOCOL_VERSION} (fedcore {__version__}); install the same version of fedcore on both sides"
        + (f" ({error})"[:2000] if error else ""),
    )


def name_of(peer: bytes, known: Peer | None) -> str:
    """Return what a log line calls a peer."""
    if known is not None:
        return known.site
    who = Identity.of_peer(peer)
    return f"{who.name} ({who.role})" if who else "a stranger"


class Peers:
    """Who takes part in a run, by the link's routing id.

    Args:
        link, roster: how they are reached, and who may be there.
        replies: the host's refusals and log lines.
        run: the run's name and id, for sites that want a certain one.
    """

    def __init__(
        self, link: ServerEnd, roster: Roster, replies: Replies, run: tuple[str, str]
    ) -> None:
        self._link = link
        self._run = run
        self.replies = replies
        self._roster = roster
        self._known: dict[bytes, Peer] = {}
        self._lost: dict[str, bytes] = {}

    def __iter__(self) -> Iterator[tuple[bytes, Peer]]:
        return iter(list(self._known.items()))

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, peer: bytes) -> bool:
        return peer in self._known

    def get(self, peer: bytes) -> Peer | None:
        """Return who a routing id is; None for a stranger."""
        return self._known.get(peer)

    def addresses(self) -> dict[str, bytes]:
        """Return each site's routing id."""
        return {known.site: peer for peer, known in self._known.items()}

    def add(self, peer: bytes, site: str, features: Mapping[str, int]) -> None:
        """Note that a site is there, and what it can do."""
        self._known[peer] = Peer(site, features)

    def remove(self, peer: bytes, *, left: bool = True) -> Peer | None:
        """Note that a site's process has left, or is lost; returns what it was."""
        known = self._known.pop(peer, None)
        if known is not None and not left:
            self._lost[known.site] = peer
        return known

    def lost(self) -> list[bytes]:
        """Return the last routing ids of the sites that were lost and are not back."""
        back = {known.site for known in self._known.values()}
        return [peer for site, peer in self._lost.items() if site not in back]

    def send_to(self, site: str, message: protocol.FromServer) -> None:
        """Send a message to a site, if it is there."""
        for peer, known in self._known.items():
            if known.site == site:
                self._link.send(peer, message)

    def broadcast(self, message: protocol.FromServer) -> None:
        """Send a message to all sites that are there."""
        for peer in self._known:
            self._link.send(peer, message)

    def silence(self, peer: bytes, now: int, limit: int) -> tuple[int, int]:
        """Return for how long nothing came of a process, and how long it may still be silent; in milliseconds.

        It is gone once the second is below 0: after ``limit``, or later where a chunk may still be on its way.
        """
        exchange = self._link.exchange
        heard = exchange.last_heard(peer)
        silent = limit + 1 if heard is None else now - heard
        return silent, max(limit - silent, exchange.busy_until(peer) - now)

    # --- turning away ---

    def turn_away(self, peer: bytes, join: protocol.Join) -> bool:
        """Refuse a site that may not join; False, and nothing sent, if it may."""
        refusal = self._refusal(peer, join)
        if refusal is None:
            return False
        self.replies.refuse(peer, join.site, refusal)
        return True

    def _refusal(self, peer: bytes, join: protocol.Join) -> protocol.Refused | None:
        if join.protocol != protocol.PROTOCOL_VERSION:
            return unlike_version(join)
        if join.run not in (None, *self._run):
            return protocol.Refused(
                code="other-run",
                message=f"this server serves run {self._run[0]!r}, and site {join.site!r} wants run {join.run!r}; "
                "check the server's address, or which run the site names (FEDCORE_RUN, its kit, or run=... in its "
                "script)",
            )
        reason = self._roster.refusal(join.site)
        if reason is not None:
            return protocol.Refused(code="unknown-site", message=reason)
        for other, known in self._known.items():
            if known.site == join.site and other != peer:
                return protocol.Refused(
                    code="name-in-use",
                    message=f"another process takes part as {join.site!r}; every site needs a name of its own: "
                    "that of its kit, or without keys FEDCORE_SITE",
                )
        return None
