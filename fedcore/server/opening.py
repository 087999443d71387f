"""What a host checks and opens before it listens: its run files, and the folders of its runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedcore.clock import Clock
from fedcore.config import RunConfig
from fedcore.encoding import can_pack
from fedcore.errors import BusyError, ConfigError
from fedcore.layout import DEFAULT_CHUNK_BYTES
from fedcore.server.storage.journal import JournalLockedError
from fedcore.server.storage.store import Store

from .budget import Budget
from .loading import load_function
from .ranking import early_end
from .run_log import RUN

__all__ = [
    "Opening",
    "RunFinishedError",
    "Share",
    "check_alike",
    "check_encoding",
    "is_over",
    "open_store",
]

_AGAIN_SECONDS: Final = 0.25
_SAY_SECONDS: Final = 60.0
_GIVE_UP_SECONDS: Final = 600.0
"""Longer than a rollback or a status has a folder: another server serves the run."""

logger = logging.getLogger("fedcore.server")


def check_encoding(config: RunConfig) -> None:
    """Check that this machine has what a run's encoding needs.

    Raises:
        ConfigError: it lacks the package lz4.
    """
    if config.transfer.lossless and not can_pack():
        raise ConfigError(
            "transfer.lossless needs the Python package lz4 at the server: install fedcore-fl[lossless], or "
            "set it to false"
        )


class RunFinishedError(ConfigError):
    """The run in a folder is finished, and there is nobody who may not know."""


def open_store(
    config: RunConfig,
    *,
    discard: bool = False,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    wait: bool = True,
) -> Store:
    """Open the folder of a run.

    Args:
        config: the run file.
        discard: move the models that the folder's journal does not know into a folder of their own, and go on.
        chunk_bytes: how large the chunks of a run without a model are.
        wait: wait for as long as another process has the journal locked; else see `Store`.

    Raises:
        BusyError: the folder is in use.
        JournalLockedError: another process has its journal locked, without ``wait``.
        IntegrityError: it holds models that its journal does not know.
        RunFinishedError: it holds a finished run.
        ConfigError: it holds a run with other settings; a listener or a gate can't be loaded.
    """
    for setting in ("listeners", "gates"):  # before anything is opened
        for name in getattr(config.server, setting):
            load_function(name, f"server.{setting}")
    settings = config.model_dump(mode="json", exclude={"folder", "simulate"})
    store = Store(config.run_folder, settings, discard=discard, chunk_bytes=chunk_bytes, wait=wait)
    try:
        if is_over(config, store) and not store.members():
            early = early_end(config, store, store.last_version or 0)
            more = "selection.patience or selection.target" if early else "run.rounds"
            raise RunFinishedError(
                f"the run in {config.run_folder} is finished{': ' if early else ''}{early}; give this run another "
                f"name (run.name), change {more} to go on with it, or remove the folder"
            )
    except BaseException:
        store.close()
        raise
    return store


def is_over(config: RunConfig, store: Store) -> bool:
    """Whether the last round of a run is committed, and its end was written."""
    version = store.last_version or 0
    return store.finished and (
        version >= config.run.rounds or bool(early_end(config, store, version))
    )


@dataclass(frozen=True)
class Share:
    """A run that is to be served, and its part of the host's memory.

    Attributes:
        config: the run file, with the run's part of ``server.memory``; without a spill file if that has no room.
        store: its folder, opened.
        budget: how its part of the memory is divided.
        number: the run's at its host, from 1.
    """

    config: RunConfig
    store: Store
    budget: Budget
    number: int


def _with_server(config: RunConfig, **settings: object) -> RunConfig:
    return config.model_copy(update={"server": config.server.model_copy(update=settings)})


def check_alike(configs: Sequence[RunConfig]) -> None:
    """Check that run files may be served by one process.

    Raises:
        ConfigError: they may not; the text names the key, and both run files.
    """
    first = configs[0]
    for number, other in enumerate(configs[1:], 1):
        for key in ("listen", "insecure", "insecure_network", "memory"):
            mine, others = getattr(first.server, key), getattr(other.server, key)
            if mine != others:
                raise ConfigError(
                    f"server.{key} is {mine!r} in run {first.run.name!r} and {others!r} in run "
                    f"{other.run.name!r}: the runs of one server have it in common"
                )
        if first.keys_folder != other.keys_folder:
            raise ConfigError(
                f"server.keys names {first.keys_folder} in run {first.run.name!r} and {other.keys_folder} in run "
                f"{other.run.name!r}: the runs of one server have it in common"
            )
        if other.run.name in [config.run.name for config in configs[:number]]:
            raise ConfigError(
                f"run.name is {other.run.name!r} twice: the runs of one server have names of their own"
            )


class Opening:
    """Opens the folders of the runs of one process; ``server.memory`` is divided into equal parts.

    One of several runs whose journal another process has locked is opened later: the others are served meanwhile.
    It is given up where another process then has its folder for ten minutes, as a server of its own.
    A run that is finished is left out where there are others: a command that names several goes on with those that
    are not.

    Args:
        configs: the run files.
        encrypted: the links are.
        discard: as in `open_store`.
        clock: says when a locked journal is tried again.

    Attributes:
        budgets: how each run's part of the memory is divided, by its number from 1; none of one that is left out.
        finished: the names of the runs that are left out.
        failed: why runs could not be opened once their journals were free.
    """

    def __init__(
        self, configs: Sequence[RunConfig], *, encrypted: bool, discard: bool, clock: Clock
    ) -> None:
        self._runs, self._waiting = len(configs), list(configs)
        self._encrypted, self._discard, self._clock = encrypted, discard, clock
        self._numbers = {config.run.name: number for number, config in enumerate(configs, 1)}
        self._due = self._next_line = clock.monotonic()
        self._busy_since: dict[str, float] = {}
        self.budgets: dict[int, Budget] = {}
        self.finished: list[str] = []
        self.failed: list[Exception] = []

    @property
    def waiting(self) -> list[str]:
        """The names of the runs that are not opened yet."""
        return [config.run.name for config in self._waiting]

    @property
    def due(self) -> float:
        """When `again` has something to do; infinity if never."""
        return self._due if self._waiting else float("inf")

    def first(self) -> tuple[list[Share], contextlib.ExitStack]:
        """Open what can be opened; returns it, and what closes the folders again.

        Where there are several runs, their journals are reserved until `Store.release` is called.

        Raises:
            ConfigError: a part is too little memory for its run; all runs are finished; or as `open_store`.
        """
        shares: list[Share] = []
        finished: ConfigError | None = None
        with contextlib.ExitStack() as opened:
            for config in list(self._waiting):
                try:
                    share = self._open(config)
                except RunFinishedError as error:
                    finished = error
                    self._leave_out(config)
                    continue
                if share is not None:
                    opened.callback(share.store.close)
                    shares.append(share)
            if finished is not None and not shares and not self._waiting:
                raise finished
            return shares, opened.pop_all()

    def again(self) -> list[Share]:
        """Open the runs whose journals are free by now; what can't be opened is in ``failed`` or ``finished``."""
        now = self._clock.monotonic()
        if now < self.due:
            return []
        shares = []
        self._due = now + _AGAIN_SECONDS
        for config in list(self._waiting):
            token = RUN.set(config.run.name)
            try:
                share = self._open(config)
                if share is not None:
                    shares.append(share)
                    continue
                self._busy_since.pop(config.run.name, None)
                if now >= self._next_line:
                    logger.warning(
                        "the run is not served yet: another process has its database in %s locked; it is served "
                        "once that is free", config.run_folder,
                    )  # fmt: skip
            except (
                BusyError
            ) as error:  # as `fedcore rollback` has it, or a status that looks who has it
                if now - self._busy_since.setdefault(config.run.name, now) >= _GIVE_UP_SECONDS:
                    self._waiting.remove(config)
                    self.fail(config, error)
                elif now >= self._next_line:
                    logger.warning(
                        "the run is not served yet, and is once its folder is free: %s", error
                    )
            except RunFinishedError as error:
                logger.info("not served any more: %s", error)
                self._leave_out(config)
            except Exception as error:
                self._waiting.remove(config)
                self.fail(config, error)
            finally:
                RUN.reset(token)
        if now >= self._next_line:
            self._next_line = now + _SAY_SECONDS
        return shares

    def fail(self, config: RunConfig, error: Exception) -> None:
        """Note that a run is not served."""
        logger.error("run %s is not served: %s", config.run.name, error)
        self.failed.append(error)

    def give_up(self) -> list[str]:
        """Open nothing more; returns the names of the runs that were not opened: they are as they were."""
        left, self._waiting = self.waiting, []
        return left

    def _leave_out(self, config: RunConfig) -> None:
        self.finished.append(config.run.name)
        self._waiting.remove(config)
        self.budgets.pop(self._numbers[config.run.name], None)

    def _open(self, config: RunConfig) -> Share | None:
        """Open a run's folder; None if its journal is locked."""
        number, alone = self._numbers[config.run.name], self._runs == 1
        mine = _with_server(config, memory=config.server.memory // self._runs)
        try:
            budget = self.budgets[number] = Budget.of_run(mine, encrypted=self._encrypted)
            size = budget.chunk_bytes
            store = open_store(config, discard=self._discard, chunk_bytes=size, wait=alone)
            try:
                if store.chunk_bytes != size:  # its models have others
                    size = store.chunk_bytes
                    budget = Budget.of_run(mine, encrypted=self._encrypted, chunk_bytes=size)
            except BaseException:
                store.close()
                raise
        except JournalLockedError:
            return None
        except RunFinishedError:
            raise
        except ConfigError as error:
            if alone:
                raise
            text = f"run {config.run.name!r}, one of {self._runs} of this server: {error}"
            raise ConfigError(text) from None
        self.budgets[number] = budget
        self._waiting.remove(config)
        if mine.server.spill and not budget.spill:
            logger.warning(
                "server.memory = %dMiB holds a chunk of each of %d updates, but not as many that are read back "
                "from a spill file: nothing is spilled, and sites that are ahead are held back; twice the memory "
                "is enough for both", mine.server.memory >> 20, config.participants.trained,
            )  # fmt: skip
            mine = _with_server(mine, spill=False)
        return Share(mine, store, budget, number)
