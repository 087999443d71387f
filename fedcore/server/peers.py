"""The sites' processes as the link sees them, and who may join."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from fedcore import __version__, protocol
from fedcore.security.keys import Identity
from fedcore.server.rounds.participation import Roster

from .replies import Replies
from .run_link import RunLink

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
    return f"{who.name} ({who.role})" if who else "an unknown peer"


class Peers:
    """Who takes part in a run, by the link's routing id.

    Args:
        link, roster: how they are reached, and who may be there.
        replies: the host's refusals and log lines.
        run: the run's name and id, for sites that want a certain one.
    """

    def __init__(
        self, link: RunLink, roster: Roster, replies: Replies, run: tuple[str, str]
    ) -> None:
        self._link = link
        self._run = run
        self.replies = replies
        self._roster = roster
        self._known: dict[bytes, Peer] = {}
        self._lost: dict[str, bytes] = {}
        self._of_sites: dict[str, bytes] = {}
        self._unheard: dict[bytes, int] = {}

    def __iter__(self) -> Iterator[tuple[bytes, Peer]]:
        return iter(list(self._known.items()))

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, peer: bytes) -> bool:
        return peer in self._known

    def get(self, peer: bytes) -> Peer | None:
        """Return who a routing id is; None for an unknown one."""
        return self._known.get(peer)

    def of_site(self, site: str) -> tuple[bytes, Peer] | None:
        """Return a site's process and its routing id; None if it is not there."""
        peer = self._of_sites.get(site)
        return None if peer is None else (peer, self._known[peer])

    @property
    def addresses(self) -> Mapping[str, bytes]:
        """Each site's routing id, as long as it is there."""
        return MappingProxyType(self._of_sites)

    def add(self, peer: bytes, site: str, features: Mapping[str, int]) -> None:
        """Note that a site is there, and what it can do."""
        self._known[peer] = Peer(site, features)
        self._of_sites[site] = peer
        self._link.enrol(peer)

    def remove(self, peer: bytes, *, left: bool = True) -> Peer | None:
        """Note that a site's process has left, or is lost; returns what it was."""
        known = self._known.pop(peer, None)
        if known is None:
            return None
        del self._of_sites[known.site]
        self._unheard.pop(peer, None)
        gone = peer
        if not left:  # it may come back, and goes on pulling then
            gone = self._lost.get(known.site, peer)
            self._lost[known.site] = peer
        if gone not in self._known and (left or gone != peer):
            self._link.expel(gone)
        return known

    def lost(self) -> list[bytes]:
        """Return the last routing ids of the sites that were lost and are not back."""
        return [peer for site, peer in self._lost.items() if site not in self._of_sites]

    def send_to(self, site: str, message: protocol.FromServer) -> None:
        """Send a message to a site, if it is there."""
        peer = self._of_sites.get(site)
        if peer is not None:
            self._link.send(peer, message)

    def broadcast(self, message: protocol.FromServer) -> None:
        """Send a message to all sites that are there."""
        for peer in self._known:
            self._link.send(peer, message)

    def look(self, now: int, limit: int, longest: int) -> tuple[list[tuple[bytes, int]], int]:
        """Look at all processes, which is not to be done with each message: there may be a thousand.

        Args:
            now: milliseconds of the link's clock.
            limit: how long a process may be silent, in milliseconds; longer where a chunk may be on its way.
            longest: milliseconds between two looks, at most.

        Returns the routing ids of those that are gone, with the milliseconds for which nothing has come of them;
        and in how many milliseconds to look again.
        """
        exchange = self._link.exchange
        gone: list[tuple[bytes, int]] = []
        for peer in self._known:
            silent = exchange.silent_ms(peer, now)
            if (
                silent is None
            ):  # its join had come before the link forgot what was before: its time begins now
                silent = now - self._unheard.setdefault(peer, now)
            else:
                self._unheard.pop(peer, None)
            left = max(limit - silent, exchange.busy_until(peer) - now)
            if left < 0:
                gone.append((peer, silent))
            else:
                longest = min(longest, left + 1)
        return gone, longest

    # --- turning away ---

    def turn_away(self, peer: bytes, join: protocol.Join) -> bool:
        """Refuse a site that may not join; False, and nothing sent, if it may."""
        refusal = self._refusal(peer, join)
        if refusal is None:
            return False
        self.replies.refuse(peer, join.site, refusal, self._link)
        return True

    def _refusal(self, peer: bytes, join: protocol.Join) -> protocol.Refused | None:
        if join.protocol != protocol.PROTOCOL_VERSION:
            return unlike_version(join)
        reason = self._roster.refusal(join.site)
        if join.run not in (None, *self._run):
            # Only a site of this run learns its name: the other may be one of another run.
            serves = f"serves run {self._run[0]!r}, and not" if reason is None else "does not serve"
            return protocol.Refused(
                code="other-run",
                message=f"this server {serves} run {join.run!r}, which site {join.site!r} wants; check the "
                "server's address, or which run the site names (FEDCORE_RUN, its kit, or run=... in its script)",
            )
        if reason is not None:
            if Identity.of_peer(peer) is not None:  # its key gives its name, so no list helps it
                reason = f"site {join.site!r} is not a site of this run"
            return protocol.Refused(code="unknown-site", message=reason)
        if self._of_sites.get(join.site, peer) != peer:
            return protocol.Refused(
                code="name-in-use",
                message=f"another process takes part as {join.site!r}; every site needs a name of its own: "
                "that of its kit, or without keys FEDCORE_SITE",
            )
        return None
