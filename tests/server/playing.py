"""Round state machines, and what is said to them, for tests that replay them."""

from __future__ import annotations

import math

from fedcore.server.rounds.actions import Action, Participant, PullAhead, SendTask
from fedcore.server.rounds.participation import Delivery, Roster
from fedcore.server.rounds.rounds import Rounds

NOT_BACK = "it did not come back after the server was started again"


def machine(
    sites: list[str],
    *,
    quorum: int | None = None,
    version: int | None = 0,
    rounds: int = 2,
    join_timeout: float = math.inf,
) -> Rounds:
    return Rounds(
        Roster(sites, None),
        rounds=rounds,
        quorum=quorum or len(sites),
        deadline=100,
        version=version,
        join_timeout=join_timeout,
    )


def sampling(sites: list[str], sample: int, *, seed: int = 0, quorum: int | None = None) -> Rounds:
    return Rounds(
        Roster(sites, None),
        rounds=50,
        quorum=quorum or sample,
        deadline=100,
        version=0,
        sample=sample,
        seed=seed,
    )


def trained(actions: list[Action]) -> list[str]:
    return sorted(a.site for a in actions if isinstance(a, SendTask) and a.kind == "train")


def update(site: str) -> Delivery:
    return Delivery(f"{ord(site[0]):032x}", 5)


def part(site: str) -> Participant:
    return Participant(site, update(site).set_id, 5)


def ahead(site: str, version: int = 1) -> list[Action]:
    return [PullAhead(version, part(site))]


def collecting(names: str) -> tuple[Participant, ...]:
    return tuple(part(name) for name in names)


def join_all(rounds: Rounds, *sites: str) -> None:
    for site in sites:
        assert rounds.joined(site, site, 0) == [SendTask(site, "train", 1)]
