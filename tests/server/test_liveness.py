"""Sites and servers come and go at random; nobody trains in vain, and once all are there the run comes to its end.

The round state machine is driven through drawn events without a clock or a socket. What the process does with its
actions, and what a site does with its tasks, is played here as `fedcore.server.run` and
`fedcore.site.session` do it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from fedcore.server.rounds.actions import (
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
from fedcore.server.rounds.participation import Delivery, Roster
from fedcore.server.rounds.rounds import Rounds

ROUNDS = 3
RETURN_SECONDS = 15
PATIENCE = 700  # events without a loss within which a run of at most four sites has ended
GAMES = range(400)


@dataclass
class Site:
    up: bool = False
    declared: bool = False
    process: int = 0
    task: tuple[str, int] | None = None
    update: tuple[int, Delivery] | None = None
    offers: int = -1
    """The process that announces it again whenever it has joined again."""


@dataclass
class Disk:
    """What of the server survives its process."""

    version: int | None
    members: set[str] = field(default_factory=set)
    scored: dict[int, set[str]] = field(default_factory=dict)
    decided: tuple[Participant, ...] = ()
    chosen: dict[int, tuple[str, ...]] = field(default_factory=dict)


class Game:
    """One run, with everything about it drawn from ``seed``."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        self.seed = seed
        self.names = ["a", "b", "c", "d"][: draw.randrange(2, 5)]
        self.sites = {name: Site() for name in self.names}
        self.sample = draw.choice([None, None, draw.randrange(1, len(self.names) + 1)])
        self.quorum = draw.randrange(1, (self.sample or len(self.names)) + 1)
        self.disk = Disk(None if draw.random() < 0.6 else 0)
        self.collecting = False
        self.over = False
        self.now = 0.0
        self.rounds = self.serve()

    def serve(self) -> Rounds:
        roster = Roster(self.names, None) if self.seed % 3 else Roster(None, len(self.names))
        return Rounds(
            roster,
            rounds=ROUNDS,
            quorum=self.quorum,
            deadline=1e9,  # never: the end must not be owed to it
            version=self.disk.version,
            sample=self.sample,
            seed=self.seed,
        )

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, SendTask) and self.sites[action.site].up:
                self.sites[action.site].task = (action.kind, action.round)
            elif isinstance(action, Choose):
                self.disk.chosen = {action.round: action.sites}
            elif isinstance(action, SendDropped):
                assert "not chosen" not in action.message, (action, self.disk)
                self.sites[action.site].update = None
            elif isinstance(action, StartCollect):
                self.collecting, self.disk.decided = True, action.participants
            elif isinstance(action, HoldCollect):
                self.collecting = False
            elif isinstance(action, Commit):
                self.collecting, self.disk.decided = False, ()
                self.disk.version = action.version
                for site in self.sites.values():
                    site.update = None
                self.do(self.rounds.committed(action.version, self.now))
            elif isinstance(action, EndRun):
                self.over = True

    # --- what happens ---

    def step(self, *, calm: bool) -> None:
        self.now += self.draw.random() * (1 if calm else 2)
        name, luck = self.draw.choice(self.names), self.draw.random()
        site = self.sites[name]
        if not calm and luck < 0.12 and site.up:
            self.lose(name, site)
        elif not calm and 0.12 <= luck < 0.17:
            self.kill_server()
        elif not site.up:
            site.up, site.declared, site.task = True, False, None
            self.disk.members.add(name)
            self.do(self.rounds.joined(name, str(site.process), self.now))
        elif self.collecting and self.draw.random() < 0.4:
            self.do(self.rounds.reduced())
        else:
            self.work(name, site)
        self.do(self.rounds.tick(self.now))

    def lose(self, name: str, site: Site) -> None:
        killed = self.draw.random() < 0.5
        site.up = False
        site.process += killed
        if self.disk.version is None or (killed and self.draw.random() < 0.4):
            site.update = None  # its disk went with it
        self.do(self.rounds.lost(name, "silent", self.now))

    def kill_server(self) -> None:
        disk = self.disk
        self.rounds, self.collecting = self.serve(), False
        for site in self.sites.values():
            site.up = False
        if disk.members:
            scored = () if disk.version is None else disk.scored.get(disk.version, ())
            until = self.now + RETURN_SECONDS
            chosen = disk.chosen.get(self.rounds.round, ())
            self.rounds.restarted(sorted(disk.members), sorted(scored), until, disk.decided, chosen)

    def work(self, name: str, site: Site) -> None:
        if not site.declared:
            site.declared = True
            self.do(self.rounds.declared(name, self.now))
            if site.update is not None and site.offers == site.process:
                self.do(self.rounds.ready(name, *site.update))
            return
        version, task = self.disk.version, site.task
        if task is None:
            return
        kind, round_ = task
        if kind == "evaluate":
            site.task = None
            self.score(name, round_)
        elif round_ == (0 if version is None else version + 1):
            site.task = None
            if kind == "train":
                self.score(name, round_ - 1)
            if site.update is None or site.update[0] != round_:
                site.update = round_, Delivery(f"{self.draw.getrandbits(120):032x}", 3)
            site.offers = site.process
            self.do(self.rounds.ready(name, round_, site.update[1]))

    def score(self, name: str, version: int) -> None:
        self.disk.scored.setdefault(version, set()).add(name)
        self.do(self.rounds.scored(name, version))


@pytest.mark.parametrize("seed", GAMES)
def test_a_run_ends_before_its_deadline_once_nothing_is_lost_any_more(seed: int) -> None:
    game = Game(seed)
    for _ in range(game.draw.randrange(5, 60)):
        if game.over:
            return
        game.step(calm=False)
    for _ in range(PATIENCE):
        if game.over:
            break
        game.step(calm=True)
    assert game.over, (game.rounds.phase, game.quorum, game.sample, game.sites, game.disk)
