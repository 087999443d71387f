"""The sites that take part in a run: who is lost, too slow, or sends what is not usable."""

from __future__ import annotations

import logging
from typing import Literal

from fedcore import protocol
from fedcore._core import SetDamaged
from fedcore.clock import milliseconds
from fedcore.events import (
    SiteLost,
    UpdateRefused,
)
from fedcore.server.rounds.overtime import Overtime
from fedcore.transport.link import DataEvent

from .acting import Acting
from .collecting import Reduced, Rejected, Stalled
from .parts import Parts

__all__ = ["Attendance"]

logger = logging.getLogger("fedcore.server")


class Attendance:
    """Watches the sites of a run, and ends the part of those that are lost or refused.

    Args:
        run: the run's parts.
        acting: carries out what its plan decides.

    Attributes:
        next_look: when the sites are looked at next.
    """

    def __init__(self, run: Parts, acting: Acting) -> None:
        self._run = run
        self._acting = acting
        self.next_look = 0.0
        self._overtime = Overtime()

    def check_alive(self) -> None:
        """Look at all sites: not with each message, as there may be a thousand of them, but now and then, and when
        the first of them will have been silent for too long."""
        if self._run.clock.monotonic() < self.next_look:
            return
        limit = round(self._run.config.participants.idle_timeout * 1000)
        patience = round(self._run.timing.check * 1000)
        gone, patience = self._run.peers.look(milliseconds(self._run.clock), limit, patience)
        for peer, silent in gone:
            if peer in self._run.peers:
                self.lose(peer, f"nothing heard for {silent / 1000:.1f} s")
        self.next_look = self._run.clock.monotonic() + patience / 1000

    def check_overtime(self) -> None:
        """After the deadline, leave out who sends too little, unless the round needs it."""
        now = self._run.clock.monotonic()
        if not self._run.rounds.overdue(now):
            self._overtime.reset()
            return
        for site in self._overtime.look(now, self._run.collecting.pulls()):
            round_ = self._run.rounds.round
            actions = self._run.rounds.too_slow(site, now)
            if actions:
                reason = (
                    "it came too slowly after the round's deadline; with less than 1 MiB a second, raise "
                    "participants.round_deadline"
                )
                self._run.emit(UpdateRefused(site=site, round=round_, reason=reason))
                self._acting.do(actions)
                return

    def lose(
        self, peer: bytes, reason: str, how: Literal["left", "removed", "lost"] = "lost"
    ) -> None:
        """End the part of a site's process that is there: it has left, or is lost, or is put out."""
        left = how != "lost"
        known = self._run.peers.remove(peer, left=left)
        assert known is not None
        self._run.link.exchange.forget(peer)
        self._run.collecting.lost(known.site)
        self._run.emit(SiteLost(site=known.site, reason=reason, how=how))
        self._acting.do(
            self._run.rounds.lost(known.site, reason, self._run.clock.monotonic(), left=left)
        )

    def put_out(self, peer: bytes, site: str, code: str, text: str) -> None:
        """Refuse a site that has joined."""
        text = text[:4096]
        self._run.replies.tell(site, "refused %s: %s", text, level=logging.ERROR)
        self._run.link.send(peer, protocol.Refused(code=code, message=text))
        self.lose(peer, text, "removed")

    def on_event(self, event: DataEvent) -> None:
        """Handle an event of a collection, or of a set that is published.

        Raises:
            IntegrityError: a model is no longer what was committed.
            StorageError: the new model can't be written.
            RuleError: the rule has failed.
        """
        if isinstance(event, SetDamaged):
            # Found when a chunk was asked for again, or an update was added.
            raise self._run.versions.damaged(event.message)
        found = self._run.collecting.handle(event)
        if isinstance(found, Reduced):
            self._acting.go_on()
        elif isinstance(found, Rejected):
            self._on_rejected(found.site, found.reason)
        elif isinstance(found, Stalled):
            self._on_stalled(found.site, found.silent_ms)

    def _on_rejected(self, site: str, reason: str) -> None:
        round_ = self._run.rounds.round
        actions = self._run.rounds.rejected(site, reason, self._run.clock.monotonic())
        if actions:
            self._run.emit(UpdateRefused(site=site, round=round_, reason=reason))
        self._acting.do(actions)

    def _on_stalled(self, site: str, silent_ms: int) -> None:
        """Nothing came of what was asked for: a site that is there but sends nothing must not hold the round."""
        logger.debug("%s: no chunk for %.0f s; asked again", site, silent_ms / 1000)
        if silent_ms < self._run.timing.data_silence * 1000:
            return
        found = self._run.peers.of_site(site)
        if found is not None:
            self.lose(found[0], f"it answers, but sent no data for {silent_ms / 1000:.0f} s")
