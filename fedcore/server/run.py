"""One run at a server: its folder, plan, versions, sites and end.

A run has no thread and reads no socket: its host (`fedcore.server.host`) hands it messages and events, and lets
time pass in it. Tensor bytes move in the link's pump.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from fedcore import __version__, protocol
from fedcore._core import SetDamaged
from fedcore._device import device_failure, use_device
from fedcore.clock import Clock, milliseconds
from fedcore.config import RunConfig
from fedcore.encoding import can_pack
from fedcore.errors import ConfigError, IntegrityError, StorageError
from fedcore.events import (
    AnswerReceived,
    BestChanged,
    Event,
    MetricsLogged,
    RoundStarted,
    RunEnded,
    RunStarted,
    ScoreReceived,
    ServerStopped,
    SiteJoined,
    SiteLost,
    SiteReported,
    SitesChosen,
    UpdateReady,
    UpdateRefused,
    VersionCommitted,
)
from fedcore.layout import DEFAULT_CHUNK_BYTES
from fedcore.rules import DEFAULT_RULE, find_rule
from fedcore.server.rounds.actions import (
    Action,
    Choose,
    Commit,
    EndRun,
    GiveUp,
    HoldCollect,
    PullAhead,
    SendDropped,
    SendTask,
    StartCollect,
)
from fedcore.server.rounds.overtime import Overtime
from fedcore.server.rounds.participation import Delivery, Roster, SiteState
from fedcore.server.rounds.rounds import Phase
from fedcore.server.rounds.selection import SiteScore
from fedcore.server.rounds.steering import steer
from fedcore.server.rounds.tasks import make_rounds
from fedcore.server.rounds.waiting import WaitingLog
from fedcore.server.storage.logged import PAGE_BYTES
from fedcore.server.storage.readme import notes
from fedcore.server.storage.store import Store, VersionRow
from fedcore.transport.ends import ServerEnd
from fedcore.transport.link import DataEvent
from fedcore.weighing import effective_weight
from fedcore.words import plural

from .access import Access
from .collecting import Collecting, Reduced, Rejected, Stalled
from .declaring import Declaring
from .gates import Gates
from .goodbye import Goodbye, Patience
from .guard import Guard
from .listeners import Listeners
from .loading import load_function
from .log_lines import LogLines
from .outcome import Ending, Outcome, RunResult
from .peers import Peer, Peers, name_of
from .replies import Replies
from .run_link import RunLink
from .status import StatusBuilder, Watchers, merge_metrics, within_a_message
from .timing import Timing
from .versions import Versions

__all__ = ["Run", "RunFinishedError", "Surroundings", "check_encoding", "open_store"]

_SEED_STRIDE: Final = 1_000_003  # more than the rounds of any run
_LAST_PHASE: Final = {
    "complete": Phase.DONE,
    "stopped": Phase.STOPPED,
    "failed": Phase.FAILED,
}

_GIVEN_UP: Final = (
    "an error has ended the work on this run; it goes on once the server is started again"
)

logger = logging.getLogger("fedcore.server")


@dataclass(frozen=True)
class Surroundings:
    """What a run has of its host.

    Attributes:
        link: how peers are reached.
        audience: the run's number at this host, from 1.
        access, replies, guard: who may say what, what is logged of it, and what follows where it is not allowed.
        chunks: the bytes that updates' chunks may take.
        device: where means are computed, in words.
        clock, timing: what deadlines and waits are measured with.
    """

    link: ServerEnd
    audience: int
    access: Access
    replies: Replies
    guard: Guard[Run]
    chunks: int
    device: str
    clock: Clock
    timing: Timing


def round_seed(seed: int, round_: int) -> int:
    """Return what a round's tasks draw random numbers from: another for each round, and each seed of a run."""
    return seed * _SEED_STRIDE + round_


def check_encoding(config: RunConfig) -> None:
    """Check that this machine has what a run's encoding needs.

    Raises:
        ConfigError: it lacks the package lz4.
    """
    if config.transfer.lossless and not can_pack():
        raise ConfigError(
            "transfer.lossless needs the Python package lz4 at the server: install fedcore-fl[lossless], or "
            "set it to false"
        )


class RunFinishedError(ConfigError):
    """The run in a folder is finished, and there is nobody who may not know."""


def open_store(
    config: RunConfig, *, discard: bool = False, chunk_bytes: int = DEFAULT_CHUNK_BYTES
) -> Store:
    """Open the folder of a run.

    Args:
        config: the run file.
        discard: move the models that the folder's journal does not know into a folder of their own, and go on.
        chunk_bytes: how large the chunks of a new run are.

    Raises:
        BusyError: the folder is in use.
        IntegrityError: it holds models that its journal does not know.
        RunFinishedError: it holds a finished run.
        ConfigError: it holds a run with other settings; a listener or a gate can't be loaded.
    """
    for setting in ("listeners", "gates"):  # before anything is opened
        for name in getattr(config.server, setting):
            load_function(name, f"server.{setting}")
    settings = config.model_dump(mode="json", exclude={"folder", "simulate"})
    store = Store(config.run_folder, settings, discard=discard, chunk_bytes=chunk_bytes)
    try:
        if _is_over(config, store) and not store.members():
            raise RunFinishedError(
                f"the run in {config.run_folder} is finished; give this run another name (run.name), raise "
                "run.rounds to go on with it, or remove the folder"
            )
    except BaseException:
        store.close()
        raise
    return store


def _is_over(config: RunConfig, store: Store) -> bool:
    return store.finished and (store.last_version or 0) >= config.run.rounds


def _stopped_by(error: Exception | None) -> str:
    """Return what the sites get of an error that has stopped a run: no path."""
    if isinstance(error, IntegrityError):
        return "a model file there is damaged"
    return "it could not write to its disk" if isinstance(error, OSError) else "of an error there"


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
        status: what is shown of the run.
        listeners: who gets the run's events; the host closes them.
        result: how it ended; None while it goes on.
        over: whether it has ended, and waits for nobody to hear of it.
        error: what ended the server's work on it; None if nothing did.
        next_look: when the sites are looked at next.
    """

    def __init__(self, config: RunConfig, store: Store, around: Surroundings) -> None:
        self.config = config
        self.store = store
        self._link = RunLink(around.link, store.run_id, around.audience)
        self._access = around.access
        self._replies, self._guard = around.replies, around.guard
        self._clock, self._timing = around.clock, around.timing
        self._device = around.device
        self._over_before = _is_over(config, store)
        self.versions = Versions(config, store, self._link.exchange, self._link.restrict)
        self.collecting = Collecting(config, store, self.versions, self._link, around.chunks)
        self.result: RunResult | None = None
        self._stopping = False
        self._interrupted = ""
        self._requests = 0
        self._linger = 0.0
        self._says_end_again = False
        self._goodbye: Goodbye | None = None
        self.over = False
        self.error: Exception | None = None
        self.next_look = 0.0
        self._round_begun, self._round_started = -1, self._clock.monotonic()
        people = config.participants
        roster = Roster(people.sites, people.count)
        self.peers = Peers(self._link, roster, self._replies, (config.run.name, store.run_id))
        self._outcome = Outcome(config, store, roster)
        self.rounds = make_rounds(config, roster, store.last_version)
        self._waiting = WaitingLog(self.rounds, lambda: self._clock.wall().astimezone())
        self.status = StatusBuilder(config, self.rounds, store, self._clock, self.collecting)
        self._status_bytes = 0
        self._gates = Gates(config, store)
        self.listeners = Listeners(
            config.server.listeners,
            (config.run.name, store.run_id),
            lambda: self._clock.wall().timestamp(),
            (self.status.on_event, LogLines(config, store.run_id, self._replies).on_event),
        )
        store.hold_back(self._link.outlet, self.listeners.outlet)
        store.taken = lambda: self.status.taken(self._link.stats())
        self._overtime = Overtime()
        self._declaring = Declaring(
            config,
            self._link,
            (self.peers, self._put_out),
            (store, self.versions),
            self._report,
        )
        self._declaring.forget_revoked(self._access)
        self._watchers = Watchers(self._clock)

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
        self._linger = linger
        if self._over_before:
            self._end_again()
        else:
            self._begin()

    def stop(self) -> None:
        """Have the run end with what is committed; safe from another thread or a signal handler."""
        self._stopping = True
        self._requests += 1

    def interrupt(self, what: str) -> None:
        """Have the run know that its process ends; safe from another thread or a signal handler."""
        self._interrupted = what
        self._requests += 1

    @property
    def deadline(self) -> float | None:
        """When the plan has something to decide; None if never."""
        return None if self.error is not None else self.rounds.deadline

    def end_if_asked(self) -> None:
        """End the run if a stop was asked for."""
        if self._stopping and self.result is None and self.error is None:
            self.end("stopped", "stopped on request")

    def pass_time(self) -> None:
        """Do what is due."""
        if self.error is not None:
            self.next_look = math.inf
            return
        if self._goodbye is not None:
            if not self.over and self._goodbye.look():
                self._part(self._goodbye)
            self.next_look = self._goodbye.next_look
            return
        self._check_alive()
        self._check_overtime()
        self.versions.keep_digests()
        self.store.logged.write_if_due(self._clock.monotonic())
        self._do(self.rounds.tick(self._clock.monotonic()))
        self._waiting.look(self._clock.monotonic())

    def may_join(self, join: protocol.Join) -> bool:
        """Whether a site names this run, and is one of its sites."""
        named = join.run in (self.config.run.name, self.store.run_id)
        return named and self.rounds.roster.refusal(join.site) is None

    def send(self, peer: bytes, message: protocol.FromServer) -> None:
        """Send a message to a peer, behind those that wait for rows of the journal."""
        self._link.send(peer, message)

    def forget(self, site: str) -> None:
        """Compare nobody with a site any more: its key was revoked."""
        self._declaring.forget(site)

    def end_part(self, peer: bytes, reason: str) -> None:
        """End the part of a site's process in the run."""
        if self._goodbye is None and self.error is None:
            self._lose(peer, reason, "removed")
        else:
            self.peers.remove(peer)

    def give_up(self, error: Exception) -> None:
        """End the work on the run, as a crash would, while the host goes on with others.

        Its folder stays locked: it goes on once the host is started again.
        """
        again = self.error is not None
        self.error, self.over = self.error or error, True
        self.say_stopped(error)
        if not again:
            self.collecting.close()
            self.versions.withdraw()

    def say_stopped(self, error: Exception) -> None:
        """Tell the sites that the run goes on once this server is started again, without any path."""
        damaged = isinstance(error, IntegrityError)  # its message says what can be done
        goes_on = "ends" if self._stopping else "goes on"
        after = "" if damaged else f"; the run {goes_on} once the server is started again"
        self._emit(ServerStopped(reason=f"{error}{after}", failed=True))
        self.peers.broadcast(protocol.Stopped(message=_stopped_by(error)))

    def go_away(self) -> None:
        """Leave the run as a crash would, but tell the sites to wait for the next server."""
        why = f"the server was ended by {self._interrupted}"
        self.peers.broadcast(protocol.Stopped(message=f"it was ended by {self._interrupted}"))
        self.over = True
        try:
            self.store.leave()
        except StorageError as error:  # as where the disk is full: nothing that counts is lost
            logger.warning("the totals of the run are those of its last commit: %s", error)
        after = "the run goes on once the server is started again, and the sites wait for it"
        self._emit(ServerStopped(reason=f"{why}; {after}", failed=False))
        text = f"{why}; start it again to go on with the run"
        version = self.store.last_version
        self.result = RunResult("interrupted", version, self._outcome.best, None, None, text)

    # --- the beginning ---

    def _begin(self) -> None:
        version = self.store.last_version
        self._emit(RunStarted(version=version, rounds=self.rounds.rounds))
        if version is not None:
            self.versions.open_last(version)
            self._ask_gates(version)
        elif self.config.initial_path is not None:
            self.versions.load_initial(self.config.initial_path)
            self._ask_gates(0)
            self.rounds.committed(0, self._clock.monotonic())
            self._emit_commit(self.store.versions()[0])
        if self.versions.model is not None:
            self.versions.publish()
        logger.info(
            "run %s: %s, listening on %s, waiting for %s (a round needs %d)",
            self.config.run.name, plural(self.rounds.rounds, "round"), self._link.endpoint,
            plural(self.config.participants.expected, "site"), self.config.participants.quorum,
        )  # fmt: skip
        people = self.config.participants
        self.store.logged.open(people.expected)
        keyless = self._access.without_key(people.sites, people.count)
        if keyless is not None:
            logger.warning("%s", keyless)
        if self._device != "CPU":
            logger.info("means are computed on %s", self._device)
        self._say_rule()
        self._expect_back()
        if self.store.stop_asked:
            logger.info(
                "an operator has stopped the run, and the server before this one was ended: it ends now"
            )
            self._stopping = True
            self._linger_for_return()

    def _say_rule(self) -> None:
        rule = find_rule(self.config.aggregation.rule)
        if rule.name != DEFAULT_RULE:
            logger.info(
                "updates are combined by the rule %s (version %d): %s%s", rule.name, rule.version, rule.summary,
                "" if self._device == "CPU" else "; it is computed on the CPU",
            )  # fmt: skip
        if optimizer := self.versions.optimizer.describe():
            logger.info(
                "the server optimizer is %s%s", optimizer,
                "" if self._device == "CPU" else "; it is computed on the CPU",
            )  # fmt: skip

    def _linger_for_return(self) -> None:
        """Stay at the end of the run until the sites have noticed that this server is here."""
        self._linger = max(
            self._linger, self.config.participants.idle_timeout + protocol.RETURN_SECONDS
        )
        self._says_end_again = True

    def _expect_back(self) -> None:
        """After a crash, give the sites that had joined the time to notice that this server is here."""
        sites = self.store.members()
        if not sites:
            return
        version = self.store.last_version
        scored = [] if version is None else [s.site for s in self.store.scores().get(version, [])]
        wait = self.config.participants.idle_timeout + protocol.RETURN_SECONDS
        decided = self.collecting.scratch(0 if version is None else version + 1).decided()
        chosen = [] if version is None else self.store.chosen(self.rounds.choice)
        self.rounds.restarted(sites, scored, self._clock.monotonic() + wait, decided, chosen)
        logger.info("expecting %s back within %.0f s", ", ".join(sites), wait)

    def _check_alive(self) -> None:
        """Look at all sites: not with each message, as there may be a thousand of them, but now and then, and when
        the first of them will have been silent for too long."""
        if self._clock.monotonic() < self.next_look:
            return
        limit = round(self.config.participants.idle_timeout * 1000)
        patience = round(self._timing.check * 1000)
        gone, patience = self.peers.look(milliseconds(self._clock), limit, patience)
        for peer, silent in gone:
            if peer in self.peers:
                self._lose(peer, f"nothing heard for {silent / 1000:.1f} s")
        self.next_look = self._clock.monotonic() + patience / 1000

    def _check_overtime(self) -> None:
        """After the deadline, leave out who sends too little, unless the round needs it."""
        now = self._clock.monotonic()
        if not self.rounds.overdue(now):
            self._overtime.reset()
            return
        for site in self._overtime.look(now, self.collecting.pulls()):
            round_ = self.rounds.round
            actions = self.rounds.too_slow(site, now)
            if actions:
                reason = (
                    "it came too slowly after the round's deadline; with less than 1 MiB a second, raise "
                    "participants.round_deadline"
                )
                self._emit(UpdateRefused(site=site, round=round_, reason=reason))
                self._do(actions)
                return

    def _lose(
        self, peer: bytes, reason: str, how: Literal["left", "removed", "lost"] = "lost"
    ) -> None:
        left = how != "lost"
        known = self.peers.remove(peer, left=left)
        assert known is not None
        self._link.exchange.forget(peer)
        self.collecting.lost(known.site)
        self._emit(SiteLost(site=known.site, reason=reason, how=how))
        self._do(self.rounds.lost(known.site, reason, self._clock.monotonic(), left=left))

    def _put_out(self, peer: bytes, site: str, code: str, text: str) -> None:
        """Refuse a site that has joined."""
        text = text[:4096]
        self._replies.tell(site, "refused %s: %s", text, level=logging.ERROR)
        self._link.send(peer, protocol.Refused(code=code, message=text))
        self.end_part(peer, text)

    # --- messages ---

    def handle(self, peer: bytes, message: protocol.FromSite) -> None:
        """Handle a message that its sender may say."""
        if self.error is not None:
            self._handle_given_up(peer, message)
        elif self._goodbye is not None:
            self._goodbye.handle(peer, message)
        elif isinstance(message, protocol.StatusRequest | protocol.MetricsRequest):
            self._reply(peer, message)
        elif isinstance(message, protocol.Command):
            self._on_command(peer, message)
        elif isinstance(message, protocol.Join):
            self._on_join(peer, message)
        elif (known := self.peers.get(peer)) is not None:
            self._handle_of_site(peer, known, message)
        else:
            self._link.send(peer, protocol.Rejoin())

    def _handle_given_up(self, peer: bytes, message: protocol.FromSite) -> None:
        """Answer a peer of a run that was given up."""
        if isinstance(message, protocol.StatusRequest | protocol.MetricsRequest):
            self._reply(peer, message)
        elif isinstance(message, protocol.Command):
            self._link.send(peer, protocol.CommandReply(ok=False, message=_GIVEN_UP))
        elif isinstance(message, protocol.Join):
            self._link.send(peer, protocol.Stopped(message=_stopped_by(self.error)))

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
            self._emit(SiteReported(site=site, message=message.message, own=True))
        elif isinstance(message, protocol.Leave):
            self._lose(peer, message.reason, "left")

    def _reply(
        self, peer: bytes, message: protocol.StatusRequest | protocol.MetricsRequest
    ) -> None:
        """Answer a peer that looks on, if its rate limit allows."""
        if isinstance(message, protocol.StatusRequest):
            self.reply_status(peer)
        elif self._replies.may_have(peer, PAGE_BYTES):
            self._link.send(peer, self.store.logged.page(message.after))

    def _on_stop(self) -> protocol.CommandReply:
        """Write a stop down before it is answered: it holds also if this server is killed after the answer."""
        try:
            self.store.ask_stop()
        except (IntegrityError, StorageError) as error:
            logger.error("the run is not stopped: %s", error)
            text = "the server cannot write to its disk that the run is to end, so it goes on; its log says why"
            return protocol.CommandReply(ok=False, message=text)
        self._stopping = True
        return protocol.CommandReply(ok=True, message="the run ends with what is committed")

    def _on_command(self, peer: bytes, command: protocol.Command) -> None:
        actions: list[Action] = []
        if command.action == "stop":
            reply = self._on_stop()
        else:
            reply, actions = self._steer(command.action)
        self._replies.tell(
            name_of(peer, self.peers.get(peer)),
            "%s asks to %s: %s",
            command.action,
            reply.message,
            level=logging.INFO,
        )
        self._link.send(peer, reply)
        self._do(actions)

    def _steer(
        self, action: Literal["pause", "resume", "evaluate"]
    ) -> tuple[protocol.CommandReply, list[Action]]:
        version = self.rounds.version
        asks = action == "resume" and self.rounds.held and version is not None
        if asks and not self._gates.allow((version or 0) + 1):
            text = f"the run stays paused: {self._gates.refusal}"
            return protocol.CommandReply(ok=False, message=text), []
        return steer(self.rounds, action, self._clock.monotonic())

    def _ask_gates(self, version: int) -> None:
        """Pause the run if a gate refuses the round after a version; call it before the plan begins that round."""
        if not self.rounds.paused and not self._gates.allow(version + 1):
            self.rounds.paused = True

    def _on_join(self, peer: bytes, join: protocol.Join) -> None:
        if self.peers.turn_away(peer, join) or not self._replies.may_have(
            peer, self.versions.table_bytes
        ):
            return
        if peer not in self.peers:
            self.store.add_member(join.site)
            self._emit(SiteJoined(site=join.site))
            self.peers.add(peer, join.site, join.features)
        self._link.send(
            peer,
            protocol.Welcome(
                run=self.config.run.name,
                run_id=self.store.run_id,
                rounds=self.rounds.rounds,
                chunk_bytes=self.store.chunk_bytes,
                has_model=self.versions.model is not None,
                version=__version__,
                transfer=self.config.transfer.message,
                features=protocol.features(lossless=can_pack()),
            ),
        )
        self._do(self.rounds.joined(join.site, join.instance, self._clock.monotonic()))

    def _on_declare(self, peer: bytes, site: str, declare: protocol.Declare) -> None:
        if self._declaring.take(peer, site, declare):
            self._do(self.rounds.declared(site, self._clock.monotonic()))

    def _on_ready(self, peer: bytes, known: Peer, ready: protocol.Ready) -> None:
        declare = self._declaring.declared.get(known.site)
        update = ready.model
        if len(ready.sets) > 1:
            names = ", ".join(one.name for one in ready.sets)
            text = f"the update is of the sets {names}; this run takes one, {protocol.MODEL}"
            self._put_out(peer, known.site, "sets", text)
            return
        if update.layout != self.versions.expected_hash(declare):
            self._put_out(peer, known.site, "layout", "the update's layout is not the run's")
            return
        if self._gates.refusal and self.rounds.held:  # trained before it was refused, or unasked
            text = "the round is refused, and the run is paused"
            self._link.send(peer, protocol.Dropped(round=ready.round, message=text))
            return
        known.metrics = dict(ready.metrics)
        self._keep_metrics(known.site, ready.round, None, ready.metrics)
        self._emit(UpdateReady(site=known.site, round=ready.round, examples=ready.weight))
        self._do(
            self.rounds.ready(
                known.site, ready.round, Delivery(update.id, effective_weight(ready.weight))
            )
        )

    def _keep_metrics(
        self, site: str, round_: int, step: int | None, metrics: Mapping[str, float]
    ) -> None:
        beyond = self.store.logged.add(site, round_, step, metrics)
        if beyond:
            names = ", ".join(beyond[:6]) + (", ..." if len(beyond) > 6 else "")
            self._replies.tell(site, "%s logs more metrics than are kept: not %s", names)
        self._emit(MetricsLogged(site=site, round=round_, step=step, metrics=dict(metrics)))

    def _on_score(self, site: str, score: protocol.Score) -> None:
        last = self.store.last_version
        if last is None or score.version > last:
            self._replies.tell(site, "%s scored model %s, which does not exist", str(score.version))
            return
        bad = [name for name, value in score.metrics.items() if not math.isfinite(value)]
        if bad:
            named = ", ".join(bad)
            self._replies.tell(
                site, "%s: metric %s of model %s is not finite", named, str(score.version)
            )
        self._check_metrics(site, score.version, score.metrics)
        if score.metrics:
            rows = {name: rows and effective_weight(rows) for name, rows in score.rows.items()}
            examples = effective_weight(score.examples)
            found = SiteScore(site, examples, score.metrics, rows)
            if self.store.add_score(score.version, found):
                self._emit(
                    ScoreReceived(
                        site=site,
                        version=score.version,
                        metrics=dict(score.metrics),
                        examples=examples,
                    )
                )
        self._do(self.rounds.scored(site, score.version))

    def _check_scored(self, version: int, sites: Collection[str]) -> None:
        """Name the sites that trained from a model without a score of it, where a metric selects."""
        if self.config.selection.metric is None or self.config.run.task != "train":
            return
        scored = {score.site for score in self.store.scores().get(version, [])}
        for site in sorted({*sites} - scored):
            self._check_metrics(site, version, ())

    def _check_metrics(self, site: str, version: int, metrics: Collection[str]) -> None:
        """Say at once, and not after the last round, if a site's metrics select nothing."""
        problem = self._outcome.metric_problem(site, version, metrics)
        if problem:
            self._report(site, problem)

    def _on_answer(self, peer: bytes, site: str, answer: protocol.Answer) -> None:
        if self.config.run.task != "infer" or answer.version != self.store.last_version:
            self._guard.invalid(peer, "answer that nobody asked for")
            return
        examples = effective_weight(answer.examples)
        if self.store.add_answer(answer.version, site, examples, answer.outputs):
            self._emit(
                AnswerReceived(
                    site=site,
                    version=answer.version,
                    examples=examples,
                    outputs=tuple(answer.outputs),
                )
            )
        self._do(self.rounds.scored(site, answer.version))

    def on_event(self, event: DataEvent) -> None:
        """Handle an event of a collection, or of a set that is published.

        Raises:
            IntegrityError: a model is no longer what was committed.
            StorageError: the new model can't be written.
        """
        if self._goodbye is not None or self.error is not None:
            return
        if isinstance(
            event, SetDamaged
        ):  # when a chunk was asked for again, or an update was added
            raise self.versions.damaged(event.message)
        found = self.collecting.heard(event)
        if isinstance(found, Reduced):
            self._do(self.rounds.reduced())
        elif isinstance(found, Rejected):
            self._on_rejected(found.site, found.reason)
        elif isinstance(found, Stalled):
            self._on_stalled(found.site, found.silent_ms)

    def _on_rejected(self, site: str, reason: str) -> None:
        round_ = self.rounds.round
        actions = self.rounds.rejected(site, reason, self._clock.monotonic())
        if actions:
            self._emit(UpdateRefused(site=site, round=round_, reason=reason))
        self._do(actions)

    def _on_stalled(self, site: str, silent_ms: int) -> None:
        """Nothing came of what was asked for: a site that is there but sends nothing must not hold the round."""
        logger.debug("%s: no chunk for %.0f s; asked again", site, silent_ms / 1000)
        if silent_ms < self._timing.data_silence * 1000:
            return
        found = self.peers.of_site(site)
        if found is not None:
            self._lose(found[0], f"it answers, but sent no data for {silent_ms / 1000:.0f} s")

    # --- actions ---

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            self._do_one(action)

    def _do_one(self, action: Action) -> None:
        if isinstance(action, Choose):
            self.store.choose(action.round, action.sites)
            if self.config.participants.sample is not None:
                self._emit(SitesChosen(round=action.round, sites=tuple(action.sites)))
        elif isinstance(action, SendTask):
            self._send_task(action)
        elif isinstance(action, SendDropped):
            self.peers.send_to(
                action.site, protocol.Dropped(round=action.round, message=action.message[:4096])
            )
            logger.debug("%s: %s", action.site, action.message)
        elif isinstance(action, GiveUp):
            self._emit(SiteLost(site=action.site, reason=action.message, how="lost"))
        elif isinstance(action, PullAhead):
            self._pull_ahead(action)
        elif isinstance(action, StartCollect):
            self._start_collect(action)
        elif isinstance(action, HoldCollect):
            self.collecting.park()
        elif isinstance(action, Commit):
            self.commit(action)
        elif isinstance(action, EndRun):
            self.end("complete" if action.ok else "failed", action.message)

    def _send_task(self, action: SendTask) -> None:
        if action.round != self._round_begun:
            self._round_begun = action.round
            self._round_started = self._clock.monotonic()
            self._emit(RoundStarted(round=action.round))
        task = protocol.Task(
            kind=action.kind,
            round=action.round,
            rounds=self.rounds.rounds,
            version=action.version,
            seed=round_seed(self.config.run.seed, action.round),
        )
        if self.versions.model is not None:
            listed, packed = self.versions.described()
            set_id, checksum = self._set_id_for(action.site), self.versions.checksum
            if action.kind == "submit":  # also after others' models have been committed
                set_id, checksum = self.versions.first_set()
            task = task.model_copy(
                update={
                    "included": self.versions.included.get(action.site),
                    "checksum": checksum,
                    "sets": [
                        protocol.OpenSet.model_construct(
                            id=set_id.hex(),
                            layout=self.versions.layout_hash,
                            tensors=listed,
                            packed=packed,
                        )
                    ],
                }
            )
        self.peers.send_to(action.site, task)

    def _set_id_for(self, site: str) -> bytes:
        found = self.peers.of_site(site)
        unpacks = found is not None and "lossless" in found[1].features
        return self.versions.packed_id if unpacks else self.versions.set_id

    def _pull_ahead(self, action: PullAhead) -> None:
        self.collecting.pull_ahead(action, self.peers.addresses, self.rounds.most)

    def _start_collect(self, action: StartCollect) -> None:
        done = self.collecting.start(action, self.peers.addresses, self._declaring.declared)
        if done:
            self._do(self.rounds.reduced())

    def commit(self, action: Commit) -> None:
        """Commit the version whose chunks are all reduced, and tell the sites."""
        running = self.collecting.take()
        try:
            running.check_base()
        except StorageError as error:
            raise self.versions.damaged(str(error)) from None
        try:
            self.versions.optimizer.check()
        except StorageError as error:
            running.cancel()  # what was made with a damaged state is not gone on with
            raise self.versions.damaged(str(error), "a state of the last model") from None
        model, checksums = running.finish()
        weights = {p.site: p.weight for p in action.participants} if action.version else {}
        seconds = self._clock.monotonic() - self._round_started
        row = VersionRow(action.version, "", "", model.layout.total_bytes, seconds, weights)
        metrics = {known.site: known.metrics for _, known in self.peers}
        if action.version == 0:
            self.store.keep_initial_site(action.participants[0].site)
        self.versions.commit(row, (model, checksums), metrics, running.scratch.states)
        names = [p.site for p in action.participants]
        collected = self._clock.monotonic() - running.started
        self._emit_commit(row, collected, "" if action.version else names[0])
        if action.version:
            self._check_scored(action.version - 1, names)
        for peer, known in self.peers:
            self._link.send(
                peer,
                protocol.Commit(
                    version=action.version, included=known.site in names, participants=names
                ),
            )
        if failure := device_failure():
            self._device = use_device("cpu")
            logger.warning("the GPU failed; the CPU goes on with the same bits: %s", failure)
        self._ask_gates(action.version)
        self._do(self.rounds.committed(action.version, self._clock.monotonic()))
        if self.result is None:  # after the tasks: reading a large model takes seconds
            self._export_best()
            self._outcome.prune()

    # --- events ---

    def _emit(self, event: Event) -> None:
        self.listeners.emit(event)

    def _report(self, site: str, message: str) -> None:
        self._emit(SiteReported(site=site, message=message, own=False))

    def _emit_commit(self, row: VersionRow, collected: float = 0.0, source: str = "") -> None:
        assert self.versions.model is not None
        self._emit(
            VersionCommitted(
                version=row.version,
                participants=dict(row.participants),
                seconds=row.seconds,
                collect_seconds=collected,
                nbytes=row.nbytes,
                tensors=len(self.versions.model.layout.tensors),
                source=source,
            )
        )

    def _emit_best(self, before: int | None) -> None:
        best = self._outcome.best
        if best is not None and best != before:
            metric, value = self.config.selection.metric, self._outcome.score(best)
            self._emit(BestChanged(version=best, metric=metric, value=value))

    def _emit_end(self, result: RunResult, ending: Ending) -> None:
        self._emit(
            RunEnded(
                outcome=ending,
                message=result.message,
                version=result.version,
                best_version=result.best_version,
                best=None if result.best is None else str(result.best),
                metric=self.config.selection.metric,
                value=self._outcome.score(result.best_version),
            )
        )

    # --- selection and the end ---

    def _export_best(self) -> None:
        before = self._outcome.best
        self._outcome.export_best()
        self._emit_best(before)

    def end(self, ending: Ending, message: str) -> None:
        """End the run: write what it leaves behind, and tell the sites."""
        requests = self._requests
        self.collecting.close()
        best = self._outcome.best
        self.result = result = self._outcome.conclude(ending, message)
        ok = result.ok
        self.rounds.phase = _LAST_PHASE[ending]
        self._outcome.write_summary(result, self._snapshot())
        self.store.end(finished=ok)
        self._emit_best(best)
        goodbye = self._tell_end(ending, message, requests)
        self.versions.finish_digests(wait=ok)
        self._outcome.prune()
        self._outcome.write_summary(result, self._snapshot())  # now with the digests
        if self.config.run.task != "train":
            logger.info("results: %s", self._outcome.write_results(result))
        self._emit_end(result, ending)
        for note in () if result.best is None else notes(self.store.files()):
            logger.info("before you use %s: %s", result.best, note)
        self.say_goodbye(goodbye)

    def _end_again(self) -> None:
        """The run was complete, but the server before this one was killed in its last words: say them again."""
        sites = self.store.members()
        self.result = self._outcome.conclude("complete", "")
        self.rounds.phase = Phase.DONE
        self._emit_end(self.result, "complete")
        logger.info("the run is complete; telling %s, who may not know yet", ", ".join(sites))
        self._linger_for_return()
        self.say_goodbye(self._tell_end("complete", "", self._requests))

    def _tell_end(self, ending: Ending, message: str, requests: int) -> Goodbye:
        """Tell the sites of the end; a signal after ``requests`` others ends the wait for them."""
        assert self.result is not None
        finish = protocol.Finish(
            ok=ending == "complete",
            outcome=ending,
            message=message[:4096],
            best_version=self.result.best_version,
        )
        at_once = ending == "stopped" and not self._says_end_again
        return Goodbye(
            (self._link, self._clock),
            self.peers,
            finish,
            Patience(
                leave=self._timing.goodbye,
                linger=0.0 if at_once else self._linger,
                idle=self.config.participants.idle_timeout,
                hurried=lambda: self._requests != requests,
                watched=lambda: self._watchers.present,
                expected=self._members_there,
            ),
            status=self.reply_status,
            forget=self.store.forget_members,
        )

    def say_goodbye(self, goodbye: Goodbye) -> None:
        """Answer for a moment longer, so that every site and viewer hears of the end."""
        self._goodbye = goodbye
        self.next_look = 0.0

    def _members_there(self) -> set[str]:
        """Return the sites that joined the run, and have not left it."""
        left = {m.name for m in self.rounds.roster if m.state is SiteState.LEFT}
        return set(self.store.members()) - left

    def _part(self, goodbye: Goodbye) -> None:
        """Note on disk whom the next server need not tell of the end."""
        assert self.result is not None
        members, untold = set(self.store.members()), goodbye.untold
        if untold and goodbye.patience.linger:
            names = ", ".join(sorted(untold))
            logger.warning("%s may not know that the run is over: nothing heard from there", names)
        # Whoever still waits joins the next server: one that goes on with the run, or says these words again.
        over = self.result.ok and not self._interrupted
        self.store.forget_members(members if over else members - untold)
        self.store.forget_stop()
        self.over = True

    def reply_status(self, peer: bytes) -> None:
        """Answer a peer that asks how the run stands, if its rate limit allows."""
        if self.result is None:
            self._watchers.note(peer)
        else:
            self._watchers.forget(peer)
        if self._replies.may_have(peer, self._status_bytes):
            reply, self._status_bytes = within_a_message(self._snapshot())
            self._link.send(peer, reply)

    def _snapshot(self) -> protocol.StatusReply:
        paused = self._gates.refusal or "no other round begins"
        message = f"paused: {paused}" if self.rounds.paused else ""
        if self.result is not None:
            message = self.result.message
        elif self.error is not None:
            message = _GIVEN_UP
        return self.status.build(self._link.stats(), message)
