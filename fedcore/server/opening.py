"""What a host checks and opens before it listens: its run files, and the folders of its runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from fedcore.config import RunConfig
from fedcore.encoding import can_pack
from fedcore.errors import ConfigError
from fedcore.layout import DEFAULT_CHUNK_BYTES
from fedcore.server.storage.store import Store

from .budget import Budget
from .loading import load_function

__all__ = [
    "RunFinishedError",
    "Share",
    "check_alike",
    "check_encoding",
    "is_over",
    "open_shares",
    "open_store",
]


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
    config: RunConfig, *, discard: bool = False, chunk_bytes: int = DEFAULT_CHUNK_BYTES
) -> Store:
    """Open the folder of a run.

    Args:
        config: the run file.
        discard: move the models that the folder's journal does not know into a folder of their own, and go on.
        chunk_bytes: how large the chunks of a run without a model are.

    Raises:
        BusyError: the folder is in use.
        IntegrityError: it holds models that its journal does not know.
        RunFinishedError: it holds a finished run.
        ConfigError: it holds a run with other settings; a listener or a gate can't be loaded.
    """
    for setting in ("listeners", "gates"):  # before anything is opened
        for name in getattr(config.server, setting):
            load_function(name, f"server.{setting}")
    settings = config.model_dump(mode="json", exclude={"folder", "simulate"})
    store = Store(config.run_folder, settings, discard=discard, chunk_bytes=chunk_bytes)
    try:
        if is_over(config, store) and not store.members():
            raise RunFinishedError(
                f"the run in {config.run_folder} is finished; give this run another name (run.name), raise "
                "run.rounds to go on with it, or remove the folder"
            )
    except BaseException:
        store.close()
        raise
    return store


def is_over(config: RunConfig, store: Store) -> bool:
    """Whether all rounds of a run are committed, and its end was written."""
    return store.finished and (store.last_version or 0) >= config.run.rounds


@dataclass(frozen=True)
class Share:
    """A run that is to be served, and its part of the host's memory.

    Attributes:
        config: the run file, with the run's part of ``server.memory``.
        store: its folder, opened.
        budget: how its part of the memory is divided.
    """

    config: RunConfig
    store: Store
    budget: Budget


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


def open_shares(
    configs: Sequence[RunConfig], *, encrypted: bool, discard: bool
) -> tuple[list[Share], contextlib.ExitStack]:
    """Open the folders of the runs of one process; ``server.memory`` is divided into equal parts.

    A run that is finished is left out where there are others: a command that names several goes on with those that
    are not.

    Args:
        configs: the run files.
        encrypted: the links are.
        discard: as in `open_store`.

    Returns the runs to serve, and what closes their folders again.

    Raises:
        ConfigError: a part is too little memory for its run; all runs are finished; or as `open_store`.
    """
    shares: list[Share] = []
    finished: ConfigError | None = None
    with contextlib.ExitStack() as opened:
        for config in configs:
            try:
                share = _open_share(config, len(configs), encrypted=encrypted, discard=discard)
            except RunFinishedError as error:
                finished = error
                continue
            opened.callback(share.store.close)
            shares.append(share)
        if finished is not None and not shares:
            raise finished
        return shares, opened.pop_all()


def _open_share(config: RunConfig, runs: int, *, encrypted: bool, discard: bool) -> Share:
    """Open the folder of one of so many runs."""
    server = config.server.model_copy(update={"memory": config.server.memory // runs})
    mine = config.model_copy(update={"server": server}) if runs > 1 else config
    try:
        budget = Budget.of_run(mine, encrypted=encrypted)
        store = open_store(config, discard=discard, chunk_bytes=budget.chunk_bytes)
        try:
            if store.chunk_bytes != budget.chunk_bytes:  # its models have others
                budget = Budget.of_run(mine, encrypted=encrypted, chunk_bytes=store.chunk_bytes)
        except BaseException:
            store.close()
            raise
    except RunFinishedError:
        raise
    except ConfigError as error:
        if runs == 1:
            raise
        text = f"run {config.run.name!r}, one of {runs} of this server: {error}"
        raise ConfigError(text) from None
    return Share(mine, store, budget)
