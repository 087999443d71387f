"""What operators ask of a run: to pause, to go on, to end, to have a model scored.

The gates have a say in whether it goes on. They may take long: an operator is answered once they have answered.
"""

from __future__ import annotations

import logging

from fedcore import protocol
from fedcore.errors import IntegrityError, StorageError
from fedcore.server.rounds.actions import Action
from fedcore.server.rounds.steering import steer

from .acting import Acting
from .ending import Ending
from .parts import Parts
from .peers import name_of

__all__ = ["Commands"]

_MOST_WAITING = 16

logger = logging.getLogger("fedcore.server")


class Commands:
    """Carries out commands, and lets the next round begin once the gates allow it.

    Args:
        run: the run's parts.
        acting: carries out what follows from a command.
        ending: ends the run.
    """

    def __init__(self, run: Parts, acting: Acting, ending: Ending) -> None:
        self._run = run
        self._acting, self._ending = acting, ending
        self._waiting: list[bytes] = []  # who is answered once the gates have answered
        self._stays_paused = False  # also if the gates that are being asked allow the round

    def handle(self, peer: bytes, command: protocol.Command) -> None:
        """Carry out a command, and answer it."""
        actions: list[Action] = []
        version, now = self._run.rounds.version, self._run.clock.monotonic()
        if command.action == "stop":
            reply = self._on_stop()
        elif (
            command.action == "resume"
            and self._run.rounds.held
            and version is not None
            and not self._run.gates.allow(version + 1)
        ):
            self._stays_paused = False
            if len(self._waiting) < _MOST_WAITING:
                self._waiting.append(peer)
                return
            text = f"the run goes on if the gates allow it: {self._run.gates.state}"
            reply = protocol.CommandReply(ok=True, message=text)
        else:
            self._stays_paused = self._run.gates.asking and (
                self._stays_paused or command.action == "pause"
            )
            reply, actions = steer(self._run.rounds, command.action, now)
        self._answer(peer, command.action, reply)
        self._acting.do(actions)

    def look(self) -> None:
        """Let the round begin if the gates have allowed it.

        Raises:
            StorageError: the journal can't be written; the round does not begin.
        """
        allowed = self._run.gates.answer()
        if allowed is None:
            return
        actions: list[Action] = []
        if not allowed:
            text = f"the run stays paused: {self._run.gates.refusal}"
            reply = protocol.CommandReply(ok=False, message=text)
            actions = self._run.rounds.refuse("the round is refused, and the run is paused")
        elif self._stays_paused:
            reply = protocol.CommandReply(ok=False, message="the run was paused again")
        else:
            now = self._run.clock.monotonic()
            reply, actions = steer(self._run.rounds, "resume", now)
        self._stays_paused = False
        self._answer_waiting(reply)
        self._acting.do(actions)

    def dismiss(self, why: str) -> None:
        """Answer who waits for the gates: the run, or this server's work on it, ends before they have answered."""
        self._answer_waiting(protocol.CommandReply(ok=False, message=why))

    def _answer_waiting(self, reply: protocol.CommandReply) -> None:
        waiting, self._waiting = self._waiting, []
        for peer in waiting:
            self._answer(peer, "resume", reply)

    def _answer(self, peer: bytes, action: str, reply: protocol.CommandReply) -> None:
        self._run.replies.tell(
            name_of(peer, self._run.peers.get(peer)),
            "%s asks to %s: %s",
            action,
            reply.message,
            level=logging.INFO,
        )
        self._run.link.send(peer, reply)

    def _on_stop(self) -> protocol.CommandReply:
        """Write a stop down before it is answered: it holds also if this server is killed after the answer."""
        try:
            self._run.store.ask_stop()
        except (IntegrityError, StorageError) as error:
            logger.error("the run is not stopped: %s", error)
            text = "the server cannot write to its disk that the run is to end, so it goes on; its log says why"
            return protocol.CommandReply(ok=False, message=text)
        self._ending.stopping = True
        return protocol.CommandReply(ok=True, message="the run ends with what is committed")
