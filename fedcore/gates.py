"""What a gate is asked: may the next round of a run begin?

A gate is a function. ``server.gates`` of a run file names it::

    from fedcore.gates import RoundRequest

    def gate(request: RoundRequest) -> str | None:
        return "the budget is used up" if request.round > 10 else None

Unlike a listener (`fedcore.events`), a gate can stop something. So it is asked before, and it fails closed: an
error in it refuses the round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Gate", "RoundRequest"]


@dataclass(frozen=True, kw_only=True)
class RoundRequest:
    """A round of training that is about to begin.

    Attributes:
        run: name of the run.
        run_id: random id of the run; another one after ``fedcore rollback``.
        round: the round, from 1.
        rounds: how many rounds the run has.
    """

    run: str
    run_id: str
    round: int
    rounds: int


Gate: TypeAlias = Callable[[RoundRequest], str | None]
"""Returns None to let the round begin, or why it must not."""
