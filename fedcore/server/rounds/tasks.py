"""Runs that do not average: score a given model, ask it for outputs, or compare the sites' own models.

State machines beside `fedcore.server.rounds.rounds`, with the same events and actions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypedDict

from fedcore.config import RunConfig

from .actions import (
    Action,
    Choose,
    Commit,
    EndRun,
    HoldCollect,
    Participant,
    SendDropped,
    SendTask,
    StartCollect,
)
from .participation import Delivery, Member, Roster, SiteState
from .rounds import Phase, Rounds

__all__ = ["Comparing", "Scoring", "make_rounds"]


class _Common(TypedDict):
    quorum: int
    deadline: float
    version: int | None
    join_timeout: float


def make_rounds(
    config: RunConfig, roster: Roster, version: int | None, *, over: bool = False
) -> Rounds:
    """Return the state machine of a run's task; ``version`` is the last committed model, if there is one.

    ``over``: no round follows the one that made it.
    """
    people, task = config.participants, config.run.task
    common = _Common(
        quorum=people.quorum,
        deadline=people.round_deadline,
        version=version,
        join_timeout=people.join_timeout,
    )
    if task in ("evaluate", "infer"):
        return Scoring(roster, kind=task, **common)
    if task == "compare":
        return Comparing(roster, sites=config.site_names, **common)
    rounds = config.run.rounds if version is None or not over else version
    return Rounds(roster, rounds=rounds, sample=people.sample, seed=config.run.seed, **common)


class Scoring(Rounds):
    """Every site scores the given model, or answers with outputs of it; then the run is over.

    It waits for all sites up to the deadline, and is complete if at least ``quorum`` have answered then. A site
    that never joined is waited for up to the join timeout; where fewer have answered, all are up to the deadline.

    Args:
        kind: the task that sites get.
    """

    def __init__(
        self,
        roster: Roster,
        *,
        kind: Literal["evaluate", "infer"],
        quorum: int,
        deadline: float,
        version: int | None = None,
        join_timeout: float = math.inf,
    ) -> None:
        super().__init__(
            roster,
            rounds=0,
            quorum=quorum,
            deadline=deadline,
            version=version,
            join_timeout=join_timeout,
        )
        self._kind = kind

    def _assign(self, member: Member, now: float) -> list[Action]:
        return [
            replace(action, kind=self._kind) if isinstance(action, SendTask) else action
            for action in super()._assign(member, now)
        ]

    def _end_if_evaluated(self) -> list[Action]:
        short = len(self._answered()) < self.quorum
        if self.awaited or short:
            return []
        return super()._end_if_evaluated()

    def _answered(self) -> list[str]:
        return [m.name for m in self.roster if self.version in m.scored]

    def _end(self) -> list[Action]:
        answered = self._answered()
        if len(answered) >= self.quorum:
            return super()._end()
        others = [
            m.name + (f" ({m.message})" if m.message else "")
            for m in self.roster
            if m.name not in answered
        ]
        never = f"; {self.roster.missing} never joined" if self.roster.missing else ""
        return self._fail(
            f"{len(answered)} of the {self.quorum} sites that the run needs (participants.min_results) answered; "
            f"without an answer: {', '.join(others) or 'none'}{never}"
        )


class Comparing(Rounds):
    """Every site submits a model of its own, and each of them is scored at every site.

    The submissions are trained at the same time, each from version 0. Once all are there, or at the deadline with
    at least ``quorum`` of them, they are pulled one after the other: that of the site at place *i* of the sorted
    names becomes version *i*, unchanged, and is scored by all before the next is pulled.

    A site that had submitted and is gone is asked for its model again once it is back. Where fewer than ``quorum``
    models are there without it, it is waited for, up to the deadline of the step.
    """

    def __init__(
        self,
        roster: Roster,
        *,
        sites: Sequence[str],
        quorum: int,
        deadline: float,
        version: int | None = None,
        join_timeout: float = math.inf,
    ) -> None:
        super().__init__(
            roster,
            rounds=len(sites),
            quorum=quorum,
            deadline=deadline,
            version=version,
            join_timeout=join_timeout,
        )
        self._places = {name: place for place, name in enumerate(sorted(sites), 1)}
        self._closed = bool(version)
        if self._closed:
            self.phase = Phase.EVALUATING
        self._committed = version or 0  # models; after a restart as many as there can be
        self._submitted: set[str] = set()  # whose models are to be pulled yet, once closed
        self._asked_again: set[str] = set()

    @property
    def choice(self) -> int:
        """The first step's number: it is noted there whose models are compared."""
        return 1

    # --- events ---

    def _take_up_choice(self, chosen: Sequence[str]) -> None:
        """After a restart, pull the models of those who had submitted one when the first one was committed."""
        super()._take_up_choice(())
        if self._closed:
            self._submitted = set(chosen)

    def ready(self, site: str, round_: int, delivery: Delivery) -> list[Action]:
        """A site has published the model that it submits, or the initial one."""
        member = self._member(site)
        if member is None or self.over or member.delivery == delivery:
            return []
        if self.phase is Phase.INITIAL:
            return super().ready(site, round_, delivery)
        if round_ != self._places[site] or round_ <= self._reached:
            return self._late(member, round_)
        if member.dropped_round == round_:
            return [SendDropped(site, round_, member.message)]
        member.delivery = delivery
        member.state = SiteState.DELIVERED
        if self._closed:
            self._submitted.add(site)
        if site in self._asked_again and self.phase is Phase.EVALUATING:
            self._asked_again.discard(site)
            return self._assign(member, self._started or 0.0)
        self._asked_again.discard(site)
        return self._close_if_due()

    def rejected(self, site: str, reason: str, now: float) -> list[Action]:
        """A site's model is invalid: the comparison goes on without it."""
        member = self._member(site)
        if member is None or self.over:
            return []
        if self.phase is Phase.INITIAL:
            return super().rejected(site, reason, now)
        place = self._places[site]
        self._submitted.discard(site)
        member.delivery = None
        member.message = reason
        member.state = SiteState.DROPPED
        member.dropped_round = place
        return [SendDropped(site, place, reason), *self._recollect(now)]

    def reduced(self) -> list[Action]:
        """All chunks of a model are here."""
        if self.phase is not Phase.AGGREGATING or not self.collecting:
            return super().reduced()
        commit = Commit(self._places[self.collecting[0].site], self.collecting)
        return (
            [commit]
            if self.version
            else [Choose(self.choice, tuple(sorted(self._submitted))), commit]
        )

    def committed(self, version: int, now: float) -> list[Action]:
        """Model ``version`` is durable: all score it."""
        if version == 0:
            return super().committed(version, now)
        for participant in self.collecting:
            member = self._member(participant.site)
            if member is not None:
                member.delivery = None
        self._submitted.difference_update(p.site for p in self.collecting)
        self._committed += len(self.collecting)
        self.version = version
        self.collecting = ()
        self._started = now if self._asked_again else None
        self.phase = Phase.EVALUATING
        present = [m for m in self.roster if m.alive and m.name not in self._asked_again]
        actions: list[Action] = []
        for member in present:
            actions += self._assign(member, now)
        return actions + self._end_if_evaluated()

    # --- decisions ---

    def _assign(self, member: Member, now: float) -> list[Action]:
        if not self.over and member in self._missed():
            if self.phase is Phase.EVALUATING:
                self._start_clock(now)
            self._asked_again.add(member.name)
            member.state = SiteState.TRAINING
            return [SendTask(member.name, "submit", self._places[member.name])]
        if self.over or self.version is None or self.phase is Phase.EVALUATING:
            return super()._assign(member, now)
        if self._closed or member.delivery is not None or member.dropped_round > 0:
            return []
        self._start_clock(now)
        member.state = SiteState.TRAINING
        return [SendTask(member.name, "submit", self._places[member.name])]

    def _collect(self, members: Sequence[Member]) -> StartCollect:
        if self.phase is Phase.INITIAL:
            return super()._collect(members)
        first = min(members, key=lambda member: self._places[member.name])
        assert first.delivery is not None
        if not self._closed:
            self._submitted = {member.name for member in members}
        self._closed = True
        self._started = None
        self.phase = Phase.AGGREGATING
        first.state = SiteState.UPLOADING
        self.collecting = (Participant(first.name, first.delivery.set_id, first.delivery.weight),)
        return StartCollect(self._places[first.name], self.collecting)

    def _close_if_due(self) -> list[Action]:
        return [] if self._closed else super()._close_if_due()

    def _pull_ahead(self, members: Sequence[Member]) -> list[Action]:  # noqa: ARG002
        """They are pulled one after the other."""
        return []

    def _recollect(self, now: float) -> list[Action]:
        cancel: list[Action] = [HoldCollect()] if self.collecting else []
        self.collecting = ()
        if self._waits():
            self.phase = Phase.EVALUATING
            self._start_clock(now)
            return cancel
        return cancel + self._end()

    def _missed(self) -> list[Member]:
        """Return the sites that had submitted a model that is to be pulled yet, and do not offer it now."""
        return [
            m
            for m in self.roster
            if m.name in self._submitted
            and m.delivery is None
            and self._places[m.name] > self._reached
        ]

    @property
    def _reached(self) -> int:
        """The place of the last model that is committed or pulled: the others' turn is over."""
        return max([self.version or 0, *(self._places[p.site] for p in self.collecting)])

    def _waits(self) -> bool:
        """Whether a model that is missed is the next one, and the comparison needs it."""
        places = [self._places[m.name] for m in self._delivered()]
        ahead = [place for place in places if place > (self.version or 0)]
        missed = [self._places[m.name] for m in self._missed()]
        short = self._committed + len(ahead) < self.quorum
        return short and bool(missed) and min(missed) < min(ahead, default=math.inf)

    def _end_if_evaluated(self) -> list[Action]:
        if self.phase is Phase.EVALUATING and self._waits():
            return []
        return super()._end_if_evaluated()

    def _end(self) -> list[Action]:
        """Go on with the next model, or end where there is none; what is missed now stays out."""
        if self.paused:
            self._started = None
            return []
        delivered = [
            member
            for member in self._delivered()
            if self._places[member.name] > (self.version or 0)
        ]
        if delivered:
            return [self._collect(delivered)]
        if self._return_by is not None:  # a site that has one may still come back
            return []
        if not self.version:
            return self._fail("no site submitted a usable model")
        self.phase = Phase.DONE
        return [EndRun(True, "")]
