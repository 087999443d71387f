"""The server process: it drives the link, the round state machine and the run store.

One thread does everything here; tensor bytes move in the link's pump. `Server.run` returns when the run is over,
was given up, or was stopped, and when this process is to end before the run.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

from fedcore import __version__, protocol
from fedcore._device import device_failure, use_device
from fedcore.config import RunConfig
from fedcore.encoding import can_pack
from fedcore.errors import ConfigError, IntegrityError, ProtocolError, StorageError
from fedcore.layout import DEFAULT_CHUNK_BYTES
from fedcore.replacing import partial_of, place_of, put_in_place
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
from fedcore.server.storage.readme import notes
from fedcore.server.storage.store import Store, VersionRow
from fedcore.transport.link import Control, DataEvent, ServerLink, now_ms
from fedcore.weighing import effective_weight
from fedcore.words import plural

from .access import Access
from .budget import Budget, check_memory, machine_memory, require_connections, steady_heap
from .collecting import Collecting, Reduced, Rejected, Stalled
from .declaring import Declaring
from .goodbye import Goodbye
from .guard import Guard
from .outcome import Ending, Outcome, RunResult
from .peers import Peer, Peers
from .status import StatusBuilder, Watchers, merge_metrics, within_a_message
from .versions import Versions

__all__ = ["RunResult", "Server"]

_CHECK_SECONDS: Final = 0.5
_MOST_AT_ONCE: Final = 4096
"""Messages that are read at a deadline before it is acted on: nobody can put it off by sending more."""
_GOODBYE_SECONDS: Final = 3.0
_UNASKED: Final = 64 << 20
# Of a site that still answers: what is on its way on a slow link keeps its answers back, too.
_DATA_SILENCE_MS: Final = 10_000
_LAST_PHASE: Final = {
    "complete": Phase.DONE,
    "stopped": Phase.STOPPED,
    "failed": Phase.FAILED,
}

logger = logging.getLogger("fedcore.server")


class Server:
    """One run on one port.

    Args:
        config: the run file.
        endpoint_file: where to write the address that the server really listens on, for programs that
            start it with port 0.
        discard: move the models that the run folder's journal does not know into a folder of their own, and go on.

    Raises:
        BusyError: the port or the run folder is in use.
        IntegrityError: the run folder holds models that its journal does not know.
        ConfigError: the run file names no keys and does not ask for plain text; the run folder holds a run
            with other settings, or a finished one; or FEDCORE_DEVICE or transfer.lossless asks for what this
            machine doesn't have.
    """

    def __init__(
        self, config: RunConfig, endpoint_file: Path | None = None, *, discard: bool = False
    ) -> None:
        self.config = config
        self._device = use_device()
        if config.transfer.lossless and not can_pack():
            raise ConfigError(
                "transfer.lossless needs the Python package lz4 at the server: install fedcore-fl[lossless], or "
                "set it to false"
            )
        self._access = Access(config)
        self._budget = Budget.of(
            config.server.memory,
            config.participants.expected,
            spill=config.server.spill,
            encrypted=self._access.secured is not None,
            lossless=config.transfer.lossless,
        )
        steady_heap()
        require_connections(config.participants.expected)
        self._store = Store(
            config.run_folder,
            config.model_dump(mode="json", exclude={"folder", "simulate"}),
            discard=discard,
        )
        try:
            over = self._store.finished and (self._store.last_version or 0) >= config.run.rounds
            self._over_before = over
            if over and not self._store.members():
                raise ConfigError(
                    f"the run in {config.run_folder} is finished; give this run another name (run.name), raise "
                    "run.rounds to go on with it, or remove the folder"
                )
            self._link = ServerLink(config.server.listen, self._access.secured)
        except BaseException:
            self._store.close()
            raise
        self._link.run_id = self._store.run_id
        self.endpoint = self._link.endpoint
        self._access.opened(self._link)
        self._link.exchange.set_limits(
            self._budget.outgoing,
            self._budget.control_per_peer,
            self._budget.control,
            paced=self._link.secure,
            unasked=config.server.memory
            + _UNASKED,  # all that may be under way when it is given up
        )
        self._versions = Versions(config, self._store, self._link.exchange)
        self._collecting = Collecting(
            config, self._store, self._versions, self._link, self._budget.chunks
        )
        self._result: RunResult | None = None
        self._stopping = False
        self._interrupted = ""
        self._requests = 0
        self._linger = 0.0
        self._says_end_again = False
        self._next_look = 0.0
        self._round_started = time.monotonic()
        people = config.participants
        roster = Roster(people.sites, people.count)
        self._peers = Peers(self._link, roster, (config.run.name, self._store.run_id))
        self._guard = Guard(self._link, self._peers, self._access, self._end_part)
        self._outcome = Outcome(config, self._store, roster)
        self._rounds = make_rounds(config, roster, self._store.last_version)
        self._waiting = WaitingLog(self._rounds)
        self._status = StatusBuilder(config, self._rounds, self._store)
        self._store.taken = lambda: self._status.taken(self._link.exchange.stats())
        self._overtime = Overtime()
        self._declaring = Declaring(
            config,
            self._link,
            (self._peers, self._guard),
            (self._store, self._versions),
            self._status,
        )
        self._declaring.forget_revoked(self._access)
        self._watchers = Watchers()
        if endpoint_file is not None:
            place = place_of(endpoint_file)
            with partial_of(place) as partial:
                partial.write_text(self.endpoint, encoding="utf-8")
                put_in_place(partial, place)

    # --- the process ---

    def run(self, linger: float = 0.0) -> RunResult:
        """Run to the end; KeyboardInterrupt and `stop` end the run with what is committed, `interrupt` does not.

        Args:
            linger: seconds after the end of a run that was not stopped, within which sites that do not know of it
                may still ask.

        Raises:
            StorageError: a file can't be written; a server that is started again goes on with the round.
        """
        self._linger = linger
        try:
            if self._over_before:
                self._end_again()
            else:
                self._begin()
            while self._result is None:
                if self._stopping:
                    self._end("stopped", "stopped on request")
                    break
                if self._interrupted:
                    return self._go_away()
                try:
                    self._step()
                except KeyboardInterrupt:
                    self._stopping = True
            assert self._result is not None
            return self._result
        except Exception as error:
            self._say_stopped(error)
            raise
        finally:
            self._versions.close()
            self._access.close()
            self._link.close()
            self._store.close()

    def _say_stopped(self, error: Exception) -> None:
        """Tell the sites that the run goes on once this server is started again, without any path."""
        damaged = isinstance(error, IntegrityError)  # its message says what can be done
        goes_on = "ends" if self._stopping else "goes on"
        after = "" if damaged else f"; the run {goes_on} once the server is started again"
        logger.error("stopped: %s%s", error, after)
        text = "of an error there"
        if isinstance(error, OSError):
            text = "a model file there is damaged" if damaged else "it could not write to its disk"
        self._peers.broadcast(protocol.Stopped(message=text))

    def _go_away(self) -> RunResult:
        """Leave the run as a crash would, but tell the sites to wait for the next server."""
        why = f"the server was ended by {self._interrupted}"
        logger.warning(
            "%s; the run goes on once the server is started again, and the sites wait for it", why
        )
        self._peers.broadcast(protocol.Stopped(message=f"it was ended by {self._interrupted}"))
        try:
            self._store.leave()
        except StorageError as error:  # as where the disk is full: nothing that counts is lost
            logger.warning("the totals of the run are those of its last commit: %s", error)
        text = f"{why}; start it again to go on with the run"
        version = self._store.last_version
        return RunResult("interrupted", version, self._outcome.best, None, None, text)

    def stop(self) -> None:
        """End the run cleanly; safe from another thread or a signal handler."""
        self._stopping = True
        self._requests += 1
        self._link.wake()

    def interrupt(self, what: str) -> None:
        """End this process but not the run; safe from another thread or a signal handler.

        Args:
            what: ended it, such as ``"SIGTERM"``; the sites are told.
        """
        self._interrupted = what
        self._requests += 1
        self._link.wake()

    def _begin(self) -> None:
        logger.info(
            "fedcore %s, run %s (id %s), process %d on %s",
            __version__, self.config.run.name, self._store.run_id, os.getpid(), socket.gethostname(),
        )  # fmt: skip
        version = self._store.last_version
        if version is not None:
            self._versions.open_last(version)
            logger.info("run %s goes on after round %d", self.config.run.name, version)
        elif self.config.initial_path is not None:
            self._versions.load_initial(self.config.initial_path)
            self._rounds.committed(0, time.monotonic())
            logger.info("initial model: %s", self._versions.describe())
        if self._versions.model is not None:
            self._versions.publish()
        logger.info(
            "run %s: %s, listening on %s, waiting for %s (a round needs %d)",
            self.config.run.name, plural(self._rounds.rounds, "round"), self.endpoint,
            plural(self.config.participants.expected, "site"), self.config.participants.quorum,
        )  # fmt: skip
        people = self.config.participants
        self._store.logged.open(people.expected)
        keyless = self._access.without_key(people.sites, people.count)
        if keyless is not None:
            logger.warning("%s", keyless)
        if warning := check_memory(self.config.server.memory, machine_memory()):
            logger.warning("%s", warning)
        if self._device != "CPU":
            logger.info("means are computed on %s", self._device)
        self._expect_back()
        if self._store.stop_asked:
            logger.info(
                "an operator has stopped the run, and the server before this one was ended: it ends now"
            )
            self._stopping = True
            self._linger_for_return()

    def _linger_for_return(self) -> None:
        """Stay at the end of the run until the sites have noticed that this server is here."""
        self._linger = max(
            self._linger, self.config.participants.idle_timeout + protocol.RETURN_SECONDS
        )
        self._says_end_again = True

    def _expect_back(self) -> None:
        """After a crash, give the sites that had joined the time to notice that this server is here."""
        sites = self._store.members()
        if not sites:
            return
        version = self._store.last_version
        scored = [] if version is None else [s.site for s in self._store.scores().get(version, [])]
        wait = self.config.participants.idle_timeout + protocol.RETURN_SECONDS
        decided = self._collecting.scratch(0 if version is None else version + 1).decided()
        chosen = [] if version is None else self._store.chosen(version + 1)
        self._rounds.restarted(sites, scored, time.monotonic() + wait, decided, chosen)
        logger.info("expecting %s back within %.0f s", ", ".join(sites), wait)

    def _step(self) -> None:
        deadline = self._rounds.deadline
        passed = deadline is not None and time.monotonic() >= deadline
        until = self._next_look
        if deadline is not None and not passed:
            until = min(until, deadline)
        wait = min(_CHECK_SECONDS, until - time.monotonic())
        arrived = self._link.recv(max(0.0, wait))
        if arrived is not None:
            self._hear(arrived)
        if deadline is not None and time.monotonic() >= deadline:
            self._hear_what_waits()
        self._check_access()
        self._check_alive()
        self._check_overtime()
        self._versions.keep_digests()
        self._store.logged.write_if_due(time.monotonic())
        self._do(self._rounds.tick(time.monotonic()))
        self._waiting.look(time.monotonic())

    def _hear(self, arrived: Control | DataEvent) -> None:
        if not isinstance(arrived, Control):
            self._handle_event(arrived)
            return
        try:
            message = protocol.decode_from_site(arrived.body, self._versions.most_tensors())
        except ProtocolError as error:
            self._guard.invalid(arrived.peer, str(error), protocol.greeting(arrived.body))
        else:
            self._admit(arrived.peer, message)

    def _hear_what_waits(self) -> None:
        """Let what came by the deadline count, though other messages were read first."""
        for _ in range(_MOST_AT_ONCE):
            arrived = self._link.recv(0.0)
            if arrived is None or self._result is not None:
                return
            self._hear(arrived)

    def _check_access(self) -> None:
        for name in self._guard.take_out_revoked():
            self._declaring.forget(name)

    def _check_alive(self) -> None:
        """Look at all sites: not with each message, as there may be a thousand of them, but now and then, and when
        the first of them will have been silent for too long."""
        if time.monotonic() < self._next_look:
            return
        limit = round(self.config.participants.idle_timeout * 1000)
        exchange, patience = self._link.exchange, round(_CHECK_SECONDS * 1000)
        for peer, known in self._peers:
            now, heard = now_ms(), exchange.last_heard(peer)
            silent = limit + 1 if heard is None else now - heard
            left = max(limit - silent, exchange.busy_until(peer) - now)
            if left < 0:
                self._lose(peer, f"nothing heard for {silent / 1000:.1f} s")
                logger.warning("%s is lost: nothing heard for %.1f s", known.site, silent / 1000)
            else:
                patience = min(patience, left + 1)
        self._next_look = time.monotonic() + patience / 1000

    def _check_overtime(self) -> None:
        """After the deadline, leave out who sends too little, unless the round needs it."""
        now = time.monotonic()
        if not self._rounds.overdue(now):
            self._overtime.reset()
            return
        for site in self._overtime.look(now, self._collecting.pulls()):
            actions = self._rounds.too_slow(site, now)
            if actions:
                self._peers.tell(
                    site,
                    "%s is left out of round %s: its update came too slowly after the round's deadline; with less "
                    "than %s a second, raise participants.round_deadline",
                    str(self._rounds.round), "1 MiB",
                )  # fmt: skip
                self._do(actions)
                return

    def _lose(self, peer: bytes, reason: str, *, left: bool = False) -> None:
        known = self._peers.remove(peer, left=left)
        assert known is not None
        self._link.exchange.forget(peer)
        self._collecting.lost(known.site)
        self._do(self._rounds.lost(known.site, reason, time.monotonic(), left=left))

    def _end_part(self, peer: bytes, reason: str) -> None:
        self._lose(peer, reason, left=True)

    # --- messages ---

    def _admit(self, peer: bytes, message: protocol.FromSite) -> None:
        """Handle a message if its sender may say it."""
        refusal = self._access.refusal(peer, message)
        if refusal is not None:
            self._peers.refuse(peer, self._peers.name(peer), refusal)
        elif protocol.is_of_run(message, self._store.run_id):
            self._handle(peer, message)
        else:
            self._link.send(peer, protocol.Rejoin())  # the Welcome says which run this is

    def _handle(self, peer: bytes, message: protocol.FromSite) -> None:
        if isinstance(message, protocol.StatusRequest):
            self._reply_status(peer)
            return
        if isinstance(message, protocol.Command):
            self._on_command(peer, message)
            return
        if isinstance(message, protocol.Join):
            self._on_join(peer, message)
            return
        known = self._peers.get(peer)
        if known is None:
            self._link.send(peer, protocol.Rejoin())
            return
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
            self._status.note_metrics(site, message.metrics)
            self._keep_metrics(site, message.round, message.step, message.metrics)
        elif isinstance(message, protocol.Problem):
            self._peers.tell(site, "%s reports: %s", message.message)
            self._status.note(site, message.message)
        elif isinstance(message, protocol.Leave):
            self._peers.tell(site, "%s left: %s", message.reason, level=logging.INFO)
            self._lose(peer, message.reason, left=True)

    def _on_stop(self) -> protocol.CommandReply:
        """Write a stop down before it is answered: it holds also if this server is killed after the answer."""
        try:
            self._store.ask_stop()
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
            reply, actions = steer(self._rounds, command.action, time.monotonic())
        self._peers.tell(
            self._peers.name(peer),
            "%s asks to %s: %s",
            command.action,
            reply.message,
            level=logging.INFO,
        )
        self._link.send(peer, reply)
        self._do(actions)

    def _on_join(self, peer: bytes, join: protocol.Join) -> None:
        if self._peers.turn_away(peer, join) or not self._peers.may_have(
            peer, self._versions.table_bytes
        ):
            return
        if peer not in self._peers:
            self._peers.tell(join.site, "%s joined", level=logging.INFO)
            self._store.add_member(join.site)
            self._peers.add(peer, join.site, join.features)
        self._link.send(
            peer,
            protocol.Welcome(
                run=self.config.run.name,
                run_id=self._store.run_id,
                rounds=self._rounds.rounds,
                chunk_bytes=DEFAULT_CHUNK_BYTES,
                has_model=self._versions.model is not None,
                version=__version__,
                transfer=self.config.transfer.message,
                features=protocol.features(lossless=can_pack()),
            ),
        )
        self._do(self._rounds.joined(join.site, join.instance, time.monotonic()))

    def _on_declare(self, peer: bytes, site: str, declare: protocol.Declare) -> None:
        if self._declaring.take(peer, site, declare):
            self._do(self._rounds.declared(site, time.monotonic()))

    def _on_ready(self, peer: bytes, known: Peer, ready: protocol.Ready) -> None:
        declare = self._status.declared.get(known.site)
        update = ready.model
        if len(ready.sets) > 1:
            names = ", ".join(one.name for one in ready.sets)
            text = f"the update is of the sets {names}; this run takes one, {protocol.MODEL}"
            self._guard.put_out(peer, known.site, "sets", text)
            return
        if update.layout != self._versions.expected_hash(declare):
            self._guard.put_out(peer, known.site, "layout", "the update's layout is not the run's")
            return
        known.metrics = dict(ready.metrics)
        self._status.note_metrics(known.site, ready.metrics)
        self._keep_metrics(known.site, ready.round, None, ready.metrics)
        self._status.examples[known.site] = ready.weight
        self._do(
            self._rounds.ready(
                known.site, ready.round, Delivery(update.id, effective_weight(ready.weight))
            )
        )

    def _keep_metrics(
        self, site: str, round_: int, step: int | None, metrics: Mapping[str, float]
    ) -> None:
        beyond = self._store.logged.add(site, round_, step, metrics)
        if beyond:
            names = ", ".join(beyond[:6]) + (", ..." if len(beyond) > 6 else "")
            self._peers.tell(site, "%s logs more metrics than are kept: not %s", names)

    def _on_score(self, site: str, score: protocol.Score) -> None:
        last = self._store.last_version
        if last is None or score.version > last:
            self._peers.tell(site, "%s scored model %s, which does not exist", str(score.version))
            return
        bad = [name for name, value in score.metrics.items() if not math.isfinite(value)]
        if bad:
            named = ", ".join(bad)
            self._peers.tell(
                site, "%s: metric %s of model %s is not finite", named, str(score.version)
            )
        self._check_metrics(site, score.version, score.metrics)
        if score.metrics:
            rows = {name: rows and effective_weight(rows) for name, rows in score.rows.items()}
            self._store.add_score(
                score.version,
                SiteScore(site, effective_weight(score.examples), score.metrics, rows),
            )
            self._status.refresh()
        self._do(self._rounds.scored(site, score.version))

    def _check_scored(self, version: int, sites: Collection[str]) -> None:
        """Name the sites that trained from a model without a score of it, where a metric selects."""
        if self.config.selection.metric is None or self.config.run.task != "train":
            return
        scored = {score.site for score in self._store.scores().get(version, [])}
        for site in sorted({*sites} - scored):
            self._check_metrics(site, version, ())

    def _check_metrics(self, site: str, version: int, metrics: Collection[str]) -> None:
        """Say at once, and not after the last round, if a site's metrics select nothing."""
        problem = self._outcome.metric_problem(site, version, metrics)
        if problem:
            self._peers.tell(site, "%s %s", problem)
            self._status.note(site, problem)

    def _on_answer(self, peer: bytes, site: str, answer: protocol.Answer) -> None:
        if self.config.run.task != "infer" or answer.version != self._store.last_version:
            self._guard.invalid(peer, "answer that nobody asked for")
            return
        examples = effective_weight(answer.examples)
        self._store.add_answer(answer.version, site, examples, answer.outputs)
        self._peers.tell(site, "%s answered: %s", ", ".join(answer.outputs), level=logging.INFO)
        self._do(self._rounds.scored(site, answer.version))

    def _handle_event(self, event: DataEvent) -> None:
        if self._guard.heard(event):
            return
        if (
            event[0] == "damaged"
        ):  # found when a site asked for a chunk again, or an update was added
            raise self._versions.damaged(event[2])
        found = self._collecting.heard(event)
        if isinstance(found, Reduced):
            self._do(self._rounds.reduced())
        elif isinstance(found, Rejected):
            self._on_rejected(found.site, found.reason)
        elif isinstance(found, Stalled):
            self._on_stalled(found.site, found.silent_ms)

    def _on_rejected(self, site: str, reason: str) -> None:
        round_ = self._rounds.round
        actions = self._rounds.rejected(site, reason, time.monotonic())
        if actions and round_ == 0:
            logger.warning("the initial model of %s is not usable: %s", site, reason)
        elif actions:
            logger.warning("the update of %s is left out of round %d: %s", site, round_, reason)
        self._do(actions)

    def _on_stalled(self, site: str, silent_ms: int) -> None:
        """Nothing came of what was asked for: a site that is there but sends nothing must not hold the round."""
        logger.debug("%s: no chunk for %.0f s; asked again", site, silent_ms / 1000)
        if silent_ms < _DATA_SILENCE_MS:
            return
        for peer, known in self._peers:
            if known.site == site:
                reason = f"it answers, but sent no data for {silent_ms / 1000:.0f} s"
                logger.warning("%s is lost: %s", site, reason)
                self._lose(peer, reason)

    # --- actions ---

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            self._do_one(action)

    def _do_one(self, action: Action) -> None:
        if isinstance(action, Choose):
            self._store.choose(action.round, action.sites)
        elif isinstance(action, SendTask):
            self._send_task(action)
        elif isinstance(action, SendDropped):
            self._peers.send_to(
                action.site, protocol.Dropped(round=action.round, message=action.message[:4096])
            )
            logger.debug("%s: %s", action.site, action.message)
        elif isinstance(action, GiveUp):
            logger.warning("%s is lost: %s", action.site, action.message)
        elif isinstance(action, PullAhead):
            self._pull_ahead(action)
        elif isinstance(action, StartCollect):
            self._start_collect(action)
        elif isinstance(action, HoldCollect):
            self._collecting.park()
        elif isinstance(action, Commit):
            self._commit(action)
        elif isinstance(action, EndRun):
            self._end("complete" if action.ok else "failed", action.message)

    def _send_task(self, action: SendTask) -> None:
        version = {"train": action.round - 1, "submit": 0}.get(action.kind, action.round)
        if action.round != self._status.round_shown:
            self._status.round_shown = action.round
            self._round_started = time.monotonic()
        task = protocol.Task(
            kind=action.kind,
            round=action.round,
            rounds=self._rounds.rounds,
            version=version,
            seed=self.config.run.seed * 1_000_003 + action.round,
        )
        if self._versions.model is not None:
            listed, packed = self._versions.described()
            task = task.model_copy(
                update={
                    "included": self._versions.included.get(action.site),
                    "checksum": self._versions.checksum,
                    "sets": [
                        protocol.OpenSet.model_construct(
                            id=self._set_id_for(action.site).hex(),
                            layout=self._versions.layout_hash,
                            tensors=listed,
                            packed=packed,
                        )
                    ],
                }
            )
        self._peers.send_to(action.site, task)

    def _set_id_for(self, site: str) -> bytes:
        unpacks = any(
            "lossless" in known.features for _, known in self._peers if known.site == site
        )
        return self._versions.packed_id if unpacks else self._versions.set_id

    def _pull_ahead(self, action: PullAhead) -> None:
        self._collecting.pull_ahead(action, self._peers.addresses(), self._rounds.most)
        self._status.aggregation = self._collecting.running

    def _start_collect(self, action: StartCollect) -> None:
        done = self._collecting.start(action, self._peers.addresses(), self._status.declared)
        self._status.aggregation = self._collecting.running
        if done:
            self._do(self._rounds.reduced())

    def _commit(self, action: Commit) -> None:
        running = self._collecting.take()
        self._status.aggregation = None
        try:
            running.check_base()
        except StorageError as error:
            raise self._versions.damaged(str(error)) from None
        model, checksums = running.finish()
        weights = {p.site: p.weight for p in action.participants} if action.version else {}
        seconds = time.monotonic() - self._round_started
        row = VersionRow(action.version, "", "", model.layout.total_bytes, seconds, weights)
        metrics = {known.site: known.metrics for _, known in self._peers}
        if action.version == 0:
            self._store.keep_initial_site(action.participants[0].site)
        self._versions.commit(row, (model, checksums), metrics)
        self._status.refresh()
        names = [p.site for p in action.participants]
        if action.version:
            self._check_scored(action.version - 1, names)
            logger.info(
                "round %d of %d committed: %s, %.1f s, of which %.2f s to pull and reduce",
                action.version, self._rounds.rounds, ", ".join(names), seconds,
                time.monotonic() - running.started,
            )  # fmt: skip
        else:
            logger.info("initial model from %s: %s", names[0], self._versions.describe())
        for peer, known in self._peers:
            self._link.send(
                peer,
                protocol.Commit(
                    version=action.version, included=known.site in names, participants=names
                ),
            )
        if failure := device_failure():
            self._device = use_device("cpu")
            logger.warning("the GPU failed; the CPU goes on with the same bits: %s", failure)
        self._do(self._rounds.committed(action.version, time.monotonic()))
        if self._result is None:  # after the tasks: reading a large model takes seconds
            self._export_best()
            self._outcome.prune()

    # --- selection and the end ---

    def _export_best(self) -> None:
        self._outcome.export_best()
        self._status.best = self._outcome.best

    def _end(self, ending: Ending, message: str) -> None:
        requests = self._requests
        self._collecting.close()
        self._result = result = self._outcome.conclude(ending, message)
        ok = result.ok
        self._rounds.phase = _LAST_PHASE[ending]
        self._status.best = chosen = result.best_version
        self._outcome.write_summary(result, self._snapshot())
        self._store.end(finished=ok)
        goodbye = self._goodbye(ending, message, chosen)
        self._versions.finish_digests(wait=ok)
        self._outcome.prune()
        self._outcome.write_summary(result, self._snapshot())  # now with the digests
        if self.config.run.task != "train":
            logger.info("results: %s", self._outcome.write_results(result))
        how = {"complete": "is complete", "stopped": f"was {message}"}
        logger.log(
            logging.ERROR if ending == "failed" else logging.INFO,
            "the run %s%s", how.get(ending, f"failed: {message}"),
            "" if chosen is None
            else f"; best model{'' if ok else ' so far'}: round {chosen}, {self._outcome.metric_text(chosen)}"
            + ("" if result.best is None else f", in {result.best}"),
        )  # fmt: skip
        for note in () if result.best is None else notes(self._store.files()):
            logger.info("before you use %s: %s", result.best, note)
        self._say_goodbye(goodbye, requests)

    def _end_again(self) -> None:
        """The run was complete, but the server before this one was killed in its last words: say them again."""
        sites = self._store.members()
        self._result = self._outcome.conclude("complete", "")
        self._rounds.phase = Phase.DONE
        self._status.best = self._result.best_version
        logger.info("the run is complete; telling %s, who may not know yet", ", ".join(sites))
        goodbye = self._goodbye("complete", "", self._result.best_version)
        self._linger_for_return()
        self._say_goodbye(goodbye, self._requests)

    def _goodbye(self, ending: Ending, message: str, best: int | None) -> Goodbye:
        finish = protocol.Finish(
            ok=ending == "complete", outcome=ending, message=message[:4096], best_version=best
        )
        return Goodbye(
            self._link,
            self._peers,
            self._access,
            finish,
            idle_ms=round(self.config.participants.idle_timeout * 1000),
            status=self._reply_status,
            forget=self._store.forget_members,
        )

    def _say_goodbye(self, goodbye: Goodbye, requests: int) -> None:
        """Answer for a moment longer, so that every site and viewer hears of the end; another signal ends it."""

        def hurried() -> bool:
            return self._requests != requests

        goodbye.until_gone(_GOODBYE_SECONDS, hurried, lambda: self._watchers.present)
        assert self._result is not None
        members = set(self._store.members())
        left = {m.name for m in self._rounds.roster if m.state is SiteState.LEFT}
        at_once = self._result.ending == "stopped" and not self._says_end_again
        linger = 0.0 if at_once else self._linger
        untold = goodbye.until_told(members - left, linger, hurried)
        if untold and linger:
            names = ", ".join(sorted(untold))
            logger.warning("%s may not know that the run is over: nothing heard from there", names)
        # Whoever still waits joins the next server: one that goes on with the run, or says these words again.
        over = self._result.ok and not self._interrupted
        self._store.forget_members(members if over else members - untold)
        self._store.forget_stop()

    def _reply_status(self, peer: bytes) -> None:
        if self._result is None:
            self._watchers.note(peer)
        else:
            self._watchers.forget(peer)
        if self._peers.may_have(peer, self._status.reply_bytes):
            reply, self._status.reply_bytes = within_a_message(self._snapshot())
            self._link.send(peer, reply)

    def _snapshot(self) -> protocol.StatusReply:
        stats = self._link.exchange.stats()
        paused = "paused: no other round begins" if self._rounds.paused else ""
        return self._status.build(stats, self._result.message if self._result else paused)
