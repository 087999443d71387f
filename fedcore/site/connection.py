"""A site's conversation with the server: what the server has said, and what this site has to say again.

One background thread listens while the script trains, so that a server that was started again, or a round that
was committed, is noticed at once. `fedcore.site.session` decides what is done with it.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from fedcore import __version__, protocol
from fedcore._core import Collector
from fedcore.encoding import EncodedUpdate, can_pack
from fedcore.errors import (
    ClosedError,
    FedcoreError,
    LayoutError,
    ProtocolError,
    RefusedError,
    TransferTimeout,
)
from fedcore.transport.link import HEARTBEAT_MS, Control, DataEvent, SiteLink, now_ms, other_version
from fedcore.words import plural

from .memory import keep_warm
from .progress import Bar
from .settings import SiteSettings
from .signals import end_in_order, ended_by, let_go

__all__ = ["Connection"]

_CHECK_SECONDS: Final = 0.5
_NOTICE_SECONDS: Final = 10.0
_HELD_SECONDS: Final = 1.0
_SETTLE_SECONDS: Final = 1.5
"""So long after it is connected again a site waits to be asked to join, before it says again what may be lost."""

logger = logging.getLogger("fedcore.client")


@dataclass
class _Held:
    """Another process has this site's name: one of this site's that has just died, or one that lives."""

    error: RefusedError
    since: float
    retry_seconds: float = _HELD_SECONDS


class Connection:
    """One process's place at the server.

    Public methods belong to the thread that trains. It holds ``changed`` while it reads the attributes or goes
    through `waiting`; the background thread notifies it of each change.

    Attributes:
        welcome, accepted, task, finish: the server's last word of each kind; ``accepted`` is a layout's hash.
        wanted_run: name or id of the run that this site wants to take part in; None: of any.
        included: the last committed version that holds this site's update, as far as it was told.
        settled: called in the background once the fate of a published update is known, with its announcement and
            whether it counted.
    """

    def __init__(self, settings: SiteSettings) -> None:
        self._settings = settings
        self._site, self._server = settings.site, settings.server
        self._instance = uuid.uuid4()
        self.wanted_run = settings.run
        self._link: SiteLink | None = None
        self._pid = os.getpid()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._sent_at = 0.0
        self._connections = 1
        self._unresolved = ""
        self.changed = threading.Condition()
        self.welcome: protocol.Welcome | None = None
        self.accepted: str | None = None
        self.task: protocol.Task | None = None
        self.finish: protocol.Finish | None = None
        self.included: int | None = None
        self._error: FedcoreError | None = None
        self._held: _Held | None = None
        self._ended: tuple[str, int] | None = None
        self._declare: protocol.Declare | None = None
        self._warned: set[str] = set()
        self._ready: protocol.Ready | None = None
        self._word: protocol.Score | protocol.Answer | None = None
        self._upload = (0, 0, 0.0)
        self._uploaded = False
        self._download: tuple[Collector, str] | None = None
        self.settled: Callable[[protocol.Ready, bool], None] = lambda *_: None

    # --- coming, waiting, going ---

    @property
    def opened(self) -> bool:
        """Whether this site has dialled the server."""
        return self._link is not None

    def open(self) -> bool:
        """Dial the server; False if this site has done so before.

        Raises:
            ClosedError: the connection is a parent process's.
        """
        if os.getpid() != self._pid:
            raise ClosedError(
                "a forked process can't use its parent's session; start a new process"
            )
        if self._link is not None:
            return False
        keep_warm()
        self._link = SiteLink(self._server, self._instance.bytes, self._settings.credentials)
        self._thread = threading.Thread(target=self._serve, name="fedcore-site", daemon=True)
        self._thread.start()
        end_in_order()
        self._say_join()
        return True

    def join(self) -> None:
        """Wait until the server has answered.

        Raises:
            TransferTimeout: it did not within the connect timeout.
            RefusedError: it turned this site away.
        """
        with self.changed:
            deadline = time.monotonic() + self._settings.connect_timeout
            for _ in self.waiting(f"an answer from {self._server}", connecting=True):
                if self.welcome is not None or self.finish is not None:
                    return
                if time.monotonic() > deadline and self._held is None:
                    raise TransferTimeout(
                        f"no answer from the server at {self._server} within "
                        f"{self._settings.connect_timeout:g} s{self._why_silent()} "
                        "(FEDCORE_CONNECT_TIMEOUT changes how long to wait)"
                    )

    def _why_silent(self) -> str:
        hint = self._link.hint if self._link is not None else ""
        return f": {hint}" if hint else "; is fedcore-server running there, and is the port open?"

    @property
    def rounds(self) -> int:
        """How many rounds the run has, once joined."""
        return self.welcome.rounds if self.welcome else 0

    def waiting(
        self, what: str, *, connecting: bool = False, bar: Bar | None = None
    ) -> Iterator[None]:
        """Yield until the caller has what it waits for, sleeping on ``changed`` in between.

        Raises what the server refused with, and TransferTimeout when it is silent for longer than the idle
        timeout.
        """
        started = noticed = time.monotonic()
        while True:
            if self._error is not None:
                raise self._error
            if self._closing:
                raise ClosedError("the session is closed")
            yield
            self.changed.wait(_CHECK_SECONDS if bar is None else bar.interval)
            if bar is not None:
                bar.tick()
            now = time.monotonic()
            assert self._link is not None
            held = self._held
            if held is not None and now - held.since > self._settings.connect_timeout:
                raise held.error
            self._warn_unresolved()
            silent = self._link.silent_ms()
            expected = silent is not None and now_ms() <= self._link.exchange.busy_until(b"")
            if (
                now - noticed > _NOTICE_SECONDS
                and (silent is None or silent > 5000)
                and not expected
            ):
                noticed = now
                logger.warning(
                    "%s: waiting for %s: nothing heard from %s for %.0f s, still trying%s",
                    self._site, what, self._server, (now - started) if silent is None else silent / 1000,
                    self._why_silent() if silent is None else self.fate(),
                )  # fmt: skip
            if not connecting and (silent or 0) / 1000 > self._settings.idle_timeout:
                raise TransferTimeout(
                    f"{self._server} has been silent for {self._settings.idle_timeout:g} s while waiting "
                    f"for {what} (FEDCORE_IDLE_TIMEOUT changes how long to wait){self.fate()}"
                )

    def _warn_unresolved(self) -> None:
        """Say at once, and once, that the server's name stands for no address."""
        why = self._link.unresolved if self._link is not None else ""
        if why and why != self._unresolved:
            logger.warning("%s: %s Still trying.", self._site, why)
        self._unresolved = why

    def fate(self) -> str:
        """Return in words what this site knows of its last update."""
        ready, upload = self._ready, self.upload()
        if ready is not None and upload is not None and ready.round:
            how = "whole" if upload[0] == upload[1] else "in part"
            return f"; its update of round {ready.round} was sent {how}; whether it counts is not known yet"
        if self.included:
            return f"; its update of round {self.included} counts"
        return ""

    @property
    def has_done_all(self) -> bool:
        """Whether no task of the run is left for this site, as far as it was told."""
        task = self.task
        return (
            task is not None
            and self.open_task() is None
            and task.kind in ("train", "evaluate", "infer")
            and task.round >= task.rounds
        )

    def close(self) -> bool:
        """Leave the run and free the sockets; False if there is nothing to close any more."""
        if self._link is None or self._closing or os.getpid() != self._pid:
            return False
        self._closing = True
        if self._error is None:
            number = ended_by()
            reason = f"its process was ended by {number}" if number else "the site's process ended"
            self.send(protocol.Leave(reason=reason))
        self._link.wake()
        if self._thread is not None:
            self._thread.join()
        self._link.close()
        let_go()
        return True

    # --- what this site says ---

    def send(self, message: protocol.FromSite) -> None:
        """Say something once."""
        assert self._link is not None
        self._link.send(message)

    def say(self, word: protocol.Score | protocol.Answer) -> None:
        """Say what this site has to say of a model, now and whenever the server asks for it again."""
        with self.changed:
            self._word = word
        self.send(word)

    def declare(self, declare: protocol.Declare) -> None:
        """Show this site's tensors, now and to every server that is started again."""
        self.send(declare)
        with self.changed:
            self._declare = declare

    def publish(self, ready: protocol.Ready, update: EncodedUpdate) -> None:
        """Publish an update and announce it until it is withdrawn."""
        assert self._link is not None
        self._link.exchange.publish_encoded(
            bytes.fromhex(ready.model.id),
            update.file,
            update.offsets,
            update.encodings,
            update.checksums,
        )
        with self.changed:
            self._ready = ready
            self._upload = (self._bytes_out(), update.nbytes, time.monotonic())
            self._uploaded = False
        self.send(ready)

    def withdraw(self) -> None:
        """Publish the last update no longer, if there is one."""
        with self.changed:
            ready, self._ready = self._ready, None
        if ready is not None and self._link is not None:
            self._link.exchange.withdraw(bytes.fromhex(ready.model.id))

    def _settle(self, rounds: range, included_in: int | None) -> None:
        """Withdraw the update if it is of one of ``rounds``, and tell whether it counted."""
        with self.changed:
            ready = self._ready
            if ready is None or ready.round not in rounds:
                return
            self.withdraw()
        self.settled(ready, ready.round == included_in)

    def _settle_before(self, task: protocol.Task) -> None:
        """Learn from a task what became of an update whose `Commit` did not come: the server was killed before."""
        ready = self._ready
        if ready is None or ready.round > task.version or task.kind in ("initial", "submit"):
            return
        self._settle(range(task.version + 1), task.included)
        if not ready.round:
            return
        counts = ready.round == task.included
        logger.log(
            logging.INFO if counts else logging.WARNING,
            "%s: round %d is committed, %s",
            self._site, ready.round,
            "with this site's update" if counts else "without this site's update, which does not count",
        )  # fmt: skip

    def upload(self) -> tuple[int, int] | None:
        """Return about how many bytes of the published update were sent, and how many it has.

        All of them once only some headers are missing, and from then on: how many heartbeats went out is a guess.
        """
        if self._ready is None:
            return None
        before, total, since = self._upload
        beats = int((time.monotonic() - since) * 1000 / HEARTBEAT_MS) + 2
        sent = self._bytes_out() - before - beats * protocol.HEADER_BYTES
        if self._uploaded or sent + 4 * protocol.HEADER_BYTES >= total:
            self._uploaded = True
            return total, total
        return max(0, sent), total

    def _bytes_out(self) -> int:
        assert self._link is not None
        return int(self._link.exchange.stats()["bytes_out"])

    # --- tasks and downloads ---

    def open_task(self) -> protocol.Task | None:
        """Return the task at hand, or None after its end."""
        task = self.task
        return None if task is None or (task.kind, task.round) == self._ended else task

    def end_task(self, kind: str, round_: int) -> None:
        """Note that a task is done."""
        with self.changed:
            self._ended = (kind, round_)
            self.changed.notify_all()

    def start(self, collector: Collector) -> None:
        """Begin a download."""
        assert self._link is not None
        with self.changed:
            self._download = (collector, "")
        self._link.exchange.start(collector)
        self._link.kick()

    def outcome(self) -> str:
        """Return how the download under way ended: ``"done"``, why it was stopped, or nothing yet."""
        return self._download[1] if self._download is not None else ""

    def stop(self) -> None:
        """End the download under way, complete or not."""
        with self.changed:
            download, self._download = self._download, None
        if download is not None and self._link is not None:
            self._link.exchange.cancel(download[0])

    # --- the background thread ---

    def _say_join(self) -> None:
        self._sent_at = time.monotonic()
        self.send(
            protocol.Join(
                version=__version__,
                site=self._site,
                instance=self._instance.hex,
                features=protocol.features(lossless=can_pack()),
                run=self.wanted_run,
            )
        )

    def _serve(self) -> None:
        assert self._link is not None
        while not self._closing:
            arrived = self._link.recv(1.0)
            if isinstance(arrived, Control):
                try:
                    message = protocol.decode_from_server(arrived.body)
                    if self.welcome is None or protocol.is_of_run(message, self.welcome.run_id):
                        self._handle(message)
                except ProtocolError as error:
                    logger.error("%s: the server at %s sent a %s", self._site, self._server, error)
            elif arrived is not None:
                self._handle_event(arrived)
            if self._link.refused:
                self._note_refusal(self._link.refused)
            self._repeat()

    def _note_refusal(self, why: str) -> None:
        """The link will not be taken whatever this site says: tell the thread that waits."""
        with self.changed:
            if self._error is None:
                self._error = RefusedError(why, "key")
                self.changed.notify_all()

    def _repeat(self) -> None:
        """Say again what has had no answer for a while: a message can be lost when a link is cut.

        While the script works on its task nothing is due, and yet a server that was started again in between
        must learn that this site is there.
        """
        held = self._held
        interval = protocol.REPEAT_SECONDS if held is None else held.retry_seconds
        assert self._link is not None
        if self._link.connections > self._connections:
            self._connections = self._link.connections
            self._sent_at = min(self._sent_at, time.monotonic() - interval + _SETTLE_SECONDS)
        if time.monotonic() - self._sent_at < interval or self.finish or self._error:
            return
        with self.changed:
            joined = held is None and self.welcome is not None
            joined = joined and (self._declare is None or self.accepted is not None)
            ready, task = self._ready, self.open_task()
        self._sent_at = time.monotonic()
        if joined and ready is not None:
            self.send(ready)
        elif joined and task is not None:
            self.send(protocol.Alive())
        else:
            self._say_join()

    def _handle(self, message: protocol.FromServer) -> None:
        if isinstance(message, protocol.Rejoin):
            if self._error is None:  # a site that was refused does not come again by itself
                self._say_join()
            return
        with self.changed:
            if isinstance(message, protocol.Welcome):
                self._on_welcome(message)
            elif isinstance(message, protocol.Accepted):
                self.accepted = message.layout_hash
                self._on_warnings(message.warnings)
                if self._ready is not None:
                    self.send(self._ready)
            elif isinstance(message, protocol.Refused):
                self._on_refused(message)
            elif isinstance(message, protocol.Task):
                self.task = message
                if self._word is not None and self.open_task() is None:
                    self.send(
                        self._word
                    )  # it did not come through, or the server was started again
            elif isinstance(message, protocol.Finish):
                self.finish = message
            elif isinstance(message, protocol.Stopped):
                self._on_stopped(message)
            self._note_included(message)
            self.changed.notify_all()
        self._on_outcome(message)

    def _note_included(self, message: protocol.FromServer) -> None:
        if isinstance(message, protocol.Commit) and message.included:
            self.included = message.version
        elif isinstance(message, protocol.Task) and message.included is not None:
            self.included = message.included

    def _on_stopped(self, stopped: protocol.Stopped) -> None:
        """Only say so: as after a crash, all that this site waits for comes of the server that is started next."""
        if self.finish is None:
            logger.warning(
                "%s: the server at %s has stopped because %s; waiting for it to be started again, for up to %g s",
                self._site, self._server, stopped.message, self._settings.idle_timeout,
            )  # fmt: skip

    def _on_warnings(self, warnings: Sequence[str]) -> None:
        """Show what differs from other sites; a server that is started again says it again."""
        for text in warnings:
            if text not in self._warned:
                self._warned.add(text)
                logger.warning("%s: %s", self._site, text)

    def _on_refused(self, refused: protocol.Refused) -> None:
        if refused.code == "name-in-use":
            self._on_name_in_use(refused)
        elif refused.code == "layout":
            self._error = LayoutError(refused.message)
        else:
            self._error = RefusedError(refused.message, refused.code)

    def _on_name_in_use(self, refused: protocol.Refused) -> None:
        """Go on asking: the server may not have noticed yet that this site's last process has died."""
        error = RefusedError(refused.message, refused.code)
        if self._held is not None:
            self._held.error = error
            self._held.retry_seconds = min(1.5 * self._held.retry_seconds, protocol.REPEAT_SECONDS)
            return
        self._held = _Held(error, time.monotonic())
        logger.warning(
            "site %s is still held by an earlier connection; waiting for up to %g s",
            self._site, self._settings.connect_timeout,
        )  # fmt: skip

    def _on_welcome(self, welcome: protocol.Welcome) -> None:
        if self.welcome is not None and self.welcome.run_id != welcome.run_id:
            same = welcome.run == self.welcome.run
            what = "under another id, as after a rollback" if same else "and not this site's"
            self._error = RefusedError(
                f"the server at {self._server} now serves run {welcome.run!r} {what}; start this site "
                "again to take part in it",
                "other-run",
            )
            # The server has taken this site for one that takes part: it would wait for it, and show it as lost.
            assert self._link is not None
            self._link.run_id = welcome.run_id
            reason = (
                "it took part in the run before this one, or under its earlier id: start it again"
            )
            self.send(protocol.Leave(reason=reason))
            return
        if self.wanted_run not in (None, welcome.run, welcome.run_id):
            self._error = RefusedError(
                f"the server at {self._server} serves run {welcome.run!r}, and not {self.wanted_run!r}",
                "other-run",
            )
            return
        if self.welcome is None:
            logger.info("%s: joined run %s at %s", self._site, welcome.run, self._server)
        self.welcome = welcome
        assert self._link is not None
        self._link.run_id = welcome.run_id
        self._held = None
        if self._declare is not None:
            self.send(self._declare)
        elif self._ready is not None:  # one that an earlier process has trained
            self.send(self._ready)

    def _on_outcome(self, message: protocol.FromServer) -> None:
        """Settle the update that a message tells the fate of."""
        if isinstance(message, protocol.Task):
            self._settle_before(message)
        elif isinstance(message, protocol.Dropped):
            where = f"round {message.round}: " if message.round else ""
            logger.warning("%s: %s%s", self._site, where, message.message)
            self._settle(range(message.round, message.round + 1), None)
        elif isinstance(message, protocol.Commit):
            self._settle(range(message.version + 1), message.version if message.included else None)
            self._tell_commit(message)

    def _tell_commit(self, message: protocol.Commit) -> None:
        if message.version:
            logger.info(
                "%s: round %d of %d is committed (%s%s)%s",
                self._site, message.version, self.rounds, plural(len(message.participants), "site"),
                "" if message.included else ", without this one",
                f": {message.message}" if message.message else "",
            )  # fmt: skip

    def _handle_event(self, event: DataEvent) -> None:
        with self.changed:
            version = other_version(event[2]) if event[0] == "malformed" else None
            if version is not None and self.welcome is None:
                self._error = RefusedError(
                    f"the server at {self._server} speaks protocol {version}, this site "
                    f"{protocol.PROTOCOL_VERSION} (fedcore {__version__}); install the same version of fedcore on "
                    "both sides",
                    "version",
                )
                self.changed.notify_all()
                return
            if event[0] == "damaged":
                logger.error(
                    "%s: what this site offers is not what it trained: %s", self._site, event[2]
                )
                return
            if self._download is None or len(event) < 2 or event[1] != self._download[0].id:
                return
            if event[0] == "done":
                self._download = (self._download[0], "done")
            elif event[0] == "rejected":
                self._download = (self._download[0], str(event[3]))
                logger.warning("%s: download stopped: %s", self._site, event[4])
            self.changed.notify_all()
