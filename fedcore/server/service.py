"""The server process: it drives the link, the round state machine and the run store.

One thread does everything here; tensor bytes move in the link's pump. `Server.run` returns when the run is over,
was given up, or was stopped.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fedcore import __version__, protocol
from fedcore._core import Layout, Spill, crc32c
from fedcore._device import device_failure, use_device
from fedcore.config import RunConfig
from fedcore.errors import ConfigError, FedcoreError, LayoutError, ProtocolError, StorageError
from fedcore.layout import (
    DEFAULT_CHUNK_BYTES,
    ModelFile,
    compare_layouts,
    layout_hash,
    open_model,
    table,
)
from fedcore.transport import Control, DataEvent, ServerLink, now_ms

from .aggregation import Aggregation, open_spill
from .hashing import Hasher
from .initial import load_initial
from .participation import Delivery, Roster, SiteState
from .rounds import (
    Action,
    CancelCollect,
    Commit,
    EndRun,
    GiveUp,
    Phase,
    Rounds,
    SendDropped,
    SendTask,
    StartCollect,
)
from .selection import SiteScore, best_version, weighted_metrics
from .status import StatusBuilder
from .store import Store, VersionRow

__all__ = ["RunResult", "Server"]

_CHECK_SECONDS: Final = 0.5
_GOODBYE_SECONDS: Final = 3.0
# Of a site that still answers; on a slow link a chunk may take seconds.
_DATA_SILENCE_MS: Final = 10_000

logger = logging.getLogger("fedcore.server")


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        ok: whether all rounds were committed and the last model was scored.
        best_version: the selected version, or None if nothing was committed.
        message: why it ended, if not as planned.
    """

    ok: bool
    version: int | None
    best_version: int | None
    best: Path | None
    final: Path | None
    message: str = ""


@dataclass
class _Peer:
    """A site's process as the link sees it."""

    site: str
    metrics: dict[str, float]


def _layout_of(declare: protocol.Declare) -> Layout:
    """Return the layout of a site's tensors; LayoutError if they make none."""
    layout = Layout([(n, d, s) for n, d, s in declare.tensors], DEFAULT_CHUNK_BYTES)
    if layout.total_bytes == 0:
        raise LayoutError("the declared tensors hold no bytes")
    return layout


def _checksum_of(checksums: list[int]) -> str:
    """Return one checksum over those of the chunks, in hex."""
    return f"{crc32c(b''.join(value.to_bytes(4, 'little') for value in checksums)):08x}"


class Server:
    """One run on one port.

    Args:
        config: the run file.
        endpoint_file: where to write the address that the server really listens on, for programs that
            start it with port 0.

    Raises:
        BusyError: the port or the run folder is in use.
        ConfigError: the run folder holds a run with other settings, or a finished one; or FEDCORE_DEVICE
            asks for what this machine doesn't have.
    """

    def __init__(self, config: RunConfig, endpoint_file: Path | None = None) -> None:
        self.config = config
        self._device = use_device()
        self._store = Store(
            config.run_folder, config.model_dump(mode="json", exclude={"folder", "simulate"})
        )
        try:
            if self._store.finished and (self._store.last_version or 0) >= config.run.rounds:
                raise ConfigError(
                    f"the run in {config.run_folder} is finished; give this run another name (run.name), raise "
                    "run.rounds to go on with it, or remove the folder"
                )
            self._link = ServerLink(config.server.listen)
        except BaseException:
            self._store.close()
            raise
        self.endpoint = self._link.endpoint
        self._model: ModelFile | None = None
        self._checksums: list[int] = []
        self._superseded: ModelFile | None = None
        self._hasher = Hasher()
        self._cards: dict[str, str] = {}
        self._set_id = b""
        self._aggregation: Aggregation | None = None
        self._parked = False  # the aggregation waits for a decision on who takes part
        self._spill: Spill | None = None
        self._said_no_room = False
        self._peers: dict[bytes, _Peer] = {}
        self._turned_away = (b"", "")
        self._next_complaint = 0.0
        self._complaints_left_out = 0
        self._result: RunResult | None = None
        self._stopping = False
        self._round_started = time.monotonic()
        people = config.participants
        self._rounds = Rounds(
            Roster(people.sites, people.count),
            rounds=config.run.rounds,
            quorum=people.quorum,
            deadline=people.round_deadline,
            version=self._store.last_version,
            sample=people.sample,
            seed=config.run.seed,
        )
        self._status = StatusBuilder(config, self._rounds, self._store)
        if endpoint_file is not None:
            partial = endpoint_file.with_suffix(".partial")
            partial.write_text(self.endpoint, encoding="utf-8")
            partial.rename(endpoint_file)

    # --- the process ---

    def run(self) -> RunResult:
        """Run to the end; KeyboardInterrupt and `stop` end it cleanly with what is committed."""
        try:
            self._begin()
            while self._result is None:
                if self._stopping:
                    self._end(False, "stopped on request")
                    break
                try:
                    self._step()
                except KeyboardInterrupt:
                    self._stopping = True
            assert self._result is not None
            return self._result
        finally:
            self._hasher.stop()
            self._link.close()
            self._store.close()

    def stop(self) -> None:
        """End the run cleanly; safe from another thread or a signal handler."""
        self._stopping = True
        self._link.wake()

    def _begin(self) -> None:
        version = self._store.last_version
        if version is not None:
            self._model = open_model(self._store.path(version))
            self._checksums = self._check_committed(version)
            logger.info("run %s goes on after round %d", self.config.run.name, version)
        elif self.config.initial_path is not None:
            scratch = self._store.scratch(0)
            model, self._cards = load_initial(self.config.initial_path, scratch, self._metadata(0))
            model.file.sync()
            self._save(0, (model, model.checksums(), scratch), {}, 0.0)
            self._rounds.committed(0, time.monotonic())
            logger.info("initial model: %s", self._describe())
        if self._model is not None:
            self._publish()
        logger.info(
            "run %s: %d rounds, listening on %s, waiting for %d sites (a round needs %d)",
            self.config.run.name, self.config.run.rounds, self.endpoint,
            self.config.participants.expected, self.config.participants.quorum,
        )  # fmt: skip
        if self._device != "CPU":
            logger.info("means are computed on %s", self._device)
        self._expect_back()

    def _expect_back(self) -> None:
        """After a crash, give the sites that had joined the time to notice that this server is here."""
        sites = self._store.members()
        if not sites:
            return
        version = self._store.last_version
        scored = [] if version is None else [s.site for s in self._store.scores().get(version, [])]
        wait = self.config.participants.idle_timeout + protocol.RETURN_SECONDS
        self._rounds.restarted(sites, scored, time.monotonic() + wait)
        logger.info("expecting %s back within %.0f s", ", ".join(sites), wait)

    def _check_committed(self, version: int) -> list[int]:
        """Compare the last committed file with its checksum; return its chunks' checksums."""
        assert self._model is not None
        rows = {row.version: row for row in self._store.versions()}
        checksums = self._model.checksums() if self._model.canonical else []
        if _checksum_of(checksums) != rows[version].checksum:
            raise StorageError(
                f"{self._model.path} is not the file that this run committed (its checksum differs); put the "
                "right one back, or give this run another name"
            )
        for row in rows.values():
            path = self._store.path(row.version)
            if not row.sha256 and path.is_file():
                self._hasher.add(row.version, path, open_model(path).data_offset)
        return checksums

    def _step(self) -> None:
        deadline = self._rounds.deadline
        wait = (
            _CHECK_SECONDS if deadline is None else min(_CHECK_SECONDS, deadline - time.monotonic())
        )
        arrived = self._link.recv(max(0.0, wait))
        if isinstance(arrived, Control):
            try:
                message = protocol.decode_from_site(arrived.body)
            except ProtocolError as error:
                self._on_invalid(arrived.peer, str(error))
            else:
                self._handle(arrived.peer, message)
        elif arrived is not None:
            self._handle_event(arrived)
        self._check_alive()
        self._keep_digests()
        self._do(self._rounds.tick(time.monotonic()))

    def _keep_digests(self) -> None:
        for version, digest in self._hasher.results():
            self._store.add_sha256(version, digest)

    def _check_alive(self) -> None:
        limit = self.config.participants.idle_timeout * 1000
        for peer, known in list(self._peers.items()):
            heard = self._link.exchange.last_heard(peer)
            silent = limit + 1 if heard is None else now_ms() - heard
            if silent > limit:
                self._lose(peer, f"nothing heard for {silent / 1000:.1f} s")
                logger.warning("%s is lost: nothing heard for %.1f s", known.site, silent / 1000)

    def _lose(self, peer: bytes, reason: str, *, left: bool = False) -> None:
        known = self._peers.pop(peer)
        self._link.exchange.forget(peer)
        self._do(self._rounds.lost(known.site, reason, time.monotonic(), left=left))

    # --- messages ---

    def _on_invalid(self, peer: bytes, error: str) -> None:
        """A message that breaks the protocol ends its sender's part; a stranger has none."""
        known = self._peers.get(peer)
        self._complain("%s sent a %s", known.site if known else "a stranger", error)
        if known is not None:
            text = f"the server did not understand this site: {error}"
            self._link.send(peer, protocol.Refused(code="message", message=text[:4096]))
            self._lose(peer, f"it sent a {error}", left=True)

    def _complain(self, text: str, *values: str) -> None:
        """Warn at most once a second: what anyone can send must not fill the disk, nor keep this thread busy."""
        now = time.monotonic()
        if now < self._next_complaint:
            self._complaints_left_out += 1
            return
        self._next_complaint = now + 1.0
        if self._complaints_left_out:
            text += f" (and {self._complaints_left_out} more since the last such line)"
            self._complaints_left_out = 0
        logger.warning(text, *values)

    def _handle(self, peer: bytes, message: protocol.FromSite) -> None:
        if isinstance(message, protocol.StatusRequest):
            self._reply_status(peer)
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
        elif isinstance(message, protocol.Log):
            known.metrics.update(message.metrics)
            self._status.note_metrics(site, message.metrics)
        elif isinstance(message, protocol.Problem):
            logger.warning("%s reports: %s", site, message.message)
            self._status.note(site, message.message)
        elif isinstance(message, protocol.Leave):
            logger.info("%s left: %s", site, message.reason)
            self._lose(peer, message.reason, left=True)

    def _on_join(self, peer: bytes, join: protocol.Join) -> None:
        refusal = self._refusal(peer, join)
        if refusal is not None:
            # A site that is started again at once asks until its dead process is noticed: once is enough to read.
            again = (peer, refusal.code) == self._turned_away
            self._turned_away = (peer, refusal.code)
            logger.log(
                logging.DEBUG if again else logging.WARNING,
                "refused %s: %s", join.site, refusal.message,
            )  # fmt: skip
            self._link.send(peer, refusal)
            return
        if peer not in self._peers:
            logger.info("%s joined", join.site)
            self._store.add_member(join.site)
            self._peers[peer] = _Peer(join.site, {})
        self._link.send(
            peer,
            protocol.Welcome(
                run=self.config.run.name,
                run_id=self._store.run_id,
                rounds=self.config.run.rounds,
                chunk_bytes=DEFAULT_CHUNK_BYTES,
                has_model=self._model is not None,
                version=__version__,
            ),
        )
        self._do(self._rounds.joined(join.site, join.instance, time.monotonic()))

    def _refusal(self, peer: bytes, join: protocol.Join) -> protocol.Refused | None:
        if join.protocol != protocol.PROTOCOL_VERSION:
            return protocol.Refused(
                code="version",
                message=f"site {join.site!r} speaks protocol {join.protocol} (fedcore {join.version}), the server "
                f"{protocol.PROTOCOL_VERSION} (fedcore {__version__}); install the same version on both sides",
            )
        reason = self._rounds.roster.refusal(join.site)
        if reason is not None:
            return protocol.Refused(code="unknown-site", message=reason)
        for other, known in self._peers.items():
            if known.site == join.site and other != peer:
                return protocol.Refused(
                    code="name-in-use",
                    message=f"another process takes part as {join.site!r}; every site needs a name of its own "
                    "(FEDCORE_SITE)",
                )
        return None

    def _on_declare(self, peer: bytes, site: str, declare: protocol.Declare) -> None:
        if self._model is not None:
            difference = compare_layouts(
                declare.tensors, table(self._model.layout), f"site {site}", "the global model"
            )
            if difference is not None:
                logger.error("refused %s: its tensors differ: %s", site, difference)
                self._link.send(
                    peer,
                    protocol.Refused(
                        code="layout", message=f"the model's tensors differ: {difference}"
                    ),
                )
                self._lose(peer, f"its tensors differ: {difference}", left=True)
                return
            hash_ = layout_hash(self._model.layout)
        else:
            try:
                layout = _layout_of(declare)
                self._store.check_space(layout.total_bytes)
            except FedcoreError as error:
                logger.error("refused %s: %s", site, error)
                self._link.send(peer, protocol.Refused(code="layout", message=str(error)[:4096]))
                self._lose(peer, str(error), left=True)
                return
            hash_ = layout_hash(layout)
            self._status.declared[site] = declare
        self._link.send(peer, protocol.Accepted(layout_hash=hash_))
        self._do(self._rounds.declared(site, time.monotonic()))

    def _on_ready(self, peer: bytes, known: _Peer, ready: protocol.Ready) -> None:
        if ready.layout_hash != self._expected_hash(known.site):
            text = "the update's layout is not the run's"
            logger.error("refused %s: %s", known.site, text)
            self._link.send(peer, protocol.Refused(code="layout", message=text))
            self._lose(peer, text, left=True)
            return
        known.metrics = dict(ready.metrics)
        self._status.note_metrics(known.site, ready.metrics)
        self._status.examples[known.site] = ready.weight
        self._do(self._rounds.ready(known.site, ready.round, Delivery(ready.set_id, ready.weight)))

    def _expected_hash(self, site: str) -> str | None:
        if self._model is not None:
            return layout_hash(self._model.layout)
        declare = self._status.declared.get(site)
        if declare is None:
            return None
        return layout_hash(_layout_of(declare))

    def _on_score(self, site: str, score: protocol.Score) -> None:
        last = self._store.last_version
        if last is None or score.version > last:
            logger.warning("%s scored model %d, which does not exist", site, score.version)
            return
        bad = [name for name, value in score.metrics.items() if not math.isfinite(value)]
        if bad:
            logger.warning(
                "%s: metric %s of model %d is not finite", site, ", ".join(bad), score.version
            )
        if score.metrics:
            self._store.add_score(score.version, SiteScore(site, score.examples, score.metrics))
            self._status.refresh()
        self._do(self._rounds.scored(site, score.version))

    def _handle_event(self, event: DataEvent) -> None:
        if event[0] == "malformed":
            known = self._peers.get(event[1])
            self._complain(
                "dropped a frame from %s: %s", known.site if known else "a stranger", event[2]
            )
            return
        running = self._aggregation
        if running is None or event[1] != running.collector.id:
            return
        if event[0] == "broken":
            self._end(False, f"the new model can't be written: {event[2]}")
        elif event[0] == "no-room":
            if not self._said_no_room:
                logger.warning("sites that are ahead are held back: %s", event[2])
            self._said_no_room = True
        elif event[0] == "rejected":
            site = running.reject(event[2]).site
            if self._parked:  # found again once it is decided who takes part
                return
            logger.warning(
                "the update of %s is left out of round %d: %s", site, self._rounds.round, event[4]
            )
            self._do(self._rounds.rejected(site, event[4], time.monotonic()))
        elif self._parked:
            return
        elif event[0] == "done" and running.collector.done:
            self._do(self._rounds.reduced())
        elif event[0] == "stalled":
            self._on_stalled(running.participants[event[2]].site, event[3])

    def _on_stalled(self, site: str, silent_ms: int) -> None:
        """Nothing came of what was asked for: a site that is there but sends nothing must not hold the round."""
        logger.debug("%s: no chunk for %.0f s; asked again", site, silent_ms / 1000)
        if silent_ms < _DATA_SILENCE_MS:
            return
        for peer, known in list(self._peers.items()):
            if known.site == site:
                reason = f"it answers, but sent no data for {silent_ms / 1000:.0f} s"
                logger.warning("%s is lost: %s", site, reason)
                self._lose(peer, reason)

    # --- actions ---

    def _do(self, actions: list[Action]) -> None:
        for action in actions:
            self._do_one(action)

    def _do_one(self, action: Action) -> None:
        if isinstance(action, SendTask):
            self._send_task(action)
        elif isinstance(action, SendDropped):
            self._send_to(
                action.site, protocol.Dropped(round=action.round, message=action.message[:4096])
            )
            logger.debug("%s: %s", action.site, action.message)
        elif isinstance(action, GiveUp):
            logger.warning("%s is lost: %s", action.site, action.message)
        elif isinstance(action, StartCollect):
            self._start_collect(action)
        elif isinstance(action, CancelCollect):
            self._parked = True  # the next collection may go on with what is here
        elif isinstance(action, Commit):
            self._commit(action)
        elif isinstance(action, EndRun):
            self._end(action.ok, action.message)

    def _send_to(self, site: str, message: protocol.FromServer) -> None:
        for peer, known in self._peers.items():
            if known.site == site:
                self._link.send(peer, message)

    def _send_task(self, action: SendTask) -> None:
        version = action.round - 1 if action.kind == "train" else action.round
        if action.round != self._status.round_shown:
            self._status.round_shown = action.round
            self._round_started = time.monotonic()
        task = protocol.Task(
            kind=action.kind,
            round=action.round,
            rounds=self.config.run.rounds,
            version=version,
            seed=self.config.run.seed * 1_000_003 + action.round,
        )
        if self._model is not None:
            layout = self._model.layout
            task = task.model_copy(
                update={
                    "set_id": self._set_id.hex(),
                    "layout_hash": layout_hash(layout),
                    "tensors": table(layout),
                }
            )
        self._send_to(action.site, task)

    def _cancel_collect(self) -> None:
        self._parked = False
        if self._aggregation is not None:
            self._aggregation.cancel()
            self._aggregation = None

    def _start_collect(self, action: StartCollect) -> None:
        peers = {known.site: peer for peer, known in self._peers.items()}
        running = self._aggregation
        if running is not None and running.narrow(action.participants, peers):
            self._parked = False
            self._link.kick()
            if running.collector.done:  # while it was parked
                self._do(self._rounds.reduced())
            return
        self._cancel_collect()
        layout = self._model.layout if self._model is not None else None
        if layout is None:
            declare = self._status.declared[action.participants[0].site]
            layout = _layout_of(declare)
            self._cards = dict(declare.files)
        if self._superseded is not None:
            # Nobody reads it any more, and its memory is what the system gives to the new model's pages.
            self._superseded.file.evict()
            self._superseded = None
        if self._spill is None:
            self._spill = open_spill(self.config, self._store.run_id, layout)
        self._aggregation = Aggregation(
            self._link.exchange,
            layout,
            action.participants,
            peers,
            self._store.scratch(action.version),
            base=self._model,
            memory=self.config.server.memory,
            spill=self._spill,
            metadata=self._metadata(action.version),
        )
        self._status.aggregation = self._aggregation
        self._link.kick()

    def _metadata(self, version: int) -> dict[str, str]:
        return {"fedcore.run": self.config.run.name, "fedcore.version": str(version)}

    def _save(
        self,
        version: int,
        written: tuple[ModelFile, list[int], Path],
        participants: dict[str, int],
        seconds: float,
    ) -> None:
        """Commit a model, the checksums of its chunks and its scratch path as ``version``."""
        model, checksums, scratch = written
        row = VersionRow(
            version, _checksum_of(checksums), "", model.layout.total_bytes, seconds, participants
        )
        metrics = {known.site: known.metrics for known in self._peers.values()}
        self._store.commit(row, scratch, metrics, self._cards if version == 0 else None)
        self._model, self._checksums = model, checksums
        self._hasher.add(version, self._store.path(version), model.data_offset)
        self._status.refresh()

    def _commit(self, action: Commit) -> None:
        running, self._aggregation = self._aggregation, None
        self._status.aggregation = None
        assert running is not None
        written = (*running.finish(), running.scratch)
        weights = {p.site: p.weight for p in action.participants} if action.version else {}
        seconds = time.monotonic() - self._round_started
        previous, before = self._set_id, self._model
        self._save(action.version, written, weights, seconds)
        self._publish()
        if previous and before is not None:
            self._link.exchange.withdraw(previous)
            self._superseded = before
        names = [p.site for p in action.participants]
        if action.version:
            logger.info(
                "round %d of %d committed: %s, %.1f s, of which %.2f s to pull and reduce",
                action.version, self.config.run.rounds, ", ".join(names), seconds,
                time.monotonic() - running.started,
            )  # fmt: skip
        else:
            logger.info("initial model from %s: %s", names[0], self._describe())
        for peer, known in self._peers.items():
            self._link.send(
                peer,
                protocol.Commit(
                    version=action.version, included=known.site in names, participants=names
                ),
            )
        if failure := device_failure():
            self._device = use_device("cpu")
            logger.warning("the GPU failed; the CPU goes on with the same bits: %s", failure)
        self._export_best()
        self._do(self._rounds.committed(action.version, time.monotonic()))

    def _publish(self) -> None:
        assert self._model is not None
        self._set_id = uuid.uuid4().bytes
        model = self._model
        self._link.exchange.publish(
            self._set_id,
            model.file,
            model.data_offset,
            model.layout.total_bytes,
            model.layout.chunk_bytes,
            self._checksums,
        )

    def _describe(self) -> str:
        assert self._model is not None
        layout = self._model.layout
        return f"{len(layout.tensors)} tensors, {layout.total_bytes:,} bytes"

    # --- selection and the end ---

    def _best(self) -> int | None:
        chosen = self.config.selection
        if chosen.metric is None or chosen.mode is None:
            return None
        quorum = self.config.participants.quorum
        return best_version(self._store.scores(), chosen.metric, chosen.mode, quorum)

    def _export_best(self) -> int | None:
        """Write ``best/`` if another version leads now; returns the version that does."""
        best = self._best()
        if best is not None and best != self._status.best:
            self._store.export("best", best)
            if self._status.best is not None or best:
                logger.info("best model so far: round %d (%s)", best, self._metric_text(best))
            self._status.best = best
        return best

    def _metric_text(self, version: int) -> str:
        metric = self.config.selection.metric
        if metric is None:
            return "the last one, as no metric selects"
        value = weighted_metrics(self._store.scores().get(version, [])).get(metric)
        return f"{metric} unknown" if value is None else f"{metric} {value:.4f}"

    def _end(self, ok: bool, message: str) -> None:
        self._cancel_collect()
        self._spill = None
        version = self._store.last_version
        best = final = None
        chosen = None
        if version is not None:
            final = self._store.export("final", version)
            chosen = self._export_best()
            if chosen is None:
                chosen = version
                self._store.export("best", version)
                if self.config.selection.metric is not None:
                    logger.warning(
                        "no model was scored with %r by %d sites: best/ is the last model",
                        self.config.selection.metric, self.config.participants.quorum,
                    )  # fmt: skip
            best = self._store.folder / "best"
        if not ok:
            self._rounds.phase = Phase.FAILED
        self._result = RunResult(ok, version, chosen, best, final, message)
        self._status.best = chosen
        self._store.write_summary(self._summary(self._result))
        self._store.end(finished=ok)
        finish = protocol.Finish(ok=ok, message=message[:4096], best_version=chosen)
        for peer in self._peers:
            self._link.send(peer, finish)
        if ok:
            self._hasher.finish()
        else:
            self._hasher.stop()
        self._keep_digests()
        self._store.write_summary(self._summary(self._result))  # now with the digests
        (logger.info if ok else logger.error)(
            "the run %s%s", "is complete" if ok else "ended: " + message,
            "" if chosen is None else f"; best model: round {chosen}, {self._metric_text(chosen)}, in {best}",
        )  # fmt: skip
        self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Answer for a moment longer, so that every site and viewer hears of the end."""
        until = time.monotonic() + _GOODBYE_SECONDS
        while self._peers and time.monotonic() < until:
            try:
                arrived = self._link.recv(0.2)
            except KeyboardInterrupt:
                return
            if not isinstance(arrived, Control):
                continue
            try:
                message = protocol.decode_from_site(arrived.body)
            except ProtocolError:
                continue
            if isinstance(message, protocol.StatusRequest):
                self._reply_status(arrived.peer)
            elif isinstance(message, protocol.Leave):
                self._peers.pop(arrived.peer, None)

    def _reply_status(self, peer: bytes) -> None:
        reply = self._snapshot()
        try:
            self._link.send(peer, reply)
        except ProtocolError:  # more sites and rounds than one message holds
            short = {"versions": reply.versions[-1:], "sites": reply.sites[:1000]}
            self._link.send(peer, reply.model_copy(update=short))

    def _snapshot(self) -> protocol.StatusReply:
        stats = self._link.exchange.stats()
        return self._status.build(stats, self._result.message if self._result else "")

    def _summary(self, result: RunResult) -> dict[str, Any]:
        snapshot = self._snapshot()
        return {
            "run": self.config.run.name,
            "ok": result.ok,
            "message": result.message,
            "rounds": self.config.run.rounds,
            "best_version": result.best_version,
            "version": result.version,
            "metric": self.config.selection.metric,
            "mode": self.config.selection.mode,
            "bytes_in": snapshot.bytes_in,
            "bytes_out": snapshot.bytes_out,
            "seconds": snapshot.elapsed,
            "versions": [
                {
                    "version": row.version,
                    "sha256": row.sha256,
                    "bytes": row.nbytes,
                    "seconds": row.seconds,
                    "participants": dict(row.participants),
                    "metrics": weighted_metrics(self._store.scores().get(row.version, [])),
                    "metrics_by_site": {
                        s.site: {"examples": s.examples, **s.metrics}
                        for s in self._store.scores().get(row.version, [])
                    },
                }
                for row in self._store.versions()
            ],
            "sites": {
                m.name: {"state": str(SiteState(m.state)), "message": m.message}
                for m in self._rounds.roster
            },
        }
