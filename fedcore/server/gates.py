"""Asks the gates of a run before each round of training, and keeps what they have allowed.

They are asked in a thread of their own: a gate that is slow, or never answers, holds back its run alone.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fedcore.config import RunConfig
from fedcore.gates import Gate, RoundRequest
from fedcore.protocol import shown
from fedcore.server.storage.store import Store

from .loading import describe, load_function

__all__ = ["Gates"]

_MOST_TEXT: Final = 500
_SLOW_SECONDS: Final = 10.0

logger = logging.getLogger("fedcore.server")


@dataclass
class _Question:
    """A round that the gates are asked for; the thread that asks writes ``done`` last."""

    round: int
    since: float
    gate: str = ""
    refusal: str = ""
    done: bool = False
    slow: bool = False


class Gates:
    """The gates of one run. A round that was allowed stays so: a server that is started again asks no second time.

    Args:
        config: the run file, which names them.
        store: where it is kept which round was allowed.
        wake: called from another thread once `answer` has something to return.
        now: the time, in seconds.

    Attributes:
        refusal: why the next round does not begin; empty where no gate has refused it.

    Raises:
        ConfigError: a gate can't be loaded; it is named.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        wake: Callable[[], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._gates: dict[str, Gate] = {
            name: load_function(name, "server.gates") for name in config.server.gates
        }
        self._config = config
        self._store = store
        self._wake, self._now = wake, now
        self._question: _Question | None = None
        self.refusal = ""

    @property
    def asking(self) -> bool:
        """Whether an answer is still to come."""
        return self._question is not None

    @property
    def state(self) -> str:
        """Why the next round does not begin, in words; empty where no gate has to do with it."""
        question = self._question
        if question is None:
            return self.refusal
        return f"gate {question.gate} is asked for round {question.round}"

    def allow(self, round_: int) -> bool:
        """Whether a round of training may begin. Where that is not known, the gates are asked: see `answer`."""
        rounds = self._config.run.rounds
        if not self._gates or round_ > rounds or self._config.run.task != "train":
            return True
        if self._store.allowed_round == round_:
            self.refusal = ""
            return True
        if self._question is None:
            self._ask_aside(round_)
        return False

    def answer(self) -> bool | None:
        """Return whether the round may begin, once the gates have answered; None before, or if none is asked.

        It is True only once that is in the journal.

        Raises:
            StorageError: the journal can't be written; the round must not begin.
        """
        question = self._question
        if question is None:
            return None
        if not question.done:
            self._say_slow(question)
            return None
        self._question, self.refusal = None, question.refusal
        if not question.refusal:
            self._store.allow_round(question.round)
            return True
        logger.warning(
            "round %d does not begin: %s; the run is paused: `fedcore resume` asks again",
            question.round, question.refusal,
        )  # fmt: skip
        return False

    def _say_slow(self, question: _Question) -> None:
        seconds = self._now() - question.since
        if seconds >= _SLOW_SECONDS and not question.slow:
            question.slow = True
            logger.warning(
                "round %d waits for gate %s, which has not answered for %.0f s",
                question.round, question.gate, seconds,
            )  # fmt: skip

    def _ask_aside(self, round_: int) -> None:
        self.refusal = ""
        question = self._question = _Question(round_, self._now(), gate=next(iter(self._gates)))
        request = RoundRequest(
            run=self._config.run.name,
            run_id=self._store.run_id,
            round=round_,
            rounds=self._config.run.rounds,
        )
        run = contextvars.copy_context().run  # log lines of a gate are those of the run
        thread = threading.Thread(
            target=run, args=(self._ask_all, question, request), name="fedcore gates", daemon=True
        )
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            question.refusal = f"no gate can be asked: {describe(error)}"
            question.done = True
            self._wake()

    def _ask_all(self, question: _Question, request: RoundRequest) -> None:
        for name, gate in self._gates.items():
            question.gate = name
            question.refusal = self._ask(name, gate, request)
            if question.refusal:
                break
        question.done = True
        self._wake()

    @staticmethod
    def _ask(name: str, gate: Gate, request: RoundRequest) -> str:
        try:
            answer: object = gate(request)
            if answer is None:
                return ""
            if isinstance(answer, str):
                return shown(f"gate {name} refuses it: {answer}", _MOST_TEXT)
        except BaseException as error:  # it fails closed, also with one that would end the process
            return shown(f"gate {name} fails: {describe(error)}", _MOST_TEXT)
        return f"gate {name} answers {type(answer).__name__}, which is neither None nor a text"
