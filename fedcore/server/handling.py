"""What a run does with the messages of its sites, and of those who look on or steer."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from fedcore import __version__, protocol
from fedcore.encoding import can_pack
from fedcore.errors import IntegrityError, RuleError
from fedcore.events import (
    AnswerReceived,
    MetricsLogged,
    ScoreReceived,
    SiteJoined,
    SiteReported,
    UpdateReady,
)
from fedcore.server.rounds.participation import Delivery
from fedcore.server.rounds.selection import SiteScore
from fedcore.server.storage.logged import PAGE_BYTES
from fedcore.weighing import effective_weight

from .acting import Acting
from .attendance import Attendance
from .commands import Commands
from .ending import GIVEN_UP, Ending
from .parts import Parts
from .peers import Peer
from .status import merge_metrics

__all__ = ["Handling", "stopped_by"]

logger = logging.getLogger("fedcore.server")


def stopped_by(error: Exception | None) -> str:
    """Return what the sites get of an error that has stopped a run: no path."""
    if isinstance(error, IntegrityError):
        return "a model file there is damaged"
    if isinstance(error, RuleError):
        return "its rule failed"
    return "it could not write to its disk" if isinstance(error, OSError) else "of an error there"


def _too_old(join: protocol.Join) -> protocol.Refused:
    text = (
        f"this run has aggregation.lora, which fedcore {join.version} at site {join.site!r} does not know; "
        f"install fedcore {__version__} there"
    )
    return protocol.Refused(code="version", message=text)


class Handling:
    """Handles the messages of a run.

    Args:
        run: the run's parts.
        acting: carries out what its plan decides.
        attendance: ends the part of a site.
        ending: how the run ends.
        commands: carries out what operators ask.
    """

    def __init__(
        self,
        run: Parts,
        acting: Acting,
        attendance: Attendance,
        ending: Ending,
        commands: Commands,
    ) -> None:
        self._run = run
        self._acting, self._attendance, self._ending = acting, attendance, ending
        self._commands = commands

    def handle(self, peer: bytes, message: protocol.FromSite) -> None:
        """Handle a message that its sender may say."""
        if isinstance(message, protocol.StatusRequest | protocol.MetricsRequest):
            self._reply(peer, message)
        elif self._ending.idle:
            self._handle_idle(peer, message)
        elif self._ending.goodbye is not None:
            self._ending.goodbye.handle(peer, message)
        elif isinstance(message, protocol.Command):
            self._commands.handle(peer, message)
        elif isinstance(message, protocol.Join):
            self._on_join(peer, message)
        elif (known := self._run.peers.get(peer)) is not None:
            self._handle_of_site(peer, known, message)
        else:
            self._run.link.send(peer, protocol.Rejoin())

    def _handle_idle(self, peer: bytes, message: protocol.FromSite) -> None:
        """Answer a peer of a run that was given up, or left to the next server."""
        error, ended = self._ending.error, f"ended by {self._ending.interrupted}"
        if isinstance(message, protocol.Command):
            left = f"the server was {ended}; start it again to go on with the run"
            text = left if error is None else GIVEN_UP
            self._run.link.send(peer, protocol.CommandReply(ok=False, message=text))
        elif isinstance(message, protocol.Join):
            why = f"it was {ended}" if error is None else stopped_by(error)
            self._run.link.send(peer, protocol.Stopped(message=why))

    def _handle_of_site(self, peer: bytes, known: Peer, message: protocol.FromSite) -> None:
        """Handle a message of a site that takes part."""
        site = known.site
        if isinstance(message, protocol.Declare):
            self._on_declare(peer, site, message)
        elif isinstance(message, protocol.Ready):
            self._on_ready(peer, known, message)
        elif isinstance(message, protocol.Score):
            self._on_score(site, message)
        elif isinstance(message, protocol.Answer):
            self._on_answer(peer, site, message)
        elif isinstance(message, protocol.Log):
            merge_metrics(known.metrics, message.metrics)
            self._keep_metrics(site, message.round, message.step, message.metrics)
        elif isinstance(message, protocol.Problem):
            self._run.emit(SiteReported(site=site, message=message.message, own=True))
        elif isinstance(message, protocol.Leave):
            self._attendance.lose(peer, message.reason, "left")

    def _reply(
        self, peer: bytes, message: protocol.StatusRequest | protocol.MetricsRequest
    ) -> None:
        """Answer a peer that looks on, if its rate limit allows."""
        if isinstance(message, protocol.StatusRequest):
            self._ending.reply_status(peer)
        elif self._ending.error is not None:
            self._run.link.send(peer, protocol.Refused(code="other-run", message=GIVEN_UP))
        elif self._run.replies.may_have(peer, PAGE_BYTES):
            self._run.link.send(peer, self._run.store.logged.page(message.after))

    def _on_join(self, peer: bytes, join: protocol.Join) -> None:
        if self._run.peers.turn_away(peer, join) or not self._run.replies.may_have(
            peer, self._run.versions.table_bytes
        ):
            return
        if self._run.config.aggregation.lora is not None and "lora" not in join.features:
            self._run.replies.refuse(peer, join.site, _too_old(join), self._run.link)
            return
        if peer not in self._run.peers:
            self._run.store.add_member(join.site)
            self._run.emit(SiteJoined(site=join.site))
            self._run.peers.add(peer, join.site, join.features)
        self._run.link.send(
            peer,
            protocol.Welcome(
                run=self._run.config.run.name,
                run_id=self._run.store.run_id,
                rounds=self._run.rounds.rounds,
                chunk_bytes=self._run.store.chunk_bytes,
                has_model=self._run.versions.model is not None,
                version=__version__,
                transfer=self._run.config.transfer.message,
                features=protocol.features(lossless=can_pack()),
                lora=self._run.config.aggregation.lora,
                max_rank=self._run.config.aggregation.max_rank,
            ),
        )
        self._acting.do(
            self._run.rounds.joined(join.site, join.instance, self._run.clock.monotonic())
        )

    def _on_declare(self, peer: bytes, site: str, declare: protocol.Declare) -> None:
        if self._run.declaring.take(peer, site, declare):
            self._acting.do(self._run.rounds.declared(site, self._run.clock.monotonic()))

    def _on_ready(self, peer: bytes, known: Peer, ready: protocol.Ready) -> None:
        declare = self._run.declaring.declared.get(known.site)
        update = ready.model
        if len(ready.sets) > 1:
            names = ", ".join(one.name for one in ready.sets)
            text = f"the update is of the sets {names}; this run takes one, {protocol.MODEL}"
            self._attendance.put_out(peer, known.site, "sets", text)
            return
        if update.layout != self._run.versions.expected_hash(known.site, declare, ready.round):
            self._attendance.put_out(
                peer, known.site, "layout", "the update's layout is not the run's"
            )
            return
        if (
            self._run.gates.refusal and self._run.rounds.held
        ):  # trained before it was refused, or unasked
            text = "the round is refused, and the run is paused"
            self._run.link.send(peer, protocol.Dropped(round=ready.round, message=text))
            return
        known.metrics = dict(ready.metrics)
        self._keep_metrics(known.site, ready.round, None, ready.metrics)
        self._run.emit(UpdateReady(site=known.site, round=ready.round, examples=ready.weight))
        self._acting.do(
            self._run.rounds.ready(
                known.site, ready.round, Delivery(update.id, effective_weight(ready.weight))
            )
        )

    def _keep_metrics(
        self, site: str, round_: int, step: int | None, metrics: Mapping[str, float]
    ) -> None:
        beyond = self._run.store.logged.add(site, round_, step, metrics)
        if beyond:
            names = ", ".join(beyond[:6]) + (", ..." if len(beyond) > 6 else "")
            self._run.replies.tell(site, "%s logs more metrics than are kept: not %s", names)
        self._run.emit(MetricsLogged(site=site, round=round_, step=step, metrics=dict(metrics)))

    def _on_score(self, site: str, score: protocol.Score) -> None:
        last = self._run.store.last_version
        if last is None or score.version > last:
            self._run.replies.tell(
                site, "%s scored model %s, which does not exist", str(score.version)
            )
            return
        bad = [name for name, value in score.metrics.items() if not math.isfinite(value)]
        if bad:
            named = ", ".join(bad)
            self._run.replies.tell(
                site, "%s: metric %s of model %s is not finite", named, str(score.version)
            )
        self._acting.check_metrics(site, score.version, score.metrics)
        if score.metrics:
            rows = {name: rows and effective_weight(rows) for name, rows in score.rows.items()}
            examples = effective_weight(score.examples)
            found = SiteScore(site, examples, score.metrics, rows)
            if self._run.store.add_score(score.version, found):
                self._run.emit(
                    ScoreReceived(
                        site=site,
                        version=score.version,
                        metrics=dict(score.metrics),
                        examples=examples,
                    )
                )
        self._acting.do(self._run.rounds.scored(site, score.version))

    def _on_answer(self, peer: bytes, site: str, answer: protocol.Answer) -> None:
        if self._run.config.run.task != "infer" or answer.version != self._run.store.last_version:
            self._run.guard.invalid(peer, "answer that nobody asked for")
            return
        examples = effective_weight(answer.examples)
        if self._run.store.add_answer(answer.version, site, examples, answer.outputs):
            self._run.emit(
                AnswerReceived(
                    site=site,
                    version=answer.version,
                    examples=examples,
                    outputs=tuple(answer.outputs),
                )
            )
        self._acting.do(self._run.rounds.scored(site, answer.version))
