"""What a run does of what its plan has decided: tasks, collections, commits."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Final

from fedcore import protocol
from fedcore._device import device_failure, use_device
from fedcore.errors import StorageError
from fedcore.events import (
    FactorsMeasured,
    RoundStarted,
    SiteLost,
    SitesChosen,
    UpdatesJudged,
)
from fedcore.server.rounds.actions import (
    Action,
    Choose,
    Commit,
    EndRun,
    GiveUp,
    HoldCollect,
    Participant,
    PullAhead,
    SendDropped,
    SendTask,
    StartCollect,
)
from fedcore.server.rounds.verdicts import Verdict
from fedcore.server.storage.store import VersionRow

from .ending import Ending
from .parts import Parts
from .rule import rule_of

__all__ = ["Acting"]

_SEED_STRIDE: Final = 1_000_003  # more than the rounds of any run

logger = logging.getLogger("fedcore.server")


def round_seed(seed: int, round_: int) -> int:
    """Return what a round's tasks draw random numbers from: another for each round, and each seed of a run."""
    return seed * _SEED_STRIDE + round_


def _left_out(verdict: Verdict | None, site: str) -> str:
    """Return what a site is told whose update a rule has left out; else an empty text."""
    if verdict is None or site not in verdict.left_out:
        return ""
    rule = verdict.rule.split()[0]
    return f"the rule {rule} has left this site's update out: {verdict.why(site)}"


class Acting:
    """Carries out the actions of a run's plan.

    Args:
        run: the run's parts.
        ending: how it ends.
        device: where means are computed, in words.

    Attributes:
        device: as given, or the CPU once the GPU has failed.
    """

    def __init__(self, run: Parts, ending: Ending, device: str) -> None:
        self._run = run
        self._ending = ending
        self.device = device
        self._round_begun, self._round_started = -1, run.clock.monotonic()

    def do(self, actions: list[Action]) -> None:
        """Carry out actions, in their order."""
        for action in actions:
            self._do_one(action)

    def _do_one(self, action: Action) -> None:
        if isinstance(action, Choose):
            self._run.store.choose(action.round, action.sites)
            if self._run.config.participants.sample is not None:
                self._run.emit(SitesChosen(round=action.round, sites=tuple(action.sites)))
        elif isinstance(action, SendTask):
            self._send_task(action)
        elif isinstance(action, SendDropped):
            self._run.peers.send_to(
                action.site, protocol.Dropped(round=action.round, message=action.message[:4096])
            )
            logger.debug("%s: %s", action.site, action.message)
        elif isinstance(action, GiveUp):
            self._run.emit(SiteLost(site=action.site, reason=action.message, how="lost"))
        elif isinstance(action, PullAhead):
            self._pull_ahead(action)
        elif isinstance(action, StartCollect):
            self._start_collect(action)
        elif isinstance(action, HoldCollect):
            self._run.collecting.park()
        elif isinstance(action, Commit):
            self.commit(action)
        elif isinstance(action, EndRun):
            message = self._run.outcome.early_end if action.ok else action.message
            self._ending.end("complete" if action.ok else "failed", message)

    def _send_task(self, action: SendTask) -> None:
        if action.round != self._round_begun:
            self._round_begun = action.round
            self._round_started = self._run.clock.monotonic()
            self._run.emit(RoundStarted(round=action.round))
            self._run.collecting.look_at_room(action.round)
        task = protocol.Task(
            kind=action.kind,
            round=action.round,
            rounds=self._run.rounds.rounds,
            version=action.version,
            seed=round_seed(self._run.config.run.seed, action.round),
        )
        if self._run.versions.model is not None:
            listed, packed = self._run.versions.described()
            set_id, checksum = self._set_id_for(action.site), self._run.versions.checksum
            if action.kind == "submit":  # also after others' models have been committed
                set_id, checksum = self._run.versions.first_set()
            task = task.model_copy(
                update={
                    "included": self._run.versions.included.get(action.site),
                    "checksum": checksum,
                    "sets": [
                        protocol.OpenSet.model_construct(
                            id=set_id.hex(),
                            layout=self._run.versions.layout_hash,
                            tensors=listed,
                            packed=packed,
                        )
                    ],
                }
            )
        self._run.peers.send_to(action.site, task)

    def _set_id_for(self, site: str) -> bytes:
        found = self._run.peers.of_site(site)
        unpacks = found is not None and "lossless" in found[1].features
        return self._run.versions.packed_id if unpacks else self._run.versions.set_id

    def _pull_ahead(self, action: PullAhead) -> None:
        self._run.collecting.pull_ahead(action, self._run.peers.addresses, self._run.rounds.most)

    def _start_collect(self, action: StartCollect) -> None:
        done = self._run.collecting.start(
            action, self._run.peers.addresses, self._run.declaring.declared
        )
        self._note_judged()
        if done:
            self.go_on()

    def go_on(self) -> None:
        """Go on once all chunks are reduced, or surveyed: then it is decided which updates count.

        Raises:
            RuleError: none of them counts.
            StorageError: the journal or the new model can't be written.
        """
        if not self._run.collecting.surveyed:
            self.do(self._run.rounds.reduced())
            return
        self._run.collecting.judge()
        self._note_judged()

    def _note_judged(self) -> None:
        """Say which updates count, where that is decided anew; the sites of the others may go."""
        judged = self._run.collecting.judged
        if judged is None:
            return
        self._run.rounds.judged(judged.left_out)
        verdict = self._run.collecting.new_verdict()
        if verdict is not None:
            self._weigh(verdict.participants, self._run.rounds.round)
            self._run.emit(
                UpdatesJudged(
                    round=self._run.rounds.round,
                    weights={p.site: p.weight for p in verdict.kept},
                    scores=verdict.scores,
                    measure=verdict.decision.measure,
                    base=verdict.decision.base,
                )
            )

    def commit(self, action: Commit) -> None:
        """Commit the version whose chunks are all reduced, and tell the sites."""
        running = self._run.collecting.take()
        try:
            running.check_base()
        except StorageError as error:
            raise self._run.versions.damaged(str(error)) from None
        try:
            self._run.versions.optimizer.check()
        except StorageError as error:
            running.cancel()  # what was made with a damaged state is not gone on with
            raise self._run.versions.damaged(str(error)) from None
        model, checksums = self._run.versions.whole(action.version, *running.finish())
        verdict = self._run.collecting.verdict(action.version)
        participants = action.participants if verdict is None else verdict.kept
        weights = {p.site: float(p.weight) for p in participants}
        if verdict is None:
            weights = self._weigh(action.participants, action.version) if action.version else {}
        seconds = self._run.clock.monotonic() - self._round_started
        measured = self._run.versions.factors.measure() if action.version else None
        row = VersionRow(
            action.version, "", "", model.layout.total_bytes, seconds, weights, verdict, measured
        )
        metrics = {known.site: known.metrics for _, known in self._run.peers}
        if action.version == 0:
            self._run.store.keep_initial_site(action.participants[0].site)
        self._run.versions.commit(row, (model, checksums), metrics, running.scratch.states)
        names = [p.site for p in participants]
        collected = self._run.clock.monotonic() - running.started
        self._run.emit_commit(row, collected, "" if action.version else names[0])
        if measured is not None:
            self._run.emit(FactorsMeasured(round=action.version, **measured.status.model_dump()))
        if action.version:
            self._check_scored(action.version - 1, names)
        for peer, known in self._run.peers:
            self._run.link.send(
                peer,
                protocol.Commit(
                    version=action.version,
                    included=known.site in names,
                    participants=names,
                    message=_left_out(verdict, known.site),
                ),
            )
        if failure := device_failure():
            self.device = use_device("cpu")
            logger.warning("the GPU failed; the CPU goes on with the same bits: %s", failure)
        if early := self._run.outcome.early_end:
            logger.info("no round follows round %d: %s", action.version, early)
            self._run.rounds.rounds = action.version
        self.ask_gates(action.version)
        self.do(self._run.rounds.committed(action.version, self._run.clock.monotonic()))
        if self._ending.result is None:
            self._run.store.settle()  # the tasks leave first: reading a large model takes seconds
            self._export_best()
            self._run.outcome.prune()

    def _weigh(self, participants: Sequence[Participant], round_: int) -> dict[str, float]:
        """Return the effective weights of a round's participants, and say whose share was bounded."""
        weighing = rule_of(self._run.config).weighing
        found = weighing.of([p.weight for p in participants])
        if weighing.max_share is not None:
            total = sum(p.weight for p in participants)
            for participant, weight in zip(participants, found, strict=True):
                if weight < participant.weight:
                    logger.info(
                        "round %d: %s counts for %.4g %% by aggregation.max_share; its examples are %.4g %%",
                        round_, participant.site, 100 * weight / sum(found),
                        100 * participant.weight / total,
                    )  # fmt: skip
        return {p.site: weight for p, weight in zip(participants, found, strict=True)}

    def _export_best(self) -> None:
        before = self._run.outcome.best
        self._run.outcome.export_best()
        self._run.emit_best(before)

    def ask_gates(self, version: int) -> None:
        """Pause the run until its gates allow the round after a version; call it before the plan begins that one.

        They are asked aside; `Commands.look` goes on with the run.
        """
        rounds = self._run.rounds
        if version < rounds.rounds and not rounds.paused and not self._run.gates.allow(version + 1):
            self._run.rounds.paused = True

    def _check_scored(self, version: int, sites: Collection[str]) -> None:
        """Name the sites that trained from a model without a score of it, where a metric selects."""
        if self._run.config.selection.metric is None or self._run.config.run.task != "train":
            return
        scored = {score.site for score in self._run.store.scores().get(version, [])}
        for site in sorted({*sites} - scored):
            self.check_metrics(site, version, ())

    def check_metrics(self, site: str, version: int, metrics: Collection[str]) -> None:
        """Say at once, and not after the last round, if a site's metrics select nothing."""
        problem = self._run.outcome.metric_problem(site, version, metrics)
        if problem:
            self._run.report(site, problem)
