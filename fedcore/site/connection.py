"""A site's conversation with the server: one thread that drives a `SiteMachine` over a `SiteLink`.

It runs while the script trains, so that a server that was started again, or a round that was committed, is noticed
at once. `fedcore.site.session` decides what is done with it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

from fedcore import protocol
from fedcore._core import Collector, CollectorDone, FrameMalformed, SetDamaged, SourceRejected
from fedcore.encoding import EncodedUpdate
from fedcore.errors import ClosedError, RefusedError, TransferTimeout
from fedcore.transport.ends import Dial, SiteEnd
from fedcore.transport.link import (
    HEARTBEAT_MS,
    Control,
    DataEvent,
    SiteLink,
    now_ms,
    other_version,
)

from . import outputs as out
from .machine import SiteMachine
from .memory import keep_warm
from .narration import narrate
from .progress import Bar
from .settings import SiteSettings
from .signals import InOrder, end_in_order, let_go

__all__ = ["Connection"]

CHECK_SECONDS: Final = 0.5
NOTICE_SECONDS: Final = 10.0

logger = logging.getLogger("fedcore.client")


class Connection:
    """One process's place at the server.

    Public methods belong to the thread that trains. It holds ``changed`` while it reads ``machine`` or goes
    through `waiting`; the background thread notifies it of each change.

    Attributes:
        link: the way to the server; None until it is dialled.
        settings: where the server is, and how long it is waited for.
        machine: this site's half of the protocol; whoever calls one of its methods that send goes through here.
        settled: called once the fate of a published update is known, with its announcement and whether it counts.
    """

    def __init__(self, settings: SiteSettings, dial: Dial | None = None) -> None:
        self.settings = settings
        self._dial: Dial = dial or functools.partial(SiteLink, proxy=settings.proxy)
        self._site, self._server = settings.site, settings.server
        self.machine = SiteMachine(settings)
        self.changed = threading.Condition()
        self.link: SiteEnd | None = None
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._signals: InOrder | None = None
        self._connections = 1
        self._unresolved = ""
        self._upload = (0, 0, 0.0)
        self._uploaded = False
        self._download: tuple[str, Collector] | None = None  # the set, and what pulls it
        self.settled: Callable[[protocol.Ready, bool], None] = lambda *_: None

    # --- coming, waiting, going ---

    @property
    def ended_by(self) -> str:
        """The name of the signal that ends this process; empty if none does."""
        return self._signals.ended_by if self._signals is not None else ""

    @property
    def opened(self) -> bool:
        """Whether this site has dialled the server."""
        return self.link is not None

    def open(self) -> bool:
        """Dial the server; False if this site has done so before.

        Raises:
            ClosedError: the connection is a parent process's.
        """
        if os.getpid() != self._pid:
            raise ClosedError(
                "a forked process can't use its parent's session; start a new process"
            )
        if self.link is not None:
            return False
        keep_warm()
        self.link = self._dial(self._server, self.machine.instance.bytes, self.settings.credentials)
        self._thread = threading.Thread(target=self._serve, name="fedcore-site", daemon=True)
        with self._driven() as machine:
            machine.join(time.monotonic())
        self._thread.start()
        self._signals = end_in_order()
        return True

    def join(self) -> None:
        """Wait until the server has answered. A call that follows one that failed asks again.

        Raises:
            TransferTimeout: it did not within the connect timeout; this site asks no more.
            RefusedError: it turned this site away.
        """
        with self._driven() as machine:
            asked = machine.ask_again(time.monotonic())
        if asked and self.link is not None:
            self.link.wake()  # its thread looks again at what is due
        with self.changed:
            asked_at = time.monotonic()
            for _ in self.waiting(f"an answer from {self._server}", connecting=True):
                if self.machine.welcome is not None or self.machine.finish is not None:
                    return
                waited = time.monotonic() - asked_at
                if waited > self.settings.connect_timeout and not self.machine.held:
                    seconds = f"within {self.settings.connect_timeout:g} s"
                    what = (
                        f"no answer from the server at {self._server} {seconds}{self._why_silent()}"
                    )
                    if busy := self.machine.busy:
                        what = f"the server at {self._server} did not take this site up {seconds}: {busy}"
                    error = TransferTimeout(
                        f"{what} (FEDCORE_CONNECT_TIMEOUT changes how long to wait)"
                    )
                    self.machine.give_up(error, "it had no answer for too long")
                    raise error

    def _why_silent(self) -> str:
        hint = self.link.hint if self.link is not None else ""
        return f": {hint}" if hint else "; is fedcore-server running there, and is the port open?"

    def waiting(
        self, what: str, *, connecting: bool = False, bar: Bar | None = None
    ) -> Iterator[None]:
        """Yield until the caller has what it waits for, sleeping on ``changed`` in between.

        Raises what the server refused with, and TransferTimeout when it is silent for longer than the idle
        timeout.
        """
        started = noticed = time.monotonic()
        while True:
            if self.machine.error is not None:
                raise self.machine.error
            if self._closing:
                raise ClosedError("the session is closed")
            yield
            self.changed.wait(CHECK_SECONDS if bar is None else bar.interval)
            if bar is not None:
                bar.tick()
            now = time.monotonic()
            assert self.link is not None
            if (held := self.machine.held_too_long(now)) is not None:
                raise held
            self._warn_unresolved()
            silent = self.link.silent_ms()
            expected = silent is not None and now_ms() <= self.link.exchange.busy_until(b"")
            if (
                now - noticed > NOTICE_SECONDS
                and (silent is None or silent > 5000)
                and not expected
            ):
                noticed = now
                logger.warning(
                    "%s: waiting for %s: nothing heard from %s for %.0f s, still trying%s",
                    self._site, what, self._server, (now - started) if silent is None else silent / 1000,
                    self._why_silent() if silent is None else self.fate(),
                )  # fmt: skip
            if not connecting and (silent or 0) / 1000 > self.settings.idle_timeout:
                raise TransferTimeout(
                    f"{self._server} has been silent for {self.settings.idle_timeout:g} s while waiting "
                    f"for {what} (FEDCORE_IDLE_TIMEOUT changes how long to wait){self.fate()}"
                )

    def _warn_unresolved(self) -> None:
        """Say at once, and once, that the server's name stands for no address, or the proxy does not connect."""
        why = self.link.unresolved if self.link is not None else ""
        if why and why != self._unresolved:
            logger.warning("%s: %s Still trying.", self._site, why)
        self._unresolved = why

    def fate(self) -> str:
        """Return in words what this site knows of its last update."""
        ready, upload = self.machine.ready, self.upload()
        if ready is not None and upload is not None and ready.round:
            how = "whole" if upload[0] == upload[1] else "in part"
            return f"; its update of round {ready.round} was sent {how}; whether it counts is not known yet"
        if self.machine.included:
            return f"; its update of round {self.machine.included} counts"
        return ""

    def close(self) -> bool:
        """Leave the run and free the sockets; False if there is nothing to close any more."""
        if self.link is None or self._closing or os.getpid() != self._pid:
            return False
        self._closing = True
        number = self.ended_by
        with self._driven() as machine:
            machine.leave(
                f"its process was ended by {number}" if number else "the site's process ended"
            )
        self.link.wake()
        if self._thread is not None:
            self._thread.join()
        self.link.close()
        let_go()
        return True

    # --- what this site sends ---

    def send(self, message: protocol.FromSite) -> None:
        """Send a message once."""
        with self._driven() as machine:
            machine.send(message)

    def report(self, word: protocol.Score | protocol.Answer) -> None:
        """Send a score or an answer, now and whenever the server asks for it again."""
        with self._driven() as machine:
            machine.report(word)

    def declare(self, declare: protocol.Declare) -> None:
        """Send this site's tensors, now and to every server that is started again."""
        with self._driven() as machine:
            machine.declare(declare)

    def publish(self, ready: protocol.Ready, update: EncodedUpdate) -> None:
        """Publish an update and announce it until it is withdrawn."""
        with self._driven() as machine:
            self._upload = (self._bytes_out(), update.nbytes, time.monotonic())
            self._uploaded = False
            machine.publish(ready, update)

    def withdraw(self) -> None:
        """Withdraw the published update, if there is one."""
        with self._driven() as machine:
            machine.withdraw()

    def upload(self) -> tuple[int, int] | None:
        """Return about how many bytes of the published update were sent, and how many it has.

        All of them once only some headers are missing, and from then on: how many heartbeats went out is a guess.
        """
        if self.machine.ready is None:
            return None
        before, total, since = self._upload
        beats = int((time.monotonic() - since) * 1000 / HEARTBEAT_MS) + 2
        sent = self._bytes_out() - before - beats * protocol.HEADER_BYTES
        if self._uploaded or sent + 4 * protocol.HEADER_BYTES >= total:
            self._uploaded = True
            return total, total
        return max(0, sent), total

    def _bytes_out(self) -> int:
        assert self.link is not None
        return int(self.link.exchange.stats()["bytes_out"])

    # --- tasks and downloads ---

    def end_task(self, kind: str, round_: int) -> None:
        """Note that a task is done."""
        with self._driven() as machine:
            machine.end_task(kind, round_)

    def pull(self, task: protocol.Task, collector: Collector) -> None:
        """Download a task's model by this collector; `SiteMachine.pulls` and `has_pulled` tell how that stands."""
        assert task.model is not None
        self.stop_pull()
        with self._driven() as machine:
            self._download = task.model.id, collector
            machine.pull(task)

    def stop_pull(self) -> None:
        """End the download, complete or not."""
        with self._driven() as machine:
            machine.stop_pull()
            self._cancel()

    def _cancel(self) -> None:
        download, self._download = self._download, None
        if download is not None and self.link is not None:
            self.link.exchange.cancel(download[1])

    # --- the machine and the background thread ---

    @contextlib.contextmanager
    def _driven(self) -> Iterator[SiteMachine]:
        """Give the machine for one step, carry out what it asks, and hand on its events."""
        with self.changed:
            yield self.machine
            outputs = self.machine.take_outputs()
            for output in outputs:
                self._carry_out(output)
            self.changed.notify_all()
        for output in outputs:  # not under the lock: it may take a while
            narrate(self.settings, output)
            if isinstance(output, out.Settled):
                self.settled(output.ready, output.counts)

    def _carry_out(self, output: out.Output) -> None:
        link = self.link
        if isinstance(output, out.Send):
            assert link is not None
            link.send(output.message)
        elif isinstance(output, out.Pull):
            assert link is not None
            assert self._download is not None
            link.exchange.start(self._download[1])
            link.kick()
        elif isinstance(output, out.StopPull):
            self._cancel()
        elif link is not None:
            out.serve(link.exchange, output)

    def _serve(self) -> None:
        link = self.link
        assert link is not None
        while not self._closing:
            arrived = link.recv(self._patience())
            with self._driven() as machine:
                if isinstance(arrived, Control):
                    machine.receive(arrived.body, time.monotonic())
                elif arrived is not None:
                    self._on_event(arrived)
                if link.refused:
                    machine.fail(RefusedError(link.refused, "key"))
                if link.connections > self._connections:
                    self._connections = link.connections
                    machine.reconnected(time.monotonic())
                machine.tick(time.monotonic())

    def _patience(self) -> float | None:
        """Return for how many seconds the machine needs nothing but what arrives; None: for ever."""
        due = self.machine.due()
        return None if due is None else max(0.0, due - time.monotonic())

    def _on_event(self, event: DataEvent) -> None:
        version = other_version(event.message) if isinstance(event, FrameMalformed) else None
        if version is not None:
            self.machine.other_version(version)
        if isinstance(event, SetDamaged):
            logger.error(
                "%s: what this site offers is not what it trained: %s", self._site, event.message
            )
            return
        if self._download is None or not isinstance(event, CollectorDone | SourceRejected):
            return
        set_id, collector = self._download
        if event.collector != collector.id:
            return
        problem = event.code if isinstance(event, SourceRejected) else ""
        if isinstance(event, SourceRejected):
            logger.warning("%s: download stopped: %s", self._site, event.message)
        self.machine.pulled(set_id, time.monotonic(), problem)
