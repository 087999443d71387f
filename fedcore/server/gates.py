"""Asks the gates of a run before each round of training, and keeps what they have allowed."""

from __future__ import annotations

import logging
from typing import Final

from fedcore.config import RunConfig
from fedcore.gates import Gate, RoundRequest
from fedcore.protocol import shown
from fedcore.server.storage.store import Store

from .loading import describe, load_function

__all__ = ["Gates"]

_MOST_TEXT: Final = 500

logger = logging.getLogger("fedcore.server")


class Gates:
    """The gates of one run. A round that was allowed stays so: a server that is started again asks no second time.

    Args:
        config: the run file, which names them.
        store: where it is kept which round was allowed.

    Attributes:
        refusal: why the next round does not begin; empty where no gate has refused it.

    Raises:
        ConfigError: a gate can't be loaded; it is named.
    """

    def __init__(self, config: RunConfig, store: Store) -> None:
        self._gates: dict[str, Gate] = {
            name: load_function(name, "server.gates") for name in config.server.gates
        }
        self._config = config
        self._store = store
        self.refusal = ""

    def allow(self, round_: int) -> bool:
        """Ask whether a round of training may begin; True only once that is in the journal.

        Raises:
            StorageError: the journal can't be written; the round must not begin.
        """
        self.refusal = ""
        rounds = self._config.run.rounds
        if not self._gates or round_ > rounds or self._config.run.task != "train":
            return True
        if self._store.allowed_round == round_:
            return True
        request = RoundRequest(
            run=self._config.run.name, run_id=self._store.run_id, round=round_, rounds=rounds
        )
        for name, gate in self._gates.items():
            self.refusal = self._ask(name, gate, request)
            if self.refusal:
                logger.warning(
                    "round %d does not begin: %s; the run is paused: `fedcore resume` asks again",
                    round_, self.refusal,
                )  # fmt: skip
                return False
        self._store.allow_round(round_)
        return True

    @staticmethod
    def _ask(name: str, gate: Gate, request: RoundRequest) -> str:
        try:
            answer: object = gate(request)
            if answer is None:
                return ""
            if isinstance(answer, str):
                return shown(f"gate {name} refuses it: {answer}", _MOST_TEXT)
        except KeyboardInterrupt:  # it is the server's
            raise
        except BaseException as error:  # it fails closed, also with one that would end the process
            return shown(f"gate {name} fails: {describe(error)}", _MOST_TEXT)
        return f"gate {name} answers {type(answer).__name__}, which is neither None nor a text"
