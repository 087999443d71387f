"""What a site waits for: its tasks, the global models, the other sites; on a terminal it is shown."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Final

from fedcore import protocol
from fedcore._core import Codec, Collector, CollectorOptions, Layout
from fedcore.encoding import can_pack
from fedcore.errors import RunEndedError, RunFailedError
from fedcore.model_file import ModelFile

from .connection import Connection
from .progress import Bar, State

__all__ = ["Waits"]

logger = logging.getLogger("fedcore.client")

WINDOW_BYTES: Final = 16 << 20


class Waits:
    """The waits of one site on its connection.

    Each raises TransferTimeout where the server is not heard for too long, and RefusedError where it turns this
    site away.
    """

    def __init__(self, site: str, connection: Connection) -> None:
        self._site = site
        self._connection = connection
        self._machine = connection.machine

    @contextlib.contextmanager
    def watched(
        self, what: str, state: Callable[[], State | None] | None = None
    ) -> Iterator[Iterator[None]]:
        """Hold the connection's lock, give the turns of a wait, and show on a terminal how far it is.

        ``state`` says so; without it, how this site stands between two tasks is shown.
        """
        with Bar(self._site, state or self._standing) as bar, self._connection.changed:
            yield self._connection.waiting(what, bar=bar)

    def _standing(self) -> State | None:
        """Return what this site waits for between two tasks: the others, or its upload while it is pulled."""
        if self._machine.open_task() is not None:
            return None
        task, rounds = self._machine.task, self._machine.rounds
        upload = self._connection.upload()
        if upload is not None and 0 < upload[0] < upload[1]:
            what = f"update of round {task.round}" if task and task.round else "initial model"
            return State(what, *upload, in_bytes=True)
        if task is None or not task.round:
            return State("waiting for the first round", 0, rounds, in_bytes=False)
        if task.kind == "evaluate":
            what, done = "last model scored", rounds
        else:
            what, done = f"round {task.round} of {rounds}", task.round - 1
        return State(f"{what}, waiting for the other sites", done, rounds, in_bytes=False)

    def next_task(self) -> protocol.Task:
        """Wait for a task; RunEndedError once the run is over."""
        with self.watched("the next task") as turns:
            for _ in turns:
                self.check_open()
                task = self._machine.open_task()
                if task is not None:
                    return task
        raise AssertionError("unreachable")

    def check_open(self) -> None:
        """Raise RunEndedError, or RunFailedError, if the run is over."""
        finish = self._machine.finish
        if finish is not None:
            kind = RunFailedError if finish.outcome == "failed" else RunEndedError
            raise kind(f"the run is over: {finish.message or 'finished'}")

    def download(self, layout: Layout, task: protocol.Task, file: ModelFile) -> bool:
        """Download a task's global model into a file; False when the server no longer publishes it.

        The task is to be waited for again then.
        """
        assert task.model is not None
        source = (b"", bytes.fromhex(task.model.id), 1)
        collector = Collector(
            layout,
            [source],
            file.file,
            file.data_offset,
            None,
            CollectorOptions(
                WINDOW_BYTES,
                rule="copy",
                codec=Codec(layout, "raw", True) if can_pack() else None,
            ),
        )
        connection = self._connection

        def pulled() -> State:
            came, chunks = collector.bytes_received, collector.progress()[2][0]
            # Of compressed chunks the rest is taken to be as large as what has come.
            total = came * layout.chunk_count // chunks if chunks else layout.total_bytes
            total = max(came, min(total, layout.total_bytes))
            return State(f"global model {task.version}", came, total, in_bytes=True)

        connection.pull(task, collector)
        try:
            with self.watched(f"model {task.version}", pulled) as turns:
                for _ in turns:
                    if not self._machine.pulls(task):
                        return self._machine.has_pulled(task)
                    self.check_open()
        finally:
            connection.stop_pull()
        return False
