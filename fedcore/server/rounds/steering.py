"""What an operator's commands do to a run."""

from __future__ import annotations

from typing import Literal

from fedcore import protocol
from fedcore.words import plural

from .actions import Action
from .rounds import Rounds

__all__ = ["steer"]


def steer(
    rounds: Rounds, action: Literal["pause", "resume", "evaluate"], now: float
) -> tuple[protocol.CommandReply, list[Action]]:
    """Carry out a command; returns the answer to the operator and what follows from it."""
    if rounds.over:
        return protocol.CommandReply(ok=False, message="the run is over"), []
    if action == "pause":
        rounds.paused = True
        when = "now" if rounds.held else f"after round {rounds.round}, which is under way"
        return protocol.CommandReply(ok=True, message=f"paused {when}"), []
    if action == "resume":
        actions = rounds.resume(now)
        return protocol.CommandReply(ok=True, message="the rounds go on"), actions
    if rounds.version is None:
        text = (
            "there is no model yet that could be scored; `fedcore status` shows who is waited for"
        )
        return protocol.CommandReply(ok=False, message=text), []
    if not rounds.held:
        text = (
            "every model is scored when its successor's round begins; to have it scored in between, pause "
            "first, and ask again once the round under way is committed"
        )
        return protocol.CommandReply(ok=False, message=text), []
    actions = rounds.evaluate()
    if not actions:
        return protocol.CommandReply(
            ok=True, message=f"all sites that are there have scored model {rounds.version}"
        ), []
    verb = "now scores" if len(actions) == 1 else "now score"
    text = f"{plural(len(actions), 'site')} {verb} model {rounds.version}; --wait shows the result"
    return protocol.CommandReply(ok=True, message=text), actions
