"""The end of a run: what it leaves behind, and the last words to its sites and viewers."""

from __future__ import annotations

import logging
from typing import Final

from fedcore import protocol
from fedcore.errors import FedcoreError
from fedcore.events import (
    RunEnded,
)
from fedcore.server.rounds.participation import SiteState
from fedcore.server.rounds.rounds import Phase
from fedcore.server.storage.readme import notes

from .goodbye import Goodbye, Patience
from .outcome import Ending as How
from .outcome import RunResult
from .parts import Parts
from .status import Watchers, within_a_message

__all__ = ["GIVEN_UP", "Ending"]

_LAST_PHASE: Final = {
    "complete": Phase.DONE,
    "stopped": Phase.STOPPED,
    "failed": Phase.FAILED,
}
GIVEN_UP: Final = (
    "an error has ended the work on this run; it goes on once the server is started again"
)

logger = logging.getLogger("fedcore.server")


class Ending:
    """Ends a run, and answers until its sites know of it.

    Args:
        run: the run's parts.

    Attributes:
        result: how the run ended; None while it goes on.
        over: whether it has ended, and nobody is waited for any more.
        error: what ended the server's work on it; None if nothing did.
        left: whether this process has left it to the next one.
        stopping: whether a stop was asked for.
        interrupted: what ends this process, such as a signal's name; empty if nothing does.
        requests: how often one of both was asked for.
        linger: seconds after the end within which sites that do not know of it may still ask.
        goodbye: what answers once the run has ended; None before.
        next_look: when that looks at the sites next.
        status_bytes: how large the last answer to a status request was.
    """

    def __init__(self, run: Parts) -> None:
        self._run = run
        self.result: RunResult | None = None
        self.over = False
        self.error: Exception | None = None
        self.left = False
        self.stopping = False
        self.interrupted = ""
        self.requests = 0
        self.linger = 0.0
        self.goodbye: Goodbye | None = None
        self.next_look = 0.0
        self.status_bytes = 0
        self._says_end_again = False
        self._last_status: protocol.StatusReply | None = None
        self._watchers = Watchers(run.clock)

    @property
    def idle(self) -> bool:
        """Whether this process does nothing for the run any more, though it has not ended."""
        return self.left or self.error is not None

    def end(self, ending: How, message: str) -> None:
        """End the run: write what it leaves behind, and tell the sites."""
        requests = self.requests
        self._run.store.settle()  # before folders and a summary that follow from its rows
        self._run.collecting.close()
        best = self._run.outcome.best
        self.result = result = self._run.outcome.conclude(ending, message)
        ok = result.ok
        self._run.rounds.phase = _LAST_PHASE[ending]
        self._run.outcome.write_summary(result, self._snapshot())
        self._run.store.end(finished=ok)
        self._run.emit_best(best)
        goodbye = self._tell_end(ending, message, requests)
        self._run.versions.finish_digests(wait=ok)
        self._run.outcome.prune()
        self._run.outcome.write_summary(result, self._snapshot())  # now with the digests
        if self._run.config.run.task != "train":
            logger.info("results: %s", self._run.outcome.write_results(result))
        self._emit_end(result, ending)
        for note in () if result.best is None else notes(self._run.store.files()):
            logger.info("before you use %s: %s", result.best, note)
        self.say_goodbye(goodbye)

    def end_again(self) -> None:
        """The run was complete, but the server before this one was killed in its last words: say them again."""
        sites = self._run.store.members()
        self.result = self._run.outcome.conclude("complete", "")
        self._run.rounds.phase = Phase.DONE
        self._emit_end(self.result, "complete")
        logger.info("the run is complete; telling %s, who may not know yet", ", ".join(sites))
        self.linger_for_return()
        self.say_goodbye(self._tell_end("complete", "", self.requests))

    def linger_for_return(self) -> None:
        """Stay at the end of the run until the sites have noticed that this server is here."""
        self.linger = max(
            self.linger, self._run.config.participants.idle_timeout + protocol.RETURN_SECONDS
        )
        self._says_end_again = True

    def _emit_end(self, result: RunResult, ending: How) -> None:
        self._run.emit(
            RunEnded(
                outcome=ending,
                message=result.message,
                version=result.version,
                best_version=result.best_version,
                best=None if result.best is None else str(result.best),
                metric=self._run.config.selection.metric,
                value=self._run.outcome.score(result.best_version),
            )
        )

    def _tell_end(self, ending: How, message: str, requests: int) -> Goodbye:
        """Tell the sites of the end; a signal after ``requests`` others ends the wait for them."""
        assert self.result is not None
        finish = protocol.Finish(
            ok=ending == "complete",
            outcome=ending,
            message=message[:4096],
            best_version=self.result.best_version,
        )
        at_once = ending == "stopped" and not self._says_end_again
        return Goodbye(
            (self._run.link, self._run.clock),
            self._run.peers,
            finish,
            Patience(
                leave=self._run.timing.goodbye,
                linger=0.0 if at_once else self.linger,
                idle=self._run.config.participants.idle_timeout,
                hurried=lambda: self.requests != requests,
                watched=lambda: self._watchers.present,
                expected=self._members_there,
            ),
            forget=self._run.store.forget_members,
        )

    def say_goodbye(self, goodbye: Goodbye) -> None:
        """Answer for a moment longer, so that the end reaches every site and viewer."""
        self.goodbye = goodbye
        self.next_look = 0.0

    def look(self) -> None:
        """Look at who knows of the end, once the run has ended."""
        if self.goodbye is None:
            return
        if self.goodbye.look() and not self.over:
            self._part(self.goodbye)
        self.next_look = self.goodbye.next_look

    def _members_there(self) -> set[str]:
        """Return the sites that joined the run, and have not left it."""
        left = {m.name for m in self._run.rounds.roster if m.state is SiteState.LEFT}
        return set(self._run.store.members()) - left

    def _part(self, goodbye: Goodbye) -> None:
        """Note on disk whom the next server need not tell of the end."""
        assert self.result is not None
        members, untold = set(self._run.store.members()), goodbye.untold
        if untold and goodbye.patience.linger:
            names = ", ".join(sorted(untold))
            logger.warning("%s may not know that the run is over: nothing came from there", names)
        # Whoever still waits joins the next server: one that goes on with the run, or says these words again.
        over = self.result.ok and not self.interrupted
        self._run.store.forget_members(members if over else members - untold)
        self._run.store.forget_stop()
        self.over = True

    def reply_status(self, peer: bytes) -> None:
        """Answer a peer that asks how the run stands, if its rate limit allows."""
        if self.result is None:
            self._watchers.note(peer)
        else:
            self._watchers.forget(peer)
        if self._run.replies.may_have(peer, self.status_bytes):
            snapshot = self._last_status if self.error is not None else self._snapshot()
            if snapshot is None:
                self._run.link.send(peer, protocol.Refused(code="other-run", message=GIVEN_UP))
                return
            reply, self.status_bytes = within_a_message(snapshot)
            self._run.link.send(peer, reply)

    def keep_last_status(self) -> None:
        """Keep how the run stands where it was given up: its journal is closed then."""
        try:
            self._last_status = self._snapshot()
        except FedcoreError as error:  # a journal that failed may not be readable, either
            logger.error("how the run stands can't be shown any more: %s", error)

    def _snapshot(self) -> protocol.StatusReply:
        paused = self._run.gates.state or "no other round begins"
        message = self._run.collecting.no_room
        if self._run.rounds.paused:
            message = f"paused: {paused}"
        if self.result is not None:
            message = self.result.message
        elif self.error is not None:
            message = GIVEN_UP
        return self._run.status.build(self._run.link.stats(), message)
