"""One run at a server, as its host sees it: its beginning, its time, and its end.

A run has no thread and reads no socket: its host (`fedcore.server.host`) hands it messages and events, and lets
time pass in it. Tensor bytes move in the link's pump. What it does with a message is in `handling`; what its plan
decides is carried out in `acting`; its sites are watched in `attendance`; its end is in `ending`.
"""

from __future__ import annotations

import logging
import math
from typing import Literal

from fedcore import protocol
from fedcore._core import SetDamaged
from fedcore.config import RunConfig
from fedcore.errors import IntegrityError, RuleError, StorageError
from fedcore.events import (
    RunStarted,
    ServerStopped,
)
from fedcore.rules import DEFAULT_RULE
from fedcore.server.rounds.waiting import WaitingLog
from fedcore.server.storage.store import Store
from fedcore.transport.link import DataEvent
from fedcore.words import plural

from .acting import Acting
from .attendance import Attendance
from .commands import Commands
from .ending import GIVEN_UP, Ending
from .handling import Handling, stopped_by
from .opening import is_over
from .outcome import RunResult
from .parts import Parts, Surroundings
from .rule import rule_of

__all__ = ["Run"]

logger = logging.getLogger("fedcore.server")


class Run:
    """One run of a host.

    Args:
        config: the run file.
        store: its folder, opened; the run closes it.
        around: what the host gives it.

    Attributes:
        config, store: as given.
        peers: the sites that are there.
        rounds: the plan, and how far it is.
        versions: the models.
        collecting: the updates under way.
        declaring: what sites have declared of their models.
        link: how its peers are answered.
        status: what is shown of the run.
        listeners: who gets the run's events; the host closes them.
        acting: carries out what the plan decides.
        attendance: watches the sites.
        ending: ends the run.
    """

    def __init__(self, config: RunConfig, store: Store, around: Surroundings) -> None:
        self.config, self.store = config, store
        self._over_before = is_over(config, store)
        self._parts = parts = Parts(config, store, around, self._put_out)
        self.versions, self.collecting = parts.versions, parts.collecting
        self.peers, self.rounds = parts.peers, parts.rounds
        self.declaring, self.link = parts.declaring, parts.link
        self.status, self.listeners = parts.status, parts.listeners
        self.ending = Ending(parts)
        self.acting = Acting(parts, self.ending, around.device)
        self.attendance = Attendance(parts, self.acting)
        self._commands = Commands(parts, self.acting, self.ending)
        self._handling = Handling(parts, self.acting, self.attendance, self.ending, self._commands)
        self._waiting = WaitingLog(self.rounds, lambda: parts.clock.wall().astimezone())

    def _put_out(self, peer: bytes, site: str, code: str, text: str) -> None:
        self.attendance.put_out(peer, site, code, text)

    @property
    def result(self) -> RunResult | None:
        """How the run ended; None while it goes on."""
        return self.ending.result

    @property
    def over(self) -> bool:
        """Whether it has ended, and nobody is waited for any more."""
        return self.ending.over

    @property
    def error(self) -> Exception | None:
        """What ended the server's work on it; None if nothing did."""
        return self.ending.error

    # --- what the host calls ---

    def start(self, linger: float = 0.0) -> None:
        """Begin the run, go on with it, or say once more that it is over.

        Args:
            linger: seconds after the end of a run that was not stopped, within which sites that do not know of it
                may still ask.

        Raises:
            StorageError: a file can't be written.
            IntegrityError: the last model is not the one that was committed.
        """
        self.ending.linger = linger
        if self._over_before:
            self.ending.end_again()
        else:
            self._begin()

    def stop(self) -> None:
        """Have the run end with what is committed; safe from another thread or a signal handler."""
        self.ending.stopping = True
        self.ending.requests += 1

    def interrupt(self, what: str) -> None:
        """Have the run know that its process ends; safe from another thread or a signal handler."""
        self.ending.interrupted = what
        self.ending.requests += 1

    @property
    def deadline(self) -> float | None:
        """When the plan has something to decide; None if never."""
        return None if self.ending.idle else self.rounds.deadline

    @property
    def next_look(self) -> float:
        """When the sites are looked at next."""
        if self.ending.idle:
            return math.inf
        ended = self.ending.goodbye is not None
        return self.ending.next_look if ended else self.attendance.next_look

    @property
    def is_under_way(self) -> bool:
        """Whether it has neither ended nor been given up."""
        return self.ending.result is None and self.ending.error is None

    @property
    def end_asked(self) -> bool:
        """Whether a stop was asked for that is still to be done."""
        return self.ending.stopping and self.is_under_way

    def end_if_asked(self) -> None:
        """End the run if a stop was asked for."""
        if self.end_asked:
            self.ending.end("stopped", "stopped on request")

    def pass_time(self) -> None:
        """Do what is due."""
        if self.ending.idle:
            return
        if self.ending.goodbye is not None:
            self._commands.dismiss("the run is over")
            self.ending.look()
            return
        self.attendance.check_alive()
        self.attendance.check_overtime()
        self.versions.keep_digests()
        self.store.logged.write_if_due(self._parts.clock.monotonic())
        self._commands.look()
        self.acting.do(self.rounds.tick(self._parts.clock.monotonic()))
        self._waiting.look(self._parts.clock.monotonic())

    def handle(self, peer: bytes, message: protocol.FromSite) -> None:
        """Handle a message that its sender may say."""
        self._handling.handle(peer, message)

    def on_event(self, event: DataEvent) -> None:
        """Handle an event of a collection, or of a set that is published.

        Raises:
            IntegrityError: a model is no longer what was committed.
            StorageError: the new model can't be written.
            RuleError: the rule has failed.
        """
        if self.ending.goodbye is None and not self.ending.idle:
            self.attendance.on_event(event)

    def concerns(self, event: DataEvent) -> bool:
        """Whether an event of the core is of this run's collection, or of one of its models."""
        if isinstance(event, SetDamaged):
            return self.versions.owns(event.set_id, event.message)
        return self.collecting.concerns(event)

    def send(self, peer: bytes, message: protocol.FromServer) -> None:
        """Send a message to a peer, behind those that wait for rows of the journal."""
        self.link.send(peer, message)

    def may_join(self, join: protocol.Join) -> bool:
        """Whether a site names this run, and is one of its sites."""
        named = join.run in (self.config.run.name, self.store.run_id)
        return named and self.rounds.roster.refusal(join.site) is None

    def forget(self, site: str) -> None:
        """Compare nobody with a site any more: its key was revoked."""
        self.declaring.forget(site)

    def note_lost(self, site: str, what: str, number: int) -> None:
        """Note that values or problems which a site has sent are lost, as too much waited for the journal."""
        text = (
            f"lost, as the run's database was locked for too long: {plural(number, what)} that it "
            f"{'reported' if what == 'problem' else 'logged'}"
        )
        self._parts.report(site, text)

    def end_part(
        self, peer: bytes, reason: str, how: Literal["left", "removed"] = "removed"
    ) -> None:
        """End the part of a site's process in the run, if it still takes part."""
        if peer not in self.peers:
            return
        if self.ending.goodbye is None and not self.ending.idle:
            self.attendance.lose(peer, reason, how)
        else:
            self.peers.remove(peer)

    def give_up(self, error: Exception) -> None:
        """End the work on the run, as a crash would, while the host goes on with others.

        Its folder is free then: another server may go on with the run.
        """
        if self.ending.error is not None:
            logger.error("an answer of the run that was given up has failed: %s", error)
            return
        self.ending.error, self.ending.over = error, True
        try:
            self.store.settle()  # rows of the messages before: what waits for them leaves
        except StorageError as lost:
            logger.error("rows of the run are lost: %s", lost)
        self.say_stopped(error)
        self.collecting.close()
        self.versions.withdraw()
        self.versions.close()
        self.ending.keep_last_status()
        self.store.close()

    def say_stopped(self, error: Exception) -> None:
        """Tell the sites that the run goes on once this server is started again, without any path."""
        damaged = isinstance(error, IntegrityError)  # its message says what can be done
        goes_on = "ends" if self.ending.stopping else "goes on"
        after = "" if damaged else f"; the run {goes_on} once the server is started again"
        self._parts.emit(ServerStopped(reason=f"{error}{after}", failed=True))
        if isinstance(error, RuleError) and error.trace:
            logger.error("where the rule failed:", extra={"trace": error.trace})
        self.peers.broadcast(protocol.Stopped(message=stopped_by(error)))
        self._commands.dismiss(GIVEN_UP)

    def go_away(self) -> None:
        """Leave the run as a crash would, but tell the sites to wait for the next server."""
        why = f"the server was ended by {self.ending.interrupted}"
        self.peers.broadcast(protocol.Stopped(message=f"it was ended by {self.ending.interrupted}"))
        self._commands.dismiss(f"{why}; start it again to go on with the run")
        self.ending.left = self.ending.over = True  # other runs may keep this process for a while
        try:
            self.store.leave()
        except StorageError as error:  # as where the disk is full: nothing that counts is lost
            logger.warning("the totals of the run are those of its last commit: %s", error)
        after = "the run goes on once the server is started again, and the sites wait for it"
        self._parts.emit(ServerStopped(reason=f"{why}; {after}", failed=False))
        text = f"{why}; start it again to go on with the run"
        version = self.store.last_version
        self.ending.result = RunResult(
            "interrupted", version, self._parts.outcome.best, None, None, text
        )

    # --- the beginning ---

    def _begin(self) -> None:
        version = self.store.last_version
        self._parts.emit(RunStarted(version=version, rounds=self.rounds.rounds))
        if version is not None:
            self.versions.open_last(version)
            self.acting.ask_gates(version)
        elif self.config.initial_path is not None:
            self.versions.load_initial(self.config.initial_path)
            self.acting.ask_gates(0)
            self.rounds.committed(0, self._parts.clock.monotonic())
            self._parts.emit_commit(self.store.versions()[0])
        if self.versions.model is not None:
            self.versions.publish()
        logger.info(
            "run %s: %s, listening on %s, waiting for %s (a round needs %d)",
            self.config.run.name, plural(self.rounds.rounds, "round"), self.link.endpoint,
            plural(self.config.participants.expected, "site"), self.config.participants.quorum,
        )  # fmt: skip
        people = self.config.participants
        self.store.logged.open(people.expected)
        keyless = self._parts.access.without_key(people.sites, people.count)
        if keyless is not None:
            logger.warning("%s", keyless)
        if self.acting.device != "CPU":
            logger.info("means are computed on %s", self.acting.device)
        self._say_rule()
        self._expect_back()
        if self.store.stop_asked:
            logger.info(
                "an operator has stopped the run, and the server before this one was ended: it ends now"
            )
            self.ending.stopping = True
            self.ending.linger_for_return()

    def _say_rule(self) -> None:
        rule = rule_of(self.config)
        if rule.name != DEFAULT_RULE:
            logger.info(
                "updates are combined by the rule %s (version %d): %s%s", rule.name, rule.version, rule.summary,
                "" if self.acting.device == "CPU" else "; it is computed on the CPU",
            )  # fmt: skip
        if self.config.aggregation.lora == "share-a":
            logger.info(
                "factor B of each adapter stays at its site (aggregation.lora): best/ and final/ have that of the "
                "first model"
            )
        if rule.weighing.equal:
            logger.info("the updates of all sites weigh the same")
        elif rule.weighing.max_share is not None:
            logger.info("no site counts for more than %.4g %%", 100 * rule.weighing.max_share)
        if self.config.aggregation.ema is not None:
            logger.info(
                "the average of the models is kept beside them (%g of it stays in each round); sites train from "
                "the models, and score them", self.config.aggregation.ema,
            )  # fmt: skip
        if optimizer := self.versions.optimizer.describe():
            logger.info(
                "the server optimizer is %s%s", optimizer,
                "" if self.acting.device == "CPU" else "; it is computed on the CPU",
            )  # fmt: skip

    def _expect_back(self) -> None:
        """After a crash, give the sites that had joined the time to notice that this server is here."""
        sites = self.store.members()
        if not sites:
            return
        version = self.store.last_version
        scored = [] if version is None else [s.site for s in self.store.scores().get(version, [])]
        wait = self.config.participants.idle_timeout + protocol.RETURN_SECONDS
        decided = self.collecting.decided(0 if version is None else version + 1)
        chosen = [] if version is None else self.store.chosen(self.rounds.choice)
        self.rounds.restarted(sites, scored, self._parts.clock.monotonic() + wait, decided, chosen)
        logger.info("expecting %s back within %.0f s", ", ".join(sites), wait)
