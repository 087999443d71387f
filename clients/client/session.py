"""A site's part in a run: join, pull the global model, publish updates, leave.

A `Session` knows tensors only as names, dtypes, shapes and raw bytes; the modules beside this one turn
a framework's model into that. One background thread handles what the server says while the script trains,
so that a server that was restarted, or a round that was committed, is noticed at once.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from fedcore import __version__, protocol
from fedcore._core import Collector, Layout
from fedcore.errors import (
    ClosedError,
    FedcoreError,
    LayoutError,
    ProtocolError,
    RefusedError,
    TransferTimeout,
    WeightError,
)
from fedcore.layout import (
    ModelFile,
    Reader,
    TensorSpec,
    compare_layouts,
    create_model,
    layout_hash,
    table,
)
from fedcore.transport import Control, DataEvent, SiteLink

from .settings import SiteSettings

__all__ = ["GlobalModel", "Session", "get_session", "reset_session"]

_NOTICE_SECONDS: Final = 10.0
_HELD_SECONDS: Final = 1.0
_WINDOW_BYTES: Final = 32 << 20

logger = logging.getLogger("fedcore.client")


@dataclass(frozen=True)
class GlobalModel:
    """The global model of one task.

    Attributes:
        kind: ``"train"``: score it, train from it and submit; ``"evaluate"``: score it only.
        round, rounds: this round and how many there are; ``version`` is the model's own number.
        seed: differs per round, the same at all sites.
        specs: names, dtypes and shapes in canonical order.
        tensors: read-only raw bytes by name, valid until the task ends.
    """

    kind: Literal["train", "evaluate"]
    round: int
    rounds: int
    version: int
    seed: int
    specs: Sequence[TensorSpec]
    tensors: Mapping[str, memoryview]


@dataclass
class _Update:
    """What this site publishes until the round is committed."""

    ready: protocol.Ready
    file: ModelFile


@dataclass
class _Held:
    """Another process has this site's name: one of this site's that has just died, or one that lives."""

    error: RefusedError
    since: float
    retry_seconds: float = _HELD_SECONDS


class Session:
    """One site's process in one run. Public methods belong to the thread that trains."""

    def __init__(self, settings: SiteSettings) -> None:
        self._settings = settings
        self.site = settings.site
        self.server = settings.server
        self._instance = uuid.uuid4()
        self._link: SiteLink | None = None
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._scratch: Path | None = None
        self._files: dict[str, ModelFile] = {}
        # Guarded by _changed; the first group is the server's word, the second this site's state.
        self._welcome: protocol.Welcome | None = None
        self._accepted: str | None = None
        self._task: protocol.Task | None = None
        self._finish: protocol.Finish | None = None
        self._error: FedcoreError | None = None
        self._layout: Layout | None = None
        self._declare: protocol.Declare | None = None
        self._update: _Update | None = None
        self._download: tuple[Collector, str] | None = None
        self._model: GlobalModel | None = None
        self._ended: tuple[str, int] | None = None
        self._offered: tuple[str, int] | None = None
        self._scored: int | None = None
        self._sent_at = 0.0
        self._held: _Held | None = None

    # --- what a script calls -----------------------------------------------------------------------

    @property
    def run(self) -> str:
        """Name of the run, once joined."""
        return self._welcome.run if self._welcome else ""

    @property
    def run_id(self) -> str:
        """Random id of the run, once joined."""
        return self._welcome.run_id if self._welcome else ""

    def is_running(self) -> bool:
        """Wait for the next task; False when the run is over.

        True comes back without a task while the server still waits for a first site's model and this script
        has not shown its model yet.

        Raises:
            TransferTimeout: the server did not answer within the connect timeout, or fell silent for
                longer than the idle timeout.
            RefusedError: the server turned this site away; where another process has its name, after the
                connect timeout.
            ClosedError: the last task was not finished, so the next one can't begin.
        """
        self._join()
        if self._model is not None:
            if self._model.kind == "train":
                raise ClosedError(
                    f"round {self._model.round} was received but no update was sent; train and send "
                    "it (trainer.fit(...), trainer.train() or fl.send(...)) inside the loop"
                )
            self.end_task()
        with self._changed:
            for _ in self._waiting("the next task"):
                if self._finish is not None:
                    break
                if self._open_task() is not None or self._expects_model():
                    self._check_progress()
                    return True
        self._report_end()
        self.close()
        return False

    def begin(
        self, specs: Sequence[TensorSpec], files: Mapping[str, str], read: Reader
    ) -> GlobalModel:
        """Return the current task's global model, downloading it on the first call.

        Args:
            specs: names, dtypes and shapes of the tensors that travel; the same on every call.
            files: small JSON files that describe the model, by name, such as ``adapter_config.json``.
            read: gives the local values; called if the server asks this site for the initial model.

        Raises:
            LayoutError: the tensors differ from the server's or from an earlier call's; each is named.
            ClosedError: the run is over.
        """
        self._join()
        layout = self._bind(specs, files)
        if self._model is not None:
            return self._model
        while True:
            task = self._next_task()
            if task.kind == "initial":
                self._publish(layout, read, 0, 1, {})
                self._mark_ended(task)
                continue
            file = self._pull(layout, task)
            if file is None:
                continue  # the server was restarted in between and publishes under another id
            self._model = GlobalModel(
                kind=task.kind,
                round=task.round,
                rounds=task.rounds,
                version=task.version,
                seed=task.seed,
                specs=table(layout),
                tensors={name: view.toreadonly() for name, view in file.views().items()},
            )
            return self._model

    @property
    def bound(self) -> bool:
        """Whether the server has accepted this site's layout."""
        return self._accepted is not None

    def offered_specs(self) -> list[TensorSpec] | None:
        """Return the tensors of the run's model as the server describes them, or None if it has none yet."""
        self._join()
        if self._layout is not None:
            return list(table(self._layout))
        with self._changed:
            for _ in self._waiting("the model's description"):
                if self._task is not None and self._task.tensors is not None:
                    return list(self._task.tensors)
                if self._finish is not None or self._expects_model():
                    return None
        return None

    @property
    def model(self) -> GlobalModel | None:
        """The global model of the task at hand, or None outside one."""
        return self._model

    def score(self, metrics: Mapping[str, float], examples: int) -> None:
        """Report validation metrics of the current global model on ``examples`` local examples.

        The first call per version counts; later ones are ignored.
        """
        model = self._need_model("score")
        if self._scored == model.version:
            return
        self._scored = model.version
        self._send(
            protocol.Score(
                version=model.version,
                metrics={str(k): float(v) for k, v in metrics.items()},
                examples=min(max(1, int(examples)), protocol.MAX_WEIGHT),
            )
        )

    def submit(self, read: Reader, weight: int, metrics: Mapping[str, float] | None = None) -> None:
        """Publish this round's update and end the task; the server pulls it in the background.

        Args:
            read: gives every tensor's bytes; called for one after the other, before this returns.
            weight: number of training examples seen this round, 1 to 2**24 - 1.
            metrics: training metrics to show at the server.

        Raises:
            WeightError: the weight is no such integer.
            ClosedError: no training task is at hand.
        """
        model = self._need_model("submit")
        if model.kind != "train":
            raise ClosedError("an evaluation task takes no update; call end_task()")
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int)
            or not 1 <= weight <= protocol.MAX_WEIGHT
        ):
            raise WeightError(
                f"weight {weight!r}: expected the number of training examples as an integer from 1 to "
                f"{protocol.MAX_WEIGHT}"
            )
        assert self._layout is not None
        task = self._task
        self._publish(self._layout, read, model.round, weight, metrics or {})
        self._model = None
        if task is not None:
            self._mark_ended(task)

    def end_task(self) -> None:
        """End an evaluation task."""
        model, self._model = self._model, None
        if model is not None:
            with self._changed:
                self._ended = (model.kind, model.round)
                self._changed.notify_all()
            if self._scored != model.version:
                self._scored = model.version
                self._send(protocol.Score(version=model.version, metrics={}, examples=1))

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Show training metrics at the server while a round is under way."""
        if self._link is not None:
            self._send(
                protocol.Log(
                    round=self._task.round if self._task else 0,
                    step=step or 0,
                    metrics={str(k): float(v) for k, v in metrics.items()},
                )
            )

    def problem(self, text: str) -> None:
        """Tell the server about a local error; ``text`` must hold no private paths or data."""
        if self._link is not None:
            self._send(protocol.Problem(message=text[:4096]))

    def system_info(self) -> dict[str, str | int]:
        """Return ``run``, ``site``, ``server``, ``round``, ``rounds`` and ``version``."""
        task = self._task
        return {
            "run": self.run,
            "site": self.site,
            "server": self.server,
            "round": task.round if task else 0,
            "rounds": self._welcome.rounds if self._welcome else 0,
            "version": task.version if task else 0,
        }

    def close(self) -> None:
        """Leave the run and free the sockets; may be called more than once."""
        if self._link is None or self._closing or os.getpid() != self._pid:
            return
        self._closing = True
        if self._error is None:
            self._send(protocol.Leave(reason="the site's process ended"))
        self._link.wake()
        if self._thread is not None:
            self._thread.join()
        self._link.close()
        if self._scratch is not None and self._settings.work is None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    # --- waiting -----------------------------------------------------------------------------------

    def _join(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError(
                "a forked process can't use its parent's session; start a new process"
            )
        if self._link is None:
            self._link = SiteLink(self.server, self._instance.bytes)
            self._thread = threading.Thread(target=self._serve, name="fedcore-site", daemon=True)
            self._thread.start()
            atexit.register(self.close)
            self._say_join()
        with self._changed:
            deadline = time.monotonic() + self._settings.connect_timeout
            for _ in self._waiting(f"an answer from {self.server}", connecting=True):
                if self._welcome is not None or self._finish is not None:
                    return
                if time.monotonic() > deadline:
                    if self._held is not None:
                        raise self._held.error
                    raise TransferTimeout(
                        f"no answer from the server at {self.server} within "
                        f"{self._settings.connect_timeout:g} s; is fedcore-server running there, and is the "
                        "port open? (FEDCORE_CONNECT_TIMEOUT changes how long to wait)"
                    )

    def _waiting(self, what: str, *, connecting: bool = False) -> Iterator[None]:
        """Yield until the caller has what it waits for, sleeping on the condition in between.

        The caller holds ``_changed``. Raises what the server refused with, and TransferTimeout when it is
        silent for longer than the idle timeout.
        """
        started = noticed = time.monotonic()
        while True:
            if self._error is not None:
                raise self._error
            if self._closing:
                raise ClosedError("the session is closed")
            yield
            self._changed.wait(0.5)
            now = time.monotonic()
            assert self._link is not None
            held = self._held
            if held is not None and now - held.since > self._settings.connect_timeout:
                raise held.error
            silent = self._link.silent_ms()
            if now - noticed > _NOTICE_SECONDS and (silent is None or silent > 5000):
                noticed = now
                logger.warning(
                    "%s: waiting for %s: nothing heard from %s for %.0f s, still trying",
                    self.site, what, self.server, (now - started) if silent is None else silent / 1000,
                )  # fmt: skip
            if not connecting and (silent or 0) / 1000 > self._settings.idle_timeout:
                raise TransferTimeout(
                    f"{self.server} has been silent for {self._settings.idle_timeout:g} s while waiting "
                    f"for {what} (FEDCORE_IDLE_TIMEOUT changes how long to wait)"
                )

    def _open_task(self) -> protocol.Task | None:
        task = self._task
        return None if task is None or (task.kind, task.round) == self._ended else task

    def _expects_model(self) -> bool:
        return (
            self._layout is None
            and self._task is None
            and self._welcome is not None
            and not self._welcome.has_model
        )

    def _check_progress(self) -> None:
        task = self._open_task()
        offer = (task.kind, task.round) if task else ("none", -1)
        if offer == self._offered:
            raise ClosedError(
                "the loop asked for work again without touching the task at hand: call "
                "trainer.validate and trainer.fit, trainer.evaluate and trainer.train, or fl.receive and "
                "fl.send in each pass"
            )
        self._offered = offer

    def _next_task(self) -> protocol.Task:
        with self._changed:
            for _ in self._waiting("the next task"):
                if self._finish is not None:
                    raise ClosedError(f"the run is over: {self._finish.message or 'finished'}")
                task = self._open_task()
                if task is not None:
                    return task
        raise AssertionError("unreachable")

    def _need_model(self, call: str) -> GlobalModel:
        if self._model is None:
            raise ClosedError(
                f"{call}: no task is at hand; call it inside `while fl.is_running()`, after the global "
                "model was received"
            )
        return self._model

    def _mark_ended(self, task: protocol.Task) -> None:
        with self._changed:
            self._ended = (task.kind, task.round)
            self._offered = None
            self._changed.notify_all()

    # --- tensors -----------------------------------------------------------------------------------

    def _bind(self, specs: Sequence[TensorSpec], files: Mapping[str, str]) -> Layout:
        assert self._welcome is not None
        if self._layout is not None:
            difference = compare_layouts(
                specs, table(self._layout), "the model now", "the model before"
            )
            if difference:
                raise LayoutError(f"the model changed since this site joined: {difference}")
            return self._layout
        layout = Layout([(n, d, list(s)) for n, d, s in specs], self._welcome.chunk_bytes)
        if layout.total_bytes == 0:
            raise LayoutError("the model has no trainable tensor, so there is nothing to send")
        declare = protocol.Declare(
            tensors=[(n, d, list(s)) for n, d, s in table(layout)], files=dict(files)
        )
        self._send(declare)
        with self._changed:
            self._declare, self._layout = declare, layout
            for _ in self._waiting("the server to check the layout"):
                if self._accepted is not None:
                    if self._accepted != layout_hash(layout):
                        raise ProtocolError(
                            "the server accepted another layout than this site declared"
                        )
                    break
                if self._finish is not None:
                    raise ClosedError(f"the run is over: {self._finish.message or 'finished'}")
        return layout

    def _scratch_path(self, name: str) -> Path:
        if self._scratch is None:
            if self._settings.work is None:
                self._scratch = Path(tempfile.mkdtemp(prefix="fedcore-"))
            else:
                self._scratch = self._settings.work
                self._scratch.mkdir(parents=True, exist_ok=True)
        return self._scratch / f"{self.site}-{os.getpid()}-{name}.safetensors"

    def _file(self, layout: Layout, name: str) -> ModelFile:
        """Return a scratch file, the same in every round: overwriting one is far cheaper than a new one.

        It is unlinked at once, and so goes with the process.
        """
        if name not in self._files:
            path = self._scratch_path(name)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            self._files[name] = create_model(path, layout)
            path.unlink()
        return self._files[name]

    def _publish(
        self, layout: Layout, read: Reader, round_: int, weight: int, metrics: Mapping[str, float]
    ) -> None:
        self._withdraw()
        file = self._file(layout, "update")
        file.fill(read)
        set_id = uuid.uuid4()
        ready = protocol.Ready(
            round=round_,
            set_id=set_id.hex,
            layout_hash=layout_hash(layout),
            weight=weight,
            metrics={str(k): float(v) for k, v in metrics.items()},
        )
        assert self._link is not None
        self._link.exchange.publish(
            set_id.bytes, file.file, file.data_offset, layout.total_bytes, layout.chunk_bytes
        )
        with self._changed:
            self._update = _Update(ready, file)
        self._send(ready)

    def _withdraw(self) -> None:
        with self._changed:
            update, self._update = self._update, None
        if update is not None and self._link is not None:
            self._link.exchange.withdraw(bytes.fromhex(update.ready.set_id))

    def _pull(self, layout: Layout, task: protocol.Task) -> ModelFile | None:
        """Download a published global model; None when the server no longer publishes it."""
        assert task.set_id is not None
        assert self._link is not None
        file = self._file(layout, "global")
        source = (b"", bytes.fromhex(task.set_id), 1)
        collector = Collector(
            layout, [source], file.file, file.data_offset, None, _WINDOW_BYTES, check_finite=False
        )
        with self._changed:
            self._download = (collector, "")
        self._link.exchange.start(collector)
        self._link.kick()
        try:
            with self._changed:
                for _ in self._waiting(f"model {task.version}"):
                    outcome = self._download[1]
                    if outcome == "done":
                        return file
                    if outcome or self._superseded(task):
                        self._task = None if self._task is task else self._task
                        return None
                    if self._finish is not None:
                        raise ClosedError(f"the run is over: {self._finish.message or 'finished'}")
        finally:
            self._link.exchange.cancel(collector)
            with self._changed:
                self._download = None
        return None

    def _superseded(self, task: protocol.Task) -> bool:
        return self._task is not None and self._task.set_id != task.set_id

    # --- the background thread ---------------------------------------------------------------------

    def _send(self, message: protocol.FromSite) -> None:
        assert self._link is not None
        self._link.send(message)

    def _say_join(self) -> None:
        self._sent_at = time.monotonic()
        self._send(protocol.Join(version=__version__, site=self.site, instance=self._instance.hex))

    def _serve(self) -> None:
        assert self._link is not None
        while not self._closing:
            arrived = self._link.recv(1.0)
            if isinstance(arrived, Control):
                try:
                    self._handle(protocol.decode_from_server(arrived.body))
                except ProtocolError as error:
                    logger.error("%s: the server at %s sent a %s", self.site, self.server, error)
            elif arrived is not None:
                self._handle_event(arrived)
            self._resend()

    def _resend(self) -> None:
        """Say again what has had no answer for a while: a message can be lost when a link is cut.

        While the script works on its task nothing is due, and yet a server that was started again in between
        must learn that this site is there.
        """
        held = self._held
        interval = protocol.REPEAT_SECONDS if held is None else held.retry_seconds
        if time.monotonic() - self._sent_at < interval or self._finish is not None:
            return
        with self._changed:
            busy = self._model is not None or self._download is not None
            update = self._update
        self._sent_at = time.monotonic()
        if (
            held is not None
            or self._welcome is None
            or (self._layout is not None and self._accepted is None)
        ):
            self._say_join()
        elif update is not None:
            self._send(update.ready)
        elif busy or self._open_task() is not None:
            self._send(protocol.Alive())
        else:
            self._say_join()

    def _handle(self, message: protocol.FromServer) -> None:
        if isinstance(message, protocol.Rejoin):
            self._say_join()
            return
        with self._changed:
            if isinstance(message, protocol.Welcome):
                self._on_welcome(message)
            elif isinstance(message, protocol.Accepted):
                self._accepted = message.layout_hash
                if self._update is not None:
                    self._send(self._update.ready)
            elif isinstance(message, protocol.Refused) and message.code == "name-in-use":
                self._on_name_in_use(message)
            elif isinstance(message, protocol.Refused):
                self._error = (
                    LayoutError(message.message)
                    if message.code == "layout"
                    else RefusedError(message.message, message.code)
                )
            elif isinstance(message, protocol.Task):
                self._task = message
            elif isinstance(message, protocol.Finish):
                self._finish = message
            self._changed.notify_all()
        if isinstance(message, protocol.Commit | protocol.Dropped):
            self._on_outcome(message)

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
            self.site, self._settings.connect_timeout,
        )  # fmt: skip

    def _on_welcome(self, welcome: protocol.Welcome) -> None:
        if self._welcome is not None and self._welcome.run_id != welcome.run_id:
            self._error = RefusedError(
                f"the server at {self.server} now serves another run ({welcome.run!r}); start this site "
                "again to take part in it",
                "other-run",
            )
            return
        self._welcome = welcome
        self._held = None
        if self._declare is not None:
            self._send(self._declare)

    def _on_outcome(self, message: protocol.Commit | protocol.Dropped) -> None:
        update = self._update
        if isinstance(message, protocol.Dropped):
            logger.warning("%s: round %d: %s", self.site, message.round, message.message)
            if update is not None and update.ready.round == message.round:
                self._withdraw()
            return
        if update is not None and update.ready.round <= message.version:
            self._withdraw()
        if message.version:
            logger.info(
                "%s: round %d is committed (%d sites%s)%s",
                self.site, message.version, len(message.participants),
                "" if message.included else ", without this one",
                f": {message.message}" if message.message else "",
            )  # fmt: skip

    def _handle_event(self, event: DataEvent) -> None:
        with self._changed:
            if self._download is None or len(event) < 2 or event[1] != self._download[0].id:
                return
            if event[0] == "done":
                self._download = (self._download[0], "done")
            elif event[0] == "rejected":
                self._download = (self._download[0], str(event[3]))
                logger.warning("%s: download stopped: %s", self.site, event[4])
            self._changed.notify_all()

    def _report_end(self) -> None:
        finish = self._finish
        if finish is not None:
            level = logging.INFO if finish.ok else logging.WARNING
            best = (
                "" if finish.best_version is None else f"; best model: round {finish.best_version}"
            )
            logger.log(level, "%s: the run is over%s%s", self.site, best,
                       f": {finish.message}" if finish.message else "")  # fmt: skip


_session: Session | None = None


def get_session() -> Session:
    """Return this process's session, made on first use from the environment or the kit folder.

    Raises:
        ConfigError: neither says where the server is and which site this is; the text tells what to set.
    """
    global _session  # noqa: PLW0603 - one session per process is the contract
    if _session is None:
        _show_log()
        _session = Session(SiteSettings.from_environment())
    return _session


def reset_session() -> None:
    """Close and forget this process's session."""
    global _session  # noqa: PLW0603
    if _session is not None:
        _session.close()
    _session = None


def _show_log() -> None:
    """Give the client's messages a handler on stderr unless the application configured logging."""
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fedcore %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
