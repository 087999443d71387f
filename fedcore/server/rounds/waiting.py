"""Says in the log, once a minute, whom the run waits for and until when."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import Final

from .participation import Member, SiteState
from .rounds import Phase, Rounds

__all__ = ["WaitingLog", "waits"]

_INTERVAL: Final = 60.0
_NAMES: Final = 10

logger = logging.getLogger("fedcore.server")


class WaitingLog:
    """Looks at a run now and then; ``wall`` gives the time of day, which is shown and decides nothing."""

    def __init__(self, rounds: Rounds, wall: Callable[[], datetime] | None = None) -> None:
        self._rounds = rounds
        self._wall = wall or (lambda: datetime.now().astimezone())
        self._about: object = None
        self._next = 0.0
        self._joins_over = rounds.joins.over

    def look(self, now: float) -> None:
        """Write what is due; ``now`` is the clock of the rounds."""
        rounds = self._rounds
        if rounds.joins.over and not self._joins_over and rounds.roster.missing:
            logger.warning(
                "%s never joined: rounds do not wait for it any more (participants.join_timeout, or the round's "
                "deadline); it may still join",
                _absent(rounds),
            )
        self._joins_over = rounds.joins.over
        about = (rounds.phase, rounds.round)
        if about != self._about:
            self._about, self._next = about, now + _INTERVAL
        if now < self._next:
            return
        self._next = now + _INTERVAL
        text = waits(rounds, lambda until: self._time(until, now))
        if text:
            logger.info("%s", text)

    def _time(self, until: float, now: float) -> str:
        wall = self._wall()
        then = wall + timedelta(seconds=max(0.0, until - now))
        return f"{then:%H:%M:%S}" if then.date() == wall.date() else f"{then:%Y-%m-%d %H:%M:%S}"


def waits(rounds: Rounds, shown: Callable[[float], str]) -> str:
    """Return whom the run waits for and until when, ``shown`` as a time of day; nothing where it is for nobody."""
    if rounds.over or rounds.held or rounds.phase is Phase.AGGREGATING:
        return ""
    deadline = rounds.deadline
    if deadline is None:
        here = ", ".join(_few(m.name for m in rounds.roster if m.alive)) or "nobody"
        absent = _absent(rounds) or "nobody"
        return f"the run waits for a first site with a model; there: {here}; never joined: {absent}"
    working = [m for m in rounds.roster if _works(m, rounds)]
    groups = []
    if rounds.awaited:
        until = min(deadline, rounds.joins.until or deadline)
        groups.append(f"{_absent(rounds)} (never joined; until {shown(until)})")
    back = [m.name for m in rounds.roster if m.returning]
    if back and rounds.return_by is not None:
        groups.append(f"{', '.join(_few(back))} (to come back; until {shown(rounds.return_by)})")
    if working:
        names = ", ".join(_few(m.name for m in working))
        groups.append(f"{names} ({_doing(rounds)}; until {shown(deadline)})")
    lacking = rounds.lacking
    if not groups and not lacking:
        return ""
    there = f"{_what(rounds)} waits for {' and '.join(groups) or 'more sites'}"
    if lacking:
        gone = [m.name for m in rounds.roster if not m.alive and not m.returning]
        away = (
            f" while {', '.join(_few(gone))} are not there" if gone and not rounds.awaited else ""
        )
        there += (
            f"; {lacking} more than those there are needed (participants.min_results){away}, or the run ends at "
            f"{shown(deadline)}"
        )
    return there


def _works(member: Member, rounds: Rounds) -> bool:
    if not member.alive or not rounds.expects(member):
        return False
    return member.state in (SiteState.JOINED, SiteState.TRAINING, SiteState.UPLOADING)


def _doing(rounds: Rounds) -> str:
    return {Phase.INITIAL: "asked for the initial model", Phase.EVALUATING: "scoring"}.get(
        rounds.phase, "training"
    )


def _what(rounds: Rounds) -> str:
    if rounds.phase is Phase.INITIAL:
        return "the run"
    if rounds.phase is Phase.EVALUATING:
        return f"the scoring of model {rounds.version}"
    return f"round {rounds.round} of {rounds.rounds}"


def _absent(rounds: Rounds) -> str:
    """Return who never joined, as far as their names are known."""
    names = [m.name for m in rounds.roster if m.state is SiteState.ABSENT and not m.returning]
    others = rounds.roster.missing - sum(m.state is SiteState.ABSENT for m in rounds.roster)
    more = [f"{others} more site{'s' if others > 1 else ''}"] if others > 0 else []
    return ", ".join(_few(names) + more)


def _few(names: Iterable[str]) -> list[str]:
    listed = list(names)
    left = len(listed) - _NAMES
    return listed if left <= 0 else [*listed[:_NAMES], f"{left} others"]
