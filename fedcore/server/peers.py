"""The sites' processes as the link sees them, and who may join."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from fedcore import __version__, protocol
from fedcore.security.keys import Identity
from fedcore.security.rate_limit import TokenBucket
from fedcore.server.rounds.participation import Roster
from fedcore.transport.link import ServerLink

__all__ = ["Peer", "Peers"]

_LINES: Final = 100
_LINES_PER_SECOND: Final = 0.5
_MAX_NAMES: Final = 4096
_ANSWER_BURST: Final = 16 << 20
_ANSWER_PER_SECOND: Final = 1 << 20

logger = logging.getLogger("fedcore.server")


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


class _Told:
    """What was logged of one name."""

    def __init__(self, now: float) -> None:
        self.lines = TokenBucket(_LINES, _LINES_PER_SECOND, now)
        self.left_out = 0


def unlike_version(join: protocol.Greeting | protocol.Join, error: str = "") -> protocol.Refused:
    """Return the refusal of a site that is not of this server's version; ``error`` is what was not understood."""
    return protocol.Refused(
        code="version",
        message=f"site {join.site!r} speaks protocol {join.protocol} (fedcore {join.version}), the server "
        f"{protocol.PROTOCOL_VERSION} (fedcore {__version__}); install the same version of fedcore on both sides"
        + (f" ({error})"[:2000] if error else ""),
    )


class Peers:
    """Who is there, by the link's routing id.

    Args:
        link, roster: how they are reached, and who may be there.
        run: the run's name and id, for sites that want a certain one.
    """

    def __init__(self, link: ServerLink, roster: Roster, run: tuple[str, str] = ("", "")) -> None:
        self._link = link
        self._run = run
        self._roster = roster
        self._known: dict[bytes, Peer] = {}
        self._lost: dict[str, bytes] = {}
        self._turned_away = (b"", "")
        self._told: dict[str, _Told] = {}
        self._answered: dict[object, TokenBucket] = {}
        self._next_complaint = 0.0
        self._complaints_left_out = 0

    def __iter__(self) -> Iterator[tuple[bytes, Peer]]:
        return iter(list(self._known.items()))

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, peer: bytes) -> bool:
        return peer in self._known

    def get(self, peer: bytes) -> Peer | None:
        """Return who a routing id is; None for a stranger."""
        return self._known.get(peer)

    def name(self, peer: bytes) -> str:
        """Return what a log line calls the sender of a frame."""
        known = self._known.get(peer)
        if known is not None:
            return known.site
        who = Identity.of_peer(peer)
        return f"{who.name} ({who.role})" if who else "a stranger"

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

    # --- turning away ---

    def turn_away(self, peer: bytes, join: protocol.Join) -> bool:
        """Refuse a site that may not join; False, and nothing sent, if it may."""
        refusal = self._refusal(peer, join)
        if refusal is None:
            return False
        self.refuse(peer, join.site, refusal)
        return True

    def refuse(self, peer: bytes, name: str, refusal: protocol.Refused) -> None:
        """Tell a peer, and the log, why it is refused."""
        # A site that is started again at once asks until its dead process is noticed: once is enough to read.
        again = (peer, refusal.code) == self._turned_away
        self._turned_away = (peer, refusal.code)
        level = logging.DEBUG if again else logging.WARNING
        self.tell(name, "refused %s: %s", refusal.message, level=level)
        self._link.send(peer, refusal)

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

    def may_have(self, peer: bytes, answer: int) -> bool:
        """Whether a key may have another answer, of about so many bytes.

        What is beyond `_ANSWER_BURST` at once and `_ANSWER_PER_SECOND` over time is asked for in vain: who does
        not read leaves it all with the server.
        """
        now = time.monotonic()
        owner = Identity.of_peer(peer) or peer
        if owner not in self._answered and len(self._answered) >= _MAX_NAMES:
            self._answered.clear()
        allowance = self._answered.setdefault(
            owner, TokenBucket(_ANSWER_BURST, _ANSWER_PER_SECOND, now)
        )
        if not allowance.take(now):
            return False
        allowance.owe(answer)
        return True

    def tell(self, name: str, text: str, *values: str, level: int = logging.WARNING) -> None:
        """Log what a peer brought about; ``text`` begins with its name. Each name may have `_LINES` at once and
        `_LINES_PER_SECOND` over time, what is beyond is counted: nobody fills the disk."""
        if name not in self._told and len(self._told) >= _MAX_NAMES:
            self._told.clear()
        told = self._told.setdefault(name, _Told(time.monotonic()))
        if not told.lines.take(time.monotonic()):
            told.left_out += 1
            return
        if told.left_out:
            text += f" (and {told.left_out} more lines of {name} were left out)"
            told.left_out = 0
        logger.log(level, text, name, *values)

    def complain(self, text: str, *values: str) -> None:
        """Warn at most once a second: what anyone can send must not fill the disk, nor keep the server busy."""
        now = time.monotonic()
        if now < self._next_complaint:
            self._complaints_left_out += 1
            return
        self._next_complaint = now + 1.0
        if self._complaints_left_out:
            text += f" (and {self._complaints_left_out} more since the last such line)"
            self._complaints_left_out = 0
        logger.warning(text, *values)
