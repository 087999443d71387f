"""The server's process: one port, its keys and limits, and the runs that it serves.

One thread does everything here: it reads the link, hands each message to the run that it belongs to, and lets time
pass in the runs. Tensor bytes move in the link's pump.
"""

from __future__ import annotations

import contextlib
import logging
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from fedcore import protocol
from fedcore._device import use_device
from fedcore.clock import SYSTEM, Clock
from fedcore.config import RunConfig
from fedcore.errors import ProtocolError
from fedcore.replacing import partial_of, place_of, put_in_place
from fedcore.transport.ends import ServerEnd
from fedcore.transport.link import Control, DataEvent, ServerLink

from .access import Access
from .budget import Budget, check_memory, machine_memory, require_connections, steady_heap
from .guard import Guard
from .outcome import RunResult
from .replies import Replies
from .run import Run, Surroundings, check_encoding, open_store
from .timing import DEFAULT, Timing

__all__ = ["Host"]

_MOST_AT_ONCE: Final = 4096
"""Messages that are read at a deadline before it is acted on: nobody can put it off by sending more."""
_MOST_TOGETHER: Final = 256
"""Messages whose answers may wait for one transaction."""
_UNASKED: Final = 64 << 20

logger = logging.getLogger("fedcore.server")


class Host:
    """A server's process with one run. `serve` returns when it is over, or when this process is to end before it.

    Args:
        config: the run file.
        endpoint_file: where to write the address that the server really listens on, for programs that
            start it with port 0.
        discard: move the models that the run folder's journal does not know into a folder of their own, and go on.
        link: what it listens on instead of ``server.listen``; the host closes it.
        clock: what deadlines are measured with; the link's clock.
        timing: how long it waits for what no run file sets.

    Attributes:
        endpoint: the address that it listens on.
        link: what it listens on.
        runs: its runs.

    Raises:
        BusyError: the port or the run folder is in use.
        IntegrityError: the run folder holds models that its journal does not know.
        ConfigError: the run file names no keys and does not ask for plain text; the run folder holds a run
            with other settings, or a finished one; or FEDCORE_DEVICE or transfer.lossless asks for what this
            machine doesn't have.
    """

    def __init__(
        self,
        config: RunConfig,
        endpoint_file: Path | None = None,
        *,
        discard: bool = False,
        link: ServerEnd | None = None,
        clock: Clock = SYSTEM,
        timing: Timing = DEFAULT,
    ) -> None:
        self._clock, self._timing = clock, timing
        self._memory = config.server.memory
        device = use_device()
        check_encoding(config)
        access = Access(config, clock)
        budget = _budget(config, access)
        store = open_store(config, discard=discard, chunk_bytes=budget.chunk_bytes)
        try:
            if store.chunk_bytes != budget.chunk_bytes:  # the run keeps those that it began with
                budget = _budget(config, access, store.chunk_bytes)
            self.link: ServerEnd = link or ServerLink(config.server.listen, access.secured)
        except BaseException:
            store.close()
            raise
        self.link.run_id = store.run_id
        self.endpoint = self.link.endpoint
        access.opened(self.link)
        self._set_limits(budget)
        self._access = access
        self._replies = Replies(self.link, clock)
        self.runs: list[Run] = []
        self._guard = Guard(self.link, access, self._replies, self.runs)
        around = Surroundings(
            self.link, access, self._replies, self._guard, budget.chunks, device, clock, timing
        )
        self.runs.append(Run(config, store, around))
        self._interrupted = False
        if endpoint_file is not None:
            place = place_of(endpoint_file)
            with partial_of(place) as partial:
                partial.write_text(self.endpoint, encoding="utf-8")
                put_in_place(partial, place)

    # --- the process ---

    def serve(self, linger: float = 0.0) -> list[RunResult]:
        """Serve until all runs are over; KeyboardInterrupt and `stop` end them with what is committed, `interrupt`
        does not.

        Args:
            linger: seconds after the end of a run that was not stopped, within which sites that do not know of it
                may still ask.

        Returns how each run ended, in their order.

        Raises:
            StorageError: a file can't be written; a server that is started again goes on with the round.
        """
        try:
            self.start(linger)
            while not all(run.over for run in self.runs):
                for run in self.runs:
                    run.end_if_asked()
                    if self._interrupted and run.result is None:
                        run.go_away()
                if all(run.over for run in self.runs):
                    break
                try:
                    self.step()
                except KeyboardInterrupt:
                    self.stop()
            return [run.result for run in self.runs if run.result is not None]
        except Exception as error:
            for run in self.runs:
                run.say_stopped(error)
            raise
        finally:
            self.close()

    def start(self, linger: float = 0.0) -> None:
        """Begin the runs, or go on with them: `serve` does it, and then calls `step` until they are over."""
        if warning := check_memory(self._memory, machine_memory()):
            logger.warning("%s", warning)
        for run in self.runs:
            run.start(linger)

    def close(self) -> None:
        """Let go of the port and the run folders, as a crash would."""
        for run in self.runs:
            run.versions.close()
        self._access.close()
        self.link.close()
        for run in self.runs:
            run.store.close()
        for run in self.runs:
            run.listeners.close(self._timing.listeners)

    def stop(self) -> None:
        """End the runs cleanly; safe from another thread or a signal handler."""
        for run in self.runs:
            run.stop()
        self.link.wake()

    def interrupt(self, what: str) -> None:
        """End this process but not its runs; safe from another thread or a signal handler.

        Args:
            what: ended it, such as ``"SIGTERM"``; the sites are told.
        """
        for run in self.runs:
            run.interrupt(what)
        self._interrupted = True
        self.link.wake()

    def step(self) -> None:
        """Handle what arrives, after waiting for it, and do what is due in the runs."""
        now = self._clock.monotonic()
        deadlines = [run.deadline for run in self.runs if run.deadline is not None]
        looks = [run.next_look for run in self.runs]
        until = min([*looks, *(deadline for deadline in deadlines if deadline > now)])
        arrived = self.link.recv(max(0.0, min(self._timing.check, until - now)))
        if arrived is not None:
            self._take_together(arrived)
        if any(deadline <= self._clock.monotonic() for deadline in deadlines):
            self._take_what_waits()
        self._check_access()
        for run in self.runs:
            run.pass_time()

    def _take_together(self, arrived: Control | DataEvent) -> None:
        """Handle what has arrived, and the messages that wait behind it.

        Their rows in the journals are one transaction, and their answers leave after it.
        """
        with self._group():
            self._take(arrived)
            for _ in range(_MOST_TOGETHER - 1):
                if not isinstance(arrived, Control) or all(run.over for run in self.runs):
                    return
                following = self.link.recv(0.0)
                if following is None:
                    return
                arrived = following
                self._take(arrived)

    def _take_what_waits(self) -> None:
        """Let what came by the deadline count, though other messages were read first."""
        with self._group():
            for _ in range(_MOST_AT_ONCE):
                arrived = self.link.recv(0.0)
                if arrived is None or all(run.over for run in self.runs):
                    return
                self._take(arrived)

    def _group(self) -> AbstractContextManager[object]:
        """Have rows that are written in here reach the devices together."""
        groups = contextlib.ExitStack()
        for run in self.runs:
            groups.enter_context(run.store.group())
        return groups

    def _check_access(self) -> None:
        for name in self._guard.take_out_revoked():
            for run in self.runs:
                run.forget(name)

    # --- dispatch ---

    def _take(self, arrived: Control | DataEvent) -> None:
        if not isinstance(arrived, Control):
            if not self._guard.heard(arrived):
                for run in self.runs:
                    run.on_event(arrived)
            return
        most = max(run.versions.most_tensors() for run in self.runs)
        try:
            message = protocol.decode_from_site(arrived.body, most)
        except ProtocolError as error:
            self._guard.invalid(arrived.peer, str(error), protocol.greeting(arrived.body))
        else:
            self._admit(arrived.peer, message)

    def _admit(self, peer: bytes, message: protocol.FromSite) -> None:
        """Hand a message to its run, if its sender may say it."""
        refusal = self._access.refusal(peer, message)
        run = self.runs[0]
        if refusal is not None:
            self._replies.refuse(peer, self._guard.name(peer), refusal)
        elif protocol.is_of_run(message, run.store.run_id):
            run.handle(peer, message)
        else:
            self.link.send(peer, protocol.Rejoin())  # the Welcome says which run this is

    def _set_limits(self, budget: Budget) -> None:
        self.link.exchange.set_limits(
            budget.outgoing,
            budget.control_per_peer,
            budget.control,
            paced=self.link.secure,
            unasked=self._memory + _UNASKED,  # all that may be under way when it is given up
        )


def _budget(config: RunConfig, access: Access, chunk_bytes: int | None = None) -> Budget:
    """Divide the memory of a server, and have the system give it what its sites need.

    Args:
        config, access: the server's.
        chunk_bytes: the size that chunks must have; None: it may be chosen.

    Raises:
        ConfigError: that is too little memory, or too few open files.
    """
    encrypted = access.secured is not None
    budget = Budget.of_run(config, encrypted=encrypted, chunk_bytes=chunk_bytes)
    steady_heap()
    require_connections(config.participants.expected)
    return budget
