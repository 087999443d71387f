"""Refusals, and log lines about peers: each peer has a rate limit, so that none fills the disk or the memory."""

from __future__ import annotations

import logging
from typing import Final

from fedcore import protocol
from fedcore.clock import Clock
from fedcore.security.keys import Identity
from fedcore.security.rate_limit import TokenBucket
from fedcore.transport.ends import ServerEnd

from .run_link import RunLink

__all__ = ["ANSWER_BURST", "ANSWER_PER_SECOND", "LINES", "LINES_PER_SECOND", "Replies"]

LINES: Final = 100
LINES_PER_SECOND: Final = 0.5
_MAX_NAMES: Final = 4096
ANSWER_BURST: Final = 16 << 20
ANSWER_PER_SECOND: Final = 1 << 20

logger = logging.getLogger("fedcore.server")


class _Lines:
    """The log lines of one name."""

    def __init__(self, now: float) -> None:
        self.bucket = TokenBucket(LINES, LINES_PER_SECOND, now)
        self.left_out = 0


class Replies:
    """What a host logs of its peers, and answers those that it refuses.

    Args:
        link: how peers are reached.
        clock: the rate limits' clock.
    """

    def __init__(self, link: ServerEnd, clock: Clock) -> None:
        self._link = link
        self._clock = clock
        self._refused = (b"", "")
        self._lines: dict[str, _Lines] = {}
        self._answered: dict[object, TokenBucket] = {}
        self._next_complaint = 0.0
        self._complaints_left_out = 0

    def refuse(
        self, peer: bytes, name: str, refusal: protocol.Refused, link: RunLink | None = None
    ) -> None:
        """Send a refusal to a peer, and log it.

        Args:
            link: of the run that refuses, so that what it has sent before does not come after; None: the host's.
        """
        # A site that is started again at once asks until its dead process is noticed: once is enough to read.
        again = (peer, refusal.code) == self._refused
        self._refused = (peer, refusal.code)
        level = logging.DEBUG if again else logging.WARNING
        self.tell(name, "refused %s: %s", refusal.message, level=level)
        (link or self._link).send(peer, refusal)

    def may_have(self, peer: bytes, answer: int) -> bool:
        """Whether a key may have another answer, of about so many bytes.

        What is beyond `ANSWER_BURST` at once and `ANSWER_PER_SECOND` over time is asked for in vain: who does
        not read leaves it all with the server.
        """
        now = self._clock.monotonic()
        owner = Identity.of_peer(peer) or peer
        if owner not in self._answered and len(self._answered) >= _MAX_NAMES:
            self._answered.clear()
        bucket = self._answered.setdefault(owner, TokenBucket(ANSWER_BURST, ANSWER_PER_SECOND, now))
        if not bucket.take(now):
            return False
        bucket.owe(answer)
        return True

    def tell(self, name: str, text: str, *values: str, level: int = logging.WARNING) -> None:
        """Log what a peer brought about; ``text`` begins with its name.

        Each name may have `LINES` at once and `LINES_PER_SECOND` over time; further lines are counted.
        """
        now = self._clock.monotonic()
        if name not in self._lines and len(self._lines) >= _MAX_NAMES:
            self._lines.clear()
        lines = self._lines.setdefault(name, _Lines(now))
        if not lines.bucket.take(now):
            lines.left_out += 1
            return
        if lines.left_out:
            text += f" (and {lines.left_out} more lines of {name} were left out)"
            lines.left_out = 0
        logger.log(level, text, name, *values)

    def complain(self, text: str, *values: str) -> None:
        """Warn at most once a second: what anyone can send must not fill the disk, nor keep the server busy."""
        now = self._clock.monotonic()
        if now < self._next_complaint:
            self._complaints_left_out += 1
            return
        self._next_complaint = now + 1.0
        if self._complaints_left_out:
            text += f" (and {self._complaints_left_out} more since the last such line)"
            self._complaints_left_out = 0
        logger.warning(text, *values)
