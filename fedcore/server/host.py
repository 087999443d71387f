"""The server's process: one port, its keys and limits, and the runs that it serves.

One thread does everything here: it reads the link, hands each message to the run that it belongs to, and lets time
pass in the runs. Tensor bytes move in the link's pump.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from fedcore import protocol
from fedcore._core import SetDamaged
from fedcore._device import use_device
from fedcore.clock import SYSTEM, Clock
from fedcore.config import RunConfig
from fedcore.errors import ProtocolError, StorageError
from fedcore.replacing import partial_of, place_of, put_in_place
from fedcore.transport.ends import ServerEnd
from fedcore.transport.link import Control, DataEvent, ServerLink

from .access import Access
from .budget import Budget, check_memory, machine_memory, require_connections, steady_heap
from .guard import Guard
from .opening import Opening, Share, check_alike, check_encoding
from .outcome import RunResult
from .parts import Surroundings
from .replies import Replies
from .rule import check_rule_fits
from .run import Run
from .run_log import RUN
from .timing import DEFAULT, Timing
from .turns import Turns

__all__ = ["Host"]

_MOST_AT_ONCE: Final = 4096
"""Messages that are read at a deadline before it is acted on: nobody can put it off by sending more."""
MOST_TOGETHER: Final = 256
"""Messages whose answers may wait for one transaction."""
_UNASKED: Final = 64 << 20
_FromOutside = protocol.StatusRequest | protocol.MetricsRequest | protocol.Command
"""What needs no part in a run."""
_SAID_ONCE: Final = (protocol.Score, protocol.Answer, protocol.Leave)
"""What a site does not send again by itself."""
WHICH_RUN: Final = (
    "this server has several runs, and this names none of them that it belongs to: a site names its run by "
    "FEDCORE_RUN, its kit or run=... in its script, and a command by the run's folder, or by its id behind the "
    "address (tcp://HOST:PORT#RUN_ID)"
)
_LOCKED: Final = (
    "another process has the database of this run locked; the run goes on once that is free"
)
_NOT_YET: Final = (
    "this names no run that this server has open, and one of its runs is not open yet: another process has its "
    "database locked"
)

logger = logging.getLogger("fedcore.server")


class Host:
    """A server's process with one run or several. `serve` returns when they are over, or when this process is to
    end before them.

    Args:
        configs: the run files. What concerns the process must be the same in all of them: ``server.listen``, the
            keys, and ``server.memory``, which the runs share in equal parts.
        endpoint_file: where to write the address that the server really listens on, for programs that
            start it with port 0.
        discard: move the models that a run folder's journal does not know into a folder of their own, and go on.
        link: what it listens on instead of ``server.listen``; the host closes it.
        clock: what deadlines are measured with; the link's clock.
        timing: how long it waits for what no run file sets.

    Attributes:
        endpoint: the address that it listens on.
        link: what it listens on.
        access: who may say what; without keys everybody may.
        turns: which runs may be worked on, and what waits for a journal that another process has locked.
        runs: its runs, but for those whose journals another process has locked since before it started.
        opened: called with a run that is opened later than the others, before it starts.
        unopened: the names of the runs that were never opened, once the host ends.

    Raises:
        BusyError: the port or a run folder is in use.
        IntegrityError: a run folder holds models that its journal does not know.
        ConfigError: the run files differ in what concerns the process, or have one name; they name no keys and do
            not ask for plain text; a run folder holds a run with other settings, or a finished one; or
            FEDCORE_DEVICE or transfer.lossless asks for what this machine doesn't have.
    """

    def __init__(
        self,
        configs: Sequence[RunConfig],
        endpoint_file: Path | None = None,
        *,
        discard: bool = False,
        link: ServerEnd | None = None,
        clock: Clock = SYSTEM,
        timing: Timing = DEFAULT,
    ) -> None:
        self._clock, self._timing = clock, timing
        self._memory = configs[0].server.memory
        check_alike(configs)
        device = use_device()
        for config in configs:
            check_encoding(config)
            check_rule_fits(config)
        access = self.access = Access(configs[0], clock, configs[1:])
        steady_heap()
        require_connections(sum(config.participants.expected for config in configs))
        opening = self._opening = Opening(
            configs, encrypted=access.secured is not None, discard=discard, clock=clock
        )
        shares, opened = opening.first()
        with opened:
            self.link: ServerEnd = link or ServerLink(configs[0].server.listen, access.secured)
            opened.pop_all()
        self.endpoint = self.link.endpoint
        access.opened(self.link, [])
        # One of several is alone where all others are finished. Its name is no other's business, either.
        self._several = len(configs) > 1
        self._alone = len(shares) == 1 and not opening.waiting
        self._room = self._set_limits(opening.budgets)
        self._replies = Replies(self.link, clock)
        self.runs: list[Run] = []
        turns = self.turns = Turns(
            self.runs, self._working_on, self._group, self._room, alone=self._alone
        )
        self._guard = Guard(
            self.link, access, self._replies, self.runs, working_on=self._working_on, do=turns.do
        )
        self._device = device
        self._linger: float | None = 0.0
        self._interrupted, self._stopping = "", False
        self.opened: Callable[[Run], None] = lambda _: None
        self.unopened: list[str] = []
        for share in shares:
            self._add(share)
        if endpoint_file is not None:
            place = place_of(endpoint_file)
            with partial_of(place) as partial:
                partial.write_text(self.endpoint, encoding="utf-8")
                put_in_place(partial, place)

    # --- the process ---

    def serve(self, linger: float | None = 0.0) -> list[RunResult]:
        """Serve until all runs are over; KeyboardInterrupt and `stop` end them with what is committed, `interrupt`
        does not.

        Args:
            linger: seconds after the end of a run that was not stopped, within which sites that do not know of it
                may still ask; None: each run's ``server.linger``.

        Returns how each run ended, in their order.

        Raises:
            StorageError: a file can't be written; a server that is started again goes on with the round.
        """
        try:
            self.start(linger)
            while not self._is_over():
                self.end_what_is_asked()
                if self._is_over():
                    break
                try:
                    self.step()
                except KeyboardInterrupt:
                    self.stop()
        except Exception as error:
            for run in self.runs:
                if run.error is None:
                    run.say_stopped(error)
            raise
        else:
            for run in self.runs:
                if run.error is not None:
                    raise run.error
            for failed in self._opening.failed:
                raise failed
            return [run.result for run in self.runs if run.result is not None]
        finally:
            self.close()

    def start(self, linger: float | None = 0.0) -> None:
        """Begin the runs, or go on with them. `serve` does so, then calls `end_what_is_asked` and `step`."""
        self._linger = linger
        if self._opening.finished:
            names = ", ".join(self._opening.finished)
            logger.info("finished, and not served any more: %s", names)
        if warning := check_memory(self._memory, machine_memory()):
            logger.warning("%s", warning)
        with self.turns.taken():
            self._begin(self.runs)

    def _begin(self, runs: Sequence[Run]) -> None:
        for run in runs:
            linger = run.config.server.linger if self._linger is None else self._linger
            self.turns.do(run, functools.partial(run.start, linger))

    def _add(self, share: Share) -> Run:
        """Take up a run whose folder is open."""
        around = Surroundings(
            self.link, share.number, self.access, self._replies, self._guard, share.budget.chunks, self._device,
            self._clock, self._timing,
        )  # fmt: skip
        self.access.enter(share.store.folder)
        run = Run(share.config, share.store, around)
        self.opened(run)
        self.runs.append(run)
        if self._stopping:  # it may have come while the folder was opened
            run.stop()
        if self._interrupted:
            run.interrupt(self._interrupted)
        if not self._alone:
            self.link.exchange.limit_audience(share.number, share.budget.outgoing, self._room)
            share.store.release()
        return run

    def _add_opened(self) -> list[Run]:
        """Take up the runs whose journals were locked and are free by now."""
        added = []
        for share in self._opening.again():
            try:
                added.append(self._add(share))
            except Exception as error:
                share.store.close()
                self.access.leave(share.store.folder)
                self._opening.fail(share.config, error)
        return added

    @property
    def waiting(self) -> list[str]:
        """The names of the runs that are opened once no other process has their journals locked."""
        return self._opening.waiting

    def _is_over(self) -> bool:
        return not self._opening.waiting and all(run.over for run in self.runs)

    def close(self) -> None:
        """Let go of the port and the run folders, as a crash would."""
        for run in self.runs:
            run.versions.close()
        self.access.close()
        self.link.close()
        for run in self.runs:
            run.store.close()
        for run in self.runs:
            run.listeners.close(self._timing.listeners)

    def stop(self) -> None:
        """End the runs cleanly; safe from another thread or a signal handler."""
        self._stopping = True
        for run in self.runs:
            run.stop()
        self.link.wake()

    def interrupt(self, what: str) -> None:
        """End this process but not its runs; safe from another thread or a signal handler.

        Args:
            what: ended it, such as ``"SIGTERM"``; the message to the sites names it.
        """
        self._interrupted = what
        for run in self.runs:
            run.interrupt(what)
        self.link.wake()

    def step(self) -> None:
        """Handle what arrives, after waiting for it, and do what is due in the runs."""
        now, turns = self._clock.monotonic(), self.turns
        looks = [run.next_look for run in turns.free]
        dues = [*looks, *(deadline for deadline in turns.deadlines if deadline > now)]
        longest = min(self._timing.check, turns.longest)
        arrived = self.link.recv(max(0.0, min([now + longest, self._opening.due, *dues]) - now))
        added = self._add_opened()
        with turns.taken():
            self._begin(added)
            deadlines = (
                turns.deadlines
            )  # before what follows from messages; also of runs that waited
            if arrived is not None:
                self._take_together(arrived)
            if any(deadline <= self._clock.monotonic() for deadline in deadlines):
                self._take_what_waits()
            self._check_access()
            for run in turns.free:
                with self._working_on(run):
                    run.pass_time()

    def end_what_is_asked(self) -> None:
        """End the runs that are to end, or this process's part in them, once their journals are free."""
        if self._stopping or self._interrupted:
            for name in self._opening.give_up():
                self.unopened.append(name)
                logger.warning("run %s was not opened; it is as it was", name)
        ends = [r for r in self.runs if r.end_asked or (self._interrupted and r.is_under_way)]
        if not ends:
            return
        with self.turns.taken():
            for run in ends:
                if self.turns.waits(run):
                    continue
                with self._working_on(run):
                    run.end_if_asked()
                    if self._interrupted and run.is_under_way:
                        run.go_away()

    def _take_together(self, arrived: Control | DataEvent) -> int:
        """Handle what has arrived, and the messages that wait behind it; returns how many it were.

        Their rows in the journals are one transaction, and their answers leave after it. An event of the data
        plane is handled after that, as it may take long: a commit may follow.
        """
        following: Control | DataEvent | None = arrived
        taken = 0
        with self._group(self.runs):
            while isinstance(following, Control) and taken < MOST_TOGETHER:
                self._take(following)
                taken += 1
                following = None if self._is_over() else self.link.recv(0.0)
        if following is not None:
            self._take(following)
            taken += 1
        return taken

    def _take_what_waits(self) -> None:
        """Let what came by the deadline count, though other messages were read first."""
        taken = 0
        while taken < _MOST_AT_ONCE and not self._is_over():
            arrived = self.link.recv(0.0)
            if arrived is None:
                return
            taken += self._take_together(arrived)

    @contextlib.contextmanager
    def _group(self, runs: Sequence[Run]) -> Iterator[None]:
        """Have rows that are written in here reach the devices together, those of each run by themselves."""
        groups = [(run, run.store.group()) for run in runs if run.error is None]
        for _, group in groups:
            group.__enter__()
        try:
            yield
        finally:
            for run, group in groups:
                if run.error is not None:  # its journal is closed, and what it has lost is said
                    with contextlib.suppress(StorageError):
                        group.__exit__(None, None, None)
                    continue
                with self._working_on(run):
                    group.__exit__(None, None, None)

    def _check_access(self) -> None:
        for name in self._guard.take_out_revoked():
            for run in self.runs:
                self.turns.do(run, functools.partial(run.forget, name))

    # --- dispatch ---

    def _take(self, arrived: Control | DataEvent) -> None:
        if not isinstance(arrived, Control):
            if not self._guard.handle(arrived):
                self._on_event(arrived)
            return
        inside = self._guard.run_of(arrived.peer)
        waiting = self.turns.holding(inside, arrived.peer)
        if waiting is not None:
            act = functools.partial(self._take, arrived)
            if not self.turns.take(waiting, act, len(arrived.body)):
                self._lose(waiting, arrived)
            return
        asked = self.runs if inside is None else [inside]
        most = max((run.versions.most_tensors() for run in asked), default=protocol.MAX_TENSORS)
        try:
            message = protocol.decode_from_site(arrived.body, most)
        except ProtocolError as error:
            with self._guard.of_run_of(arrived.peer):
                self._guard.invalid(arrived.peer, str(error), protocol.greeting(arrived.body))
        else:
            self._admit(arrived.peer, message, len(arrived.body))

    def _lose(self, run: Run, lost: Control) -> None:
        """A message finds no room to wait. What needs an answer is sent again, logged values are not.

        Nor are problems, which are counted like values, and scores, answers and leaves: the last one of each site
        waits all the same.
        """
        known = run.peers.get(lost.peer)
        with contextlib.suppress(ProtocolError):
            message = protocol.decode_from_site(lost.body)
            if known is not None and isinstance(message, protocol.Log):
                self.turns.lose(run, known.site, "value", len(message.metrics))
            elif known is not None and isinstance(message, protocol.Problem):
                self.turns.lose(run, known.site, "problem", 1)
            elif known is not None and isinstance(message, _SAID_ONCE):
                key = (known.site, type(message))
                self.turns.do(run, functools.partial(self._take, lost), key)

    def _on_event(self, event: DataEvent) -> None:
        """Hand an event to its run; what is of none, as of a collection that has ended, is dropped there."""
        runs = self.runs
        if isinstance(event, SetDamaged) and len(runs) > 1:
            runs = [run for run in runs if run.versions.owns(event.set_id, event.message)]
        for run in runs:
            self.turns.hand_over(run, event)

    def _admit(self, peer: bytes, message: protocol.FromSite, size: int) -> None:
        """Hand a message of so many bytes to its run, if its sender may say it."""
        refusal = self.access.refusal(peer, message)
        if refusal is not None:
            with self._guard.of_run_of(peer):
                self._replies.refuse(peer, self._guard.name(peer), refusal)
            return
        run = self._run_of(peer, message)
        if run is not None and protocol.is_of_run(message, run.store.run_id):
            joining = peer if isinstance(message, protocol.Join) else None
            if joining is not None:
                self._end_other_part(peer, run)
            if self.turns.waits(run) and self._say_locked(peer, message):
                return
            self.turns.take(run, functools.partial(run.handle, peer, message), size, joining)
        elif run is None and isinstance(message, protocol.Join | _FromOutside):
            self._on_no_run(peer, message)
        else:
            self.link.send(peer, protocol.Rejoin())  # the Welcome says which run this is

    def _say_locked(self, peer: bytes, message: protocol.FromSite) -> bool:
        """Answer who would wait for a locked run without a word; returns whether that is all the answer.

        A command has no effect then: an operator who was answered must not wonder whether it comes later.
        """
        if isinstance(message, protocol.Command):
            text = f"{_LOCKED}: try again then"
            self.link.send(peer, protocol.CommandReply(ok=False, message=text))
            return True
        asks = isinstance(message, protocol.StatusRequest | protocol.MetricsRequest)
        if asks or isinstance(message, protocol.Join):
            self.link.send(peer, protocol.Refused(code="busy", message=_LOCKED))
        return asks

    def _on_no_run(self, peer: bytes, message: protocol.Join | _FromOutside) -> None:
        """Refuse what is for no run that is open. Whoever may mean one that is opened later asks again."""
        if self._opening.waiting:
            self.link.send(peer, protocol.Refused(code="busy", message=_NOT_YET))
            return
        # The same text whether there is such a run or not: who is of none learns no names.
        name = message.site if isinstance(message, protocol.Join) else self._guard.name(peer)
        refusal = protocol.Refused(code="other-run", message=WHICH_RUN)
        self._replies.refuse(peer, name, refusal)

    def _run_of(self, peer: bytes, message: protocol.FromSite) -> Run | None:
        """Return the run that a message is for; None if its sender belongs to none that it may mean."""
        if isinstance(message, protocol.Join) and self._several:
            return next((run for run in self.runs if run.may_join(message)), None)
        if self._alone:
            return self.runs[0]
        folder = self.access.folder_of(peer)
        if folder is not None:  # the key that lies in a run folder is for that run
            return next((run for run in self.runs if run.store.folder == folder), None)
        inside = self._guard.run_of(peer)
        if inside is not None or not isinstance(message, _FromOutside):
            return inside
        wanted = message.run_id
        return next((run for run in self.runs if run.store.run_id == wanted), None)

    def _end_other_part(self, peer: bytes, joined: Run) -> None:
        """A peer takes part in one run at a time: that in which it has joined last."""
        other = self._guard.run_of(peer)
        if other is not None and other is not joined:
            with self._working_on(other):
                other.end_part(peer, "it joins another run", "left")
                if other.error is None:
                    other.store.settle()  # what waits for this peer leaves before the other run's answer

    @contextlib.contextmanager
    def _working_on(self, run: Run) -> Iterator[None]:
        """Do something for one run: its lines are its own, and where it fails, the others go on."""
        token = RUN.set(run.config.run.name)
        try:
            yield
        except Exception as error:
            if self._alone:
                raise
            self.access.leave(run.store.folder)
            run.give_up(error)
        finally:
            RUN.reset(token)

    def _set_limits(self, budgets: Mapping[int, Budget]) -> int:
        """Bound the queues. Each of several runs has a part of them, and peers that are in none have one, too.

        Returns the bytes of control messages of which each has room.
        """
        control = sum(budget.control for budget in budgets.values())
        part = control if self._alone else control // (len(budgets) + 1)
        self.link.exchange.set_limits(
            # Nothing is published for peers that are in none of several runs.
            max(budget.outgoing for budget in budgets.values()),
            max(budget.control_per_peer for budget in budgets.values()),
            part,
            paced=self.link.secure,
            unasked=self._memory + _UNASKED,  # all that may be under way when it is given up
        )
        return part
