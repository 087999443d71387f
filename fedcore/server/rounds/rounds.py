"""The round state machine: what the server does next, decided without sockets, files or a clock.

The inputs of `Rounds` are events: a site joined, published or vanished, chunks were reduced, time passed. Its
outputs are actions for the process around it. The same calls with the same times give the same answers, so that
any fault can be replayed exactly in a test.

An update is pulled as soon as it is ready, ahead of those of sites that still train.

How a round closes: when every expected site has delivered, was taken out, or is gone, and at least ``quorum``
have delivered; at the deadline, when at least ``quorum`` have. A site that never joined is waited for until the
end of `JoinWait`, counted once, from the run's first task; it ends with the first deadline at the latest.
One that had joined before the server was started again is waited for until the time given to `Rounds.restarted`.
A server that was killed while it collected goes on with the same updates as soon as their sites have offered
them again, whoever else is there; where one of them does not come back, the round closes as any other.
With a ``sample``, only that many sites train in a round and are waited for. The choice is written down before the
first of them is asked, so that a server that is started again waits for the same sites.
With fewer than ``quorum`` at the deadline the run is given up; what was committed stays.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

from .actions import (
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
from .joining import JoinWait
from .participation import Delivery, Member, Roster, SiteState
from .sampling import Sample

__all__ = ["Phase", "Rounds"]


class Phase(enum.StrEnum):
    """Where the run stands."""

    WAITING = "waiting"
    INITIAL = "initial"
    TRAINING = "training"
    AGGREGATING = "aggregating"
    EVALUATING = "evaluating"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


class Rounds:
    """The state of one run.

    Args:
        roster: the members.
        rounds: how many rounds there are.
        quorum: how many valid updates a round needs.
        deadline: seconds that a round may take, from its first task on.
        version: the last committed model, or None if there is none yet.
        sample: how many sites train in a round, chosen by ``seed``; all of them if None.
        seed: of the choice.
        join_timeout: seconds from the run's first task on for which sites that never joined are waited for; none
            where a round is committed. Without one they are waited for up to the first deadline.
    """

    def __init__(
        self,
        roster: Roster,
        *,
        rounds: int,
        quorum: int,
        deadline: float,
        version: int | None = None,
        sample: int | None = None,
        seed: int = 0,
        join_timeout: float = math.inf,
    ) -> None:
        self.roster = roster
        self.joins = JoinWait(join_timeout, over=bool(version) and join_timeout < math.inf)
        self._sample = Sample(sample, seed)
        self.rounds = rounds
        self.quorum = quorum
        self.deadline_seconds = deadline
        self.version = version
        self.phase = Phase.WAITING if version is None else Phase.TRAINING
        if version is not None and version >= rounds:
            self.phase = Phase.EVALUATING
        self.collecting: tuple[Participant, ...] = ()
        self._left_out: frozenset[str] = frozenset()  # of those that are collected
        self.paused = False
        self._started: float | None = None
        self._return_by: float | None = None
        self._decided: tuple[Participant, ...] = ()

    # --- what is under way ---

    @property
    def round(self) -> int:
        """The round under way: the one that makes model ``version + 1``; the last one while evaluating."""
        if self.version is None:
            return 0
        return min(self.version + 1, self.rounds)

    @property
    def most(self) -> int:
        """How many updates a round's aggregate may hold."""
        return self._sample.size or self.roster.expected

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.phase in (Phase.DONE, Phase.STOPPED, Phase.FAILED)

    @property
    def deadline(self) -> float | None:
        """The time at which `tick` will act, or None while nobody was given a task."""
        return None if self._started is None or self.over else self._started + self.deadline_seconds

    @property
    def return_by(self) -> float | None:
        """Until when sites are waited for that had joined before the server was started again."""
        return self._return_by

    @property
    def awaited(self) -> int:
        """How many sites that have never joined are still waited for."""
        return 0 if self.joins.over else self.roster.missing

    @property
    def lacking(self) -> int:
        """How many updates the round needs beyond those that the sites that are there can give."""
        if self.phase is not Phase.TRAINING:
            return 0
        able = sum(m.returning or (m.alive and m.dropped_round != self.round) for m in self.roster)
        return max(0, self.quorum - able)

    def expects(self, member: Member) -> bool:
        """Whether the round waits for a site that is there."""
        return self.phase is not Phase.TRAINING or self._sample.includes(member)

    @property
    def held(self) -> bool:
        """Whether the run is paused and no round is under way."""
        return self.paused and self._started is None and not self.over

    # --- an operator ---

    def resume(self, now: float) -> list[Action]:
        """Go on after a pause."""
        held, self.paused = self.held, False
        if not held:
            return []
        if self.version is None:
            return self._choose_first(now)
        return self._begin(now) + self._take_up(now)

    def _take_up(self, now: float) -> list[Action]:
        """Go on with the updates that came while the run was held, as of a site that was started again."""
        delivered = self._delivered()
        if self.phase is not Phase.TRAINING or not delivered:
            return []
        self._start_clock(now)
        again = self._collect_decided()
        if again is not None:
            return [again]
        return self._close_if_due() or self._pull_ahead(delivered)

    def refuse(self, reason: str) -> list[Action]:
        """The round is refused that updates came for while the run was `held`: they do not count."""
        actions: list[Action] = []
        for member in self._delivered() if self.held else ():
            member.delivery = None
            member.state = SiteState.JOINED
            actions.append(SendDropped(member.name, self.round, reason))
        return actions

    def evaluate(self) -> list[Action]:
        """Have the last model scored while the run is `held`, by those who have not scored it."""
        actions: list[Action] = []
        for member in self.roster:
            if self.version is not None and member.alive and self.version not in member.scored:
                member.state = SiteState.TRAINING
                actions.append(SendTask(member.name, "evaluate", self.version))
        return actions

    # --- events ---

    def restarted(
        self,
        sites: Sequence[str],
        scored: Sequence[str],
        until: float,
        decided: Sequence[Participant] = (),
        chosen: Sequence[str] = (),
    ) -> None:
        """The server was started again in the middle of the run; call it before any other event.

        Args:
            sites: who had joined; whoever of them is not back at ``until`` counts as lost.
            scored: who has scored the last committed model.
            until: the time up to which they are waited for.
            decided: whose updates were being collected.
            chosen: the sites of the sample that were asked to train in this round.
        """
        self.roster.expect_back(sites)
        self._return_by = until
        self._decided = tuple(decided)
        self._take_up_choice(chosen)
        for site in scored:
            member = self._member(site)
            if member is not None and self.version is not None:
                member.scored.add(self.version)

    def _take_up_choice(self, chosen: Sequence[str]) -> None:
        """After a restart, go on with the sites that were chosen before it."""
        if self.version is not None:
            self._sample.begin([*chosen, *(participant.site for participant in self._decided)])

    @property
    def choice(self) -> int:
        """The round under which the choice of sites is noted that a server which is started again needs."""
        return (self.version or 0) + 1

    def joined(self, site: str, instance: str, now: float) -> list[Action]:
        """A site's process joined, or joined again; it was admitted before."""
        known = self.roster.get(site)
        before: list[Action] = []
        if known is not None and known.alive and known.instance != instance:
            before = self.lost(site, "another process took its place", now)
        member = self.roster.admit(site, instance)
        member.returning = False
        self._sample.joined(now)
        if not member.alive:
            member.state = SiteState.JOINED
            member.message = ""
        return before + self._assign(member, now)

    def declared(self, site: str, now: float) -> list[Action]:
        """A site has shown a model whose layout is the run's (or becomes it)."""
        member = self._member(site)
        if member is None or self.over:
            return []
        first = not member.declared
        member.declared = True
        return self._assign(member, now) if first and self.phase is Phase.WAITING else []

    def ready(self, site: str, round_: int, delivery: Delivery) -> list[Action]:
        """A site has published its update for ``round_`` (0: the initial model)."""
        member = self._member(site)
        if member is None or self.over:
            return []
        if member.delivery == delivery:
            return []
        if round_ == self.version and member.counted == delivery:
            return []  # sent again before the commit reached the site
        if self.phase is Phase.INITIAL and round_ == 0 and member.state is SiteState.TRAINING:
            member.delivery = delivery
            return [self._collect([member])]
        if self.phase not in (Phase.TRAINING, Phase.AGGREGATING) or round_ != self.round:
            return self._late(member, round_)
        if member.dropped_round == round_:
            return [SendDropped(site, round_, member.message)]
        if not self._sample.includes(member):
            return [SendDropped(site, round_, f"it was not chosen for round {round_}")]
        if self.phase is Phase.AGGREGATING and any(p.site == site for p in self.collecting):
            return []
        member.delivery = delivery
        member.state = SiteState.DELIVERED
        if self.phase is Phase.AGGREGATING:  # it counts only if too few of the others are left
            return []
        if self.held:  # nobody was asked for it: it waits for the round to begin
            return []
        again = self._collect_decided()
        if again is not None:
            return [again]
        return self._close_if_due() or self._pull_ahead([member])

    def scored(self, site: str, version: int) -> list[Action]:
        """A site has scored a global model."""
        member = self._member(site)
        if member is None or self.over:
            return []
        member.scored.add(version)
        if self.phase is Phase.EVALUATING and version == self.version:
            member.state = SiteState.DELIVERED
        elif self.held and member.state is SiteState.TRAINING:
            member.state = SiteState.JOINED
        return self._end_if_evaluated()

    def lost(self, site: str, reason: str, now: float, *, left: bool = False) -> list[Action]:
        """A site's process is gone: it fell silent, or it left."""
        member = self._member(site)
        if member is None or not member.alive:
            return []
        asked = member.state in (SiteState.TRAINING, SiteState.UPLOADING)
        member.state = SiteState.LEFT if left else SiteState.LOST
        member.message = reason
        member.declared = False
        member.delivery = None
        if self.over:
            return []
        if self.phase is Phase.INITIAL:
            if not asked:
                return []
            self.phase = Phase.WAITING
            self.collecting = ()
            return [HoldCollect(), *self._choose_first(now)]
        if self.phase is Phase.AGGREGATING and any(p.site == site for p in self.collecting):
            return [] if site in self._left_out else self._recollect(now)
        if self.phase is Phase.EVALUATING:
            return self._end_if_evaluated()
        return self._choose(now) + self._close_if_due()

    def rejected(self, site: str, reason: str, now: float) -> list[Action]:
        """The update that a site offers is invalid: the round goes on without it."""
        member = self._member(site)
        if (
            member is None or self.over or member.delivery is None
        ):  # what is gone is no longer offered
            return []
        member.delivery = None
        member.message = reason
        if self.phase is Phase.INITIAL:
            return self._pass_over(member, reason, now)
        member.state = SiteState.DROPPED
        member.dropped_round = self.round
        return [SendDropped(site, self.round, reason), *self._recollect(now)]

    def overdue(self, now: float) -> bool:
        """Whether updates are still pulled though the round's deadline has passed."""
        deadline = self.deadline
        return deadline is not None and now >= deadline and bool(self.collecting)

    def judged(self, left_out: Sequence[str]) -> None:
        """It is decided which of the updates that are collected do not count: their sites may go now."""
        self._left_out = frozenset(left_out)

    def too_slow(self, site: str, now: float) -> list[Action]:
        """A site that is pulled after the deadline sends too little: the round goes on without it, if it can."""
        others = [p for p in self.collecting if p.site != site]
        there = {member.name for member in self._delivered()}
        if self.phase is Phase.INITIAL:
            enough = any(
                m.alive and m.declared and not m.unfit and m.name != site for m in self.roster
            )
        else:
            enough = sum(p.site in there for p in others) >= self.quorum
        if not enough or len(others) == len(self.collecting):
            return []
        return self.rejected(
            site, "it came too slowly after the round's deadline (participants.round_deadline)", now
        )

    def reduced(self) -> list[Action]:
        """All chunks of the collection are reduced."""
        if self.phase not in (Phase.AGGREGATING, Phase.INITIAL) or not self.collecting:
            return []
        return [Commit(0 if self.version is None else self.version + 1, self.collecting)]

    def committed(self, version: int, now: float) -> list[Action]:
        """Model ``version`` is durable: the next round begins, or the last evaluation."""
        self.version = version
        counted = {p.site: Delivery(p.set_id, p.weight) for p in self.collecting}
        self.collecting = ()
        self._decided = ()
        self._started = None
        self.phase = Phase.TRAINING if version < self.rounds else Phase.EVALUATING
        self._sample.begin()
        present = [member for member in self.roster if member.alive]
        for member in self.roster:
            member.delivery = None
            member.counted = counted.get(member.name)
        for member in present:
            member.state = SiteState.JOINED
        return self._begin(now)

    def _begin(self, now: float) -> list[Action]:
        """Give their tasks to those who are there."""
        actions: list[Action] = []
        if self._sample.size is not None and self.phase is Phase.TRAINING:
            actions = self._choose(now)
        else:
            for member in self.roster:
                if member.alive:
                    actions += self._assign(member, now)
        return actions + (self._end_if_evaluated() if self.phase is Phase.EVALUATING else [])

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        if self._return_by is not None and now >= self._return_by:
            return self._stop_waiting(now)
        if self.joins.ends(now) and not self.over:
            return self._end_if_evaluated() or self._close_if_due()
        deadline = self.deadline
        if deadline is None or now < deadline:
            return [] if self._sample.chosen else self._choose(now)
        if self.phase is Phase.EVALUATING:
            return self._end()
        if self.phase is Phase.TRAINING:
            self.joins.end()
            delivered = self._delivered()
            if len(delivered) >= self.quorum:
                return [self._collect(delivered)]
            return self._fail(self._missing_text(f"at the deadline of round {self.round}"))
        if self.phase is Phase.INITIAL and not self.collecting:
            return self._ask_another(now)
        return []

    # --- decisions ---

    def _member(self, site: str) -> Member | None:
        return self.roster.get(site)

    def _assign(self, member: Member, now: float) -> list[Action]:
        """Give a site the task that it has not answered yet, if any."""
        if self.over or self.held:
            return []
        if self.version is None:
            if self.phase is Phase.INITIAL and member.state is SiteState.TRAINING:
                return [SendTask(member.name, "initial", 0)] if member.delivery is None else []
            return self._choose_first(now) if member.declared else []
        if self.phase is Phase.EVALUATING:
            if self.version in member.scored:
                member.state = SiteState.DELIVERED
                return self._end_if_evaluated()
            self._start_clock(now)
            member.state = SiteState.TRAINING
            return [SendTask(member.name, "evaluate", self.version)]
        if member.delivery is not None or member.dropped_round == self.round:
            return []
        if not self._sample.includes(member):
            return self._choose(now)
        return self._give_training(member, now)

    def _give_training(self, member: Member, now: float) -> list[Action]:
        self._start_clock(now)
        member.state = SiteState.TRAINING
        return [SendTask(member.name, "train", self.round)]

    def _choose(self, now: float) -> list[Action]:
        """Have those train who are chosen for this round, or in the place of a chosen site that was lost."""
        if self.phase is not Phase.TRAINING or self.held:
            return []
        found = self._sample.choose(self.roster, self.round, now)
        if not found:
            return []
        actions: list[Action] = [Choose(self.round, tuple(sorted(self._sample.chosen)))]
        for member in found:
            actions += self._give_training(member, now)
        return actions

    def _stop_waiting(self, now: float) -> list[Action]:
        """Count those as lost who have not come back since the server was started again."""
        self._return_by = None
        given_up: list[Action] = []
        for member in self.roster:
            if member.returning:
                member.returning = False
                member.state = SiteState.LOST
                member.message = "it did not come back after the server was started again"
                given_up.append(GiveUp(member.name, member.message))
        if self.over:
            return []
        withheld, self._decided = bool(self._decided), ()
        given_up += self._choose_first(now) if self.version is None else self._choose(now)
        decided = self._end_if_evaluated() or self._close_if_due()
        return given_up + (decided or self._pull_ahead(self._delivered() if withheld else []))

    def _start_clock(self, now: float) -> None:
        self.joins.start(now)
        if self._started is None:
            self._started = now

    def _choose_first(self, now: float) -> list[Action]:
        if self.phase is not Phase.WAITING or self.paused:
            return []
        before = {participant.site for participant in self._decided}
        if any(
            m.returning or (m.alive and not m.declared) for m in self.roster if m.name in before
        ):
            return []
        for member in sorted(self.roster, key=lambda m: m.name not in before):
            if member.alive and member.declared and not member.unfit:
                self.phase = Phase.INITIAL
                self.joins.start(now)
                self._started = now
                member.state = SiteState.TRAINING
                return self._assign(member, now)
        self._started = None
        return []

    def _pass_over(self, member: Member, reason: str, now: float) -> list[Action]:
        """A site's initial model is invalid: another site is asked, and the run ends once none is left to ask."""
        member.unfit = reason
        member.state = SiteState.JOINED
        self.phase = Phase.WAITING
        self.collecting = ()
        actions: list[Action] = [
            HoldCollect(),
            SendDropped(member.name, 0, f"the initial model is not usable: {reason}"),
        ]
        others = [m for m in self.roster if m.returning or m.state is not SiteState.ABSENT]
        if self.awaited == 0 and all(m.unfit for m in others):
            reasons = "; ".join(f"{m.name}: {m.unfit}" for m in others)
            return actions + self._fail(f"no site has a usable initial model: {reasons}")
        return actions + self._choose_first(now)

    def _ask_another(self, now: float) -> list[Action]:
        """The site that was asked for the initial model has not given it in time."""
        reason = "it gave no initial model before the deadline"
        asked = [member.name for member in self.roster if member.state is SiteState.TRAINING]
        actions: list[Action] = []
        for name in asked:
            actions += [GiveUp(name, reason), *self.lost(name, reason, now)]
        return actions

    def _delivered(self) -> list[Member]:
        return [m for m in self.roster if m.delivery is not None and m.alive]

    def _pull_ahead(self, members: Sequence[Member]) -> list[Action]:
        """Pull what is ready; not while the collection of a server that was killed may be gone on with."""
        if self.phase is not Phase.TRAINING or self.held or self._decided or self.version is None:
            return []
        return [PullAhead(self.version + 1, offer) for offer in _offers(members)]

    def _collect_decided(self) -> StartCollect | None:
        """Go on with the collection of the server before this one, once all of its updates are offered again."""
        members = [self.roster.get(participant.site) for participant in self._decided]
        here = [
            member
            for member, was in zip(members, self._decided, strict=True)
            if member is not None
            and member.alive
            and member.delivery == Delivery(was.set_id, was.weight)
        ]
        return self._collect(here) if here and len(here) == len(members) else None

    def _collect(self, members: Sequence[Member]) -> StartCollect:
        if self.phase is not Phase.INITIAL:
            self.phase = Phase.AGGREGATING
        self._decided = ()
        self.collecting, self._left_out = _offers(members), frozenset()
        for member in members:
            member.state = SiteState.UPLOADING
        return StartCollect(0 if self.version is None else self.version + 1, self.collecting)

    def _recollect(self, now: float) -> list[Action]:
        """Reduce again without a participant, or go on waiting if the quorum no longer stands."""
        before = {participant.site for participant in self.collecting}
        cancel: list[Action] = [HoldCollect()] if self.collecting else []
        self.collecting = ()
        if self.phase is Phase.AGGREGATING:
            self.phase = Phase.TRAINING
        for member in self._delivered():
            member.state = SiteState.DELIVERED
        left = [member for member in self._delivered() if member.name in before]
        if len(left) >= self.quorum:
            return [*cancel, self._collect(left)]
        deadline = self.deadline
        if deadline is not None and now >= deadline:
            return cancel + self.tick(now)
        return cancel + self._choose(now) + self._close_if_due()

    def _close_if_due(self) -> list[Action]:
        if self.phase is not Phase.TRAINING or self.held:
            return []
        delivered = self._delivered()
        if len(delivered) >= self.quorum and (self._sample.size is not None or self.awaited == 0):
            waited_for = sum(
                m.returning or (m.alive and m.state is not SiteState.DROPPED)
                for m in self.roster
                if self._sample.includes(m)
            )
            if len(delivered) == waited_for:
                return [self._collect(delivered)]
        round_ = self.round
        able = self.roster.expected - sum(m.dropped_round == round_ for m in self.roster)
        if able < self.quorum:
            return self._fail(self._missing_text(f"in round {self.round}"))
        return []

    def _late(self, member: Member, round_: int) -> list[Action]:
        text = f"the update for round {round_} came after that round had closed"
        return [SendDropped(member.name, round_, text)]

    def _end_if_evaluated(self) -> list[Action]:
        if self.phase is not Phase.EVALUATING or self.held:
            return []
        if any(m.returning or (m.alive and self.version not in m.scored) for m in self.roster):
            return []
        anyone = any(self.version in m.scored for m in self.roster)
        return self._end() if anyone or self._started is not None else []

    def _end(self) -> list[Action]:
        self.phase = Phase.DONE
        return [EndRun(True, "")]

    def _fail(self, message: str) -> list[Action]:
        cancel: list[Action] = [HoldCollect()] if self.collecting else []
        self.collecting = ()
        self.phase = Phase.FAILED
        return [*cancel, EndRun(False, message)]

    def _missing_text(self, when: str) -> str:
        def names(members: list[Member]) -> str:
            return (
                ", ".join(m.name + (f" ({m.message})" if m.message else "") for m in members)
                or "none"
            )

        delivered = self._delivered()
        others = [m for m in self.roster if m not in delivered]
        never = f"; {self.roster.missing} never joined" if self.roster.missing else ""
        return (
            f"{len(delivered)} of the {self.quorum} updates that a round needs (participants.min_results) "
            f"were there {when}; delivered: {names(delivered)}; not delivered: {names(others)}{never}"
        )


def _offers(members: Sequence[Member]) -> tuple[Participant, ...]:
    return tuple(
        Participant(m.name, m.delivery.set_id, m.delivery.weight) for m in members if m.delivery
    )
