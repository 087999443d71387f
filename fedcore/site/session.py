"""A site's part in a run: join, pull the global model, publish updates, leave.

A `Session` knows tensors only as names, dtypes, shapes and raw bytes; the modules beside this one turn
a framework's model into that. What is said to the server, and heard from it, is `fedcore.site.connection`'s,
what a site waits for `fedcore.site.waits`'s, and what becomes of its updates `fedcore.site.updates`'s.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from fedcore import protocol
from fedcore._core import Layout, same_bytes
from fedcore.errors import (
    ClosedError,
    ConfigError,
    LayoutError,
    ProtocolError,
    RunEndedError,
    TransferTimeout,
    WeightError,
)
from fedcore.files.frozen import FrozenGroup
from fedcore.layout import TensorSpec, compare_layouts, layout_hash, table
from fedcore.model_file import Reader
from fedcore.roles import Pairs, roles_message
from fedcore.transport.ends import Dial

from .connection import Connection
from .factors import Factors
from .metrics import MetricCheck, MetricLog
from .received import Received
from .settings import SiteSettings
from .unchanged import Unchanged
from .updates import Updates
from .waits import Waits

__all__ = [
    "GlobalModel",
    "Outcome",
    "Session",
    "changed_layout",
]

_LEVELS: Final = {
    "complete": logging.INFO,
    "stopped": logging.WARNING,
    "failed": logging.ERROR,
}

Outcome = Literal["complete", "stopped", "failed", "unknown"]
"""How a run ended: all rounds are done, an operator ended it, it was given up, or the server did not say so."""

logger = logging.getLogger("fedcore.client")


@dataclass(frozen=True)
class GlobalModel:
    """The global model of one task.

    Attributes:
        kind: ``"train"``: score it, train from it and submit; ``"submit"``: the same, but the update is to be a
            model of its own; ``"evaluate"``: score it only; ``"infer"``: answer with outputs of it.
        round, rounds: this round and how many there are; ``version`` is the model's own number.
        seed: differs per round, the same at all sites.
        specs: names, dtypes and shapes in canonical order.
        tensors: read-only raw bytes by name, valid until the task ends.
    """

    kind: Literal["train", "submit", "evaluate", "infer"]
    round: int
    rounds: int
    version: int
    seed: int
    specs: Sequence[TensorSpec]
    tensors: Mapping[str, memoryview]

    @property
    def trains(self) -> bool:
        """Whether the task ends with an update."""
        return self.kind in ("train", "submit")


class Session:
    """One site's process in one run. Public methods belong to the thread that trains.

    Args:
        settings: where the server is, and which site this is.
        dial: connects to it; `fedcore.transport.local.LocalNetwork.dial` does so without sockets. None: over TCP.

    Attributes:
        connection: the thread that talks with the server.
    """

    def __init__(self, settings: SiteSettings, dial: Dial | None = None) -> None:
        self.site = settings.site
        self.server = settings.server
        self._clip = settings.clip
        self.connection = Connection(settings, dial)
        self._machine = self.connection.machine
        self._waits = Waits(self.site, self.connection)
        self._check = MetricCheck()
        self._updates = Updates(settings, self.connection, self._check)
        self._layout: Layout | None = None
        self._factors = Factors(None, ())
        self._model: GlobalModel | None = None
        self._offered: tuple[str, int] | None = None
        self._standing = (0, 0)
        self._outcome: Outcome | None = None
        self._score: protocol.Score | None = None
        self._log = MetricLog(self._send_log)
        self.took_part = False
        """Whether a task was begun, or this site's model was asked for."""

    # --- what a script calls -----------------------------------------------------------------------

    @property
    def run(self) -> str:
        """Name of the run, once joined."""
        return self._machine.welcome.run if self._machine.welcome else ""

    @property
    def run_id(self) -> str:
        """Random id of the run, once joined."""
        return self._machine.welcome.run_id if self._machine.welcome else ""

    @property
    def ended_by(self) -> str:
        """The name of the signal that ends this process, once joined; empty if none does."""
        return self.connection.ended_by

    @property
    def lora(self) -> protocol.LoraMethod | None:
        """How the run combines the factors of adapters, once joined; None: each tensor for itself."""
        return self._machine.welcome.lora if self._machine.welcome else None

    @property
    def max_rank(self) -> int | None:
        """The highest rank of the global model, where the run combines products of factors."""
        return self._machine.welcome.max_rank if self._machine.welcome else None

    @property
    def fixed(self) -> frozenset[str]:
        """The tensors that the current task leaves as they are in training; none outside of a training task."""
        trains = self._model is not None and self._model.trains
        return self._factors.fixed(self._model.round) if self._model and trains else frozenset()

    @property
    def over(self) -> bool:
        """Whether the run has ended and `is_running` has said so."""
        return self._outcome is not None

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended; None while it goes on."""
        return self._outcome

    def join(self) -> None:
        """Join the run, if this process has not yet: from then on it is known how the run combines factors.

        Raises:
            TransferTimeout, RefusedError: see `is_running`.
        """
        if self.connection.open():
            atexit.register(self.close)  # after the link's own: what was registered last runs first
        self.connection.join()

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
        if self.over:
            return False
        self.join()
        if self._model is not None:
            if self._model.trains:
                raise ClosedError(
                    f"round {self._model.round} was received but no update was sent; train and send "
                    "it (trainer.fit(...), trainer.train() or fl.send(...)) inside the loop"
                )
            self.end_task()
        while self._work_comes():
            task = self._machine.open_task()
            if task is None or not self._deliver_kept(task):
                self._check_progress()
                # A run without a model yet stands before its first round.
                self._standing = (task.round or 1, task.version) if task else (1, 0)
                return True
        self._conclude()
        return False

    def _work_comes(self) -> bool:
        """Wait for a task, or until the server wants this site's model; False when the run is over.

        It is also taken to be over where the server is gone for longer than the idle timeout and nothing was left
        to do for this site.
        """
        try:
            return self._wait_for_work()
        except TransferTimeout as error:
            if not self._machine.has_done_all:
                raise
            self._outcome = "unknown"
            logger.warning(
                "%s: the last round is done here, but how the run ended is not known: %s",
                self.site,
                error,
            )
            return False

    def _wait_for_work(self) -> bool:
        with self._waits.watched("the next task") as turns:
            for _ in turns:
                if self._machine.finish is not None:
                    return False
                if self._machine.open_task() is not None or self._expects_model():
                    return True
        raise AssertionError("unreachable")

    def begin(
        self,
        specs: Sequence[TensorSpec],
        files: Mapping[str, str],
        read: Reader,
        fingerprints: Mapping[str, str] | None = None,
        frozen: Sequence[FrozenGroup] = (),
        *,
        roles: Mapping[str, protocol.Role] | None = None,
        pairs: Pairs = (),
    ) -> GlobalModel:
        """Return the current task's global model, downloading it on the first call.

        Args:
            specs: names, dtypes and shapes of the tensors that travel; the same on every call.
            files: small JSON files that describe the model, by name, such as ``adapter_config.json``.
            read: gives the local values; called if the server asks this site for the initial model.
            fingerprints: digests, by name, of what all sites must have alike, such as the tokenizer.
            frozen: digests of what the model has and does not travel; see `fedcore.files.frozen`.
            roles: what tensors are to the model, but for parameters (`fedcore.roles`); None: it is not known.
            pairs: the names of the factors of each adapted module, in a run that wants to know them (`lora`).

        Raises:
            RefusedError: another site has other files, fingerprints or roles; both are named.
            LayoutError: the tensors differ from the server's or from an earlier call's; each is named.
            ProtocolError: the server's task needs a model, and names none.
            RunEndedError: the run is over; RunFailedError if it was given up.
        """
        self.join()
        try:
            layout = self._bind(specs, files, fingerprints or {}, frozen, (roles, pairs))
            return self._begin(layout, read)
        except RunEndedError:
            self._conclude()
            raise

    def _begin(self, layout: Layout, read: Reader) -> GlobalModel:
        if self._model is not None:
            return self._model
        while True:
            task = self._waits.next_task()
            self.took_part = True
            if task.kind == "initial":
                self._updates.publish(layout, read, 0, initial=True)
                self._end(task.kind, task.round)
                continue
            if task.model is None:
                raise ProtocolError(
                    f"{self.site}: the server sends the task {task.kind!r} of round {task.round} without a model"
                )
            whole = self._factors.model_layout(layout)
            file = self._updates.folder().received(whole)
            if task.kind in ("train", "submit"):
                self._updates.prepare(self._factors.layout(layout, task.round), task.checksum)
            if not self._waits.download(whole, task, file):
                continue  # the server was restarted in between and publishes under another id
            self._model = GlobalModel(
                kind=task.kind,
                round=task.round,
                rounds=task.rounds,
                version=task.version,
                seed=task.seed,
                specs=table(whole),
                tensors=Received(file),
            )
            self._standing = (task.round, task.version)
            return self._model

    @property
    def bound(self) -> bool:
        """Whether the server has accepted this site's layout."""
        return self._machine.accepted is not None

    def offered_specs(self) -> list[TensorSpec] | None:
        """Return the tensors of the run's model as the server describes them, or None if it has none yet."""
        self.join()
        if self._layout is not None:
            return list(table(self._layout))
        with self.connection.changed:
            for _ in self.connection.waiting("the model's description"):
                task = self._machine.task
                if task is not None and task.model is not None:
                    return list(task.model.tensors)
                if self._machine.finish is not None:
                    break
                if self._expects_model():
                    return None
        self._conclude()
        self._waits.check_open()
        return None

    @property
    def model(self) -> GlobalModel | None:
        """The global model of the current task, or None outside one."""
        return self._model

    def score(
        self, metrics: Mapping[str, float], examples: int, rows: Mapping[str, int] | None = None
    ) -> None:
        """Report validation metrics of the current global model on ``examples`` local examples.

        ``rows`` holds the number of examples of each metric that was measured on others than all of them. The
        first call per version counts; later ones are ignored.
        """
        model = self._need_model("score")
        if self._score is not None and self._score.version == model.version:
            return
        self._score = protocol.Score(
            version=model.version,
            metrics=self._check(metrics),
            examples=min(max(1, int(examples)), protocol.MAX_WEIGHT),
            rows={
                name: min(n, protocol.MAX_WEIGHT)
                for name, n in (rows or {}).items()
                if name in metrics and n != examples
            },
        )
        self.connection.report(self._score)

    def answer(self, outputs: Mapping[str, Any], examples: int) -> None:
        """Answer an inference task with numbers, texts and lists of them, by name; ends the task.

        Args:
            outputs: all that leaves; at most `protocol.MAX_ANSWER_BYTES` as JSON.
            examples: number of local examples behind them.

        Raises:
            ProtocolError: an output is of another kind, or they are too large; it is named.
            ClosedError: the current task is none of inference.
        """
        model = self._need_model("answer")
        if model.kind != "infer":
            raise ClosedError(f"a task of kind {model.kind!r} takes no answer; fl.is_infer() tells")
        try:
            answer = protocol.Answer(
                version=model.version, outputs=dict(outputs), examples=max(1, int(examples))
            )
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)[0]
            name = ".".join(map(str, found["loc"][:2]))
            raise ProtocolError(
                f"answer: {name}{': ' if name else ''}{found['msg']}; outputs are numbers, texts and lists of "
                "them, by name"
            ) from None
        self._log.flush()
        self.connection.report(answer)
        self._model = None
        self._end(model.kind, model.round)

    def kept_folder(self) -> Path | None:
        """Return a folder of this run that outlives the process, once joined; None where nothing is kept."""
        work = self._updates.folder()
        return work.folder if work.keeps else None

    def submit(self, read: Reader, weight: int, metrics: Mapping[str, float] | None = None) -> None:
        """Publish this round's update and end the task; the server pulls it in the background.

        Args:
            read: gives every tensor's bytes; called for one after the other, before this returns.
            weight: number of training examples seen this round, 1 to 2**64 - 1.
            metrics: training metrics to show at the server.

        Raises:
            WeightError: the weight is no such integer.
            ClosedError: the current task is none of training.
            LayoutError: training changed a factor of an adapter that this round leaves as it is.
        """
        model = self._need_model("submit")
        if not model.trains:
            raise ClosedError("this task takes no update; call end_task()")
        if (
            isinstance(weight, bool)
            or not isinstance(weight, int)
            or not 1 <= weight <= protocol.MAX_WEIGHT
        ):
            raise WeightError(
                f"weight {weight!r}: expected the number of training examples as an integer from 1 to "
                "2**64 - 1"
            )
        assert self._layout is not None
        self._log.flush()
        layout = self._factors.layout(self._layout, model.round)
        self._factors.check(read, model.tensors, model.round)
        whole = self._factors.model_layout(self._layout)
        given = self._factors.given(self._layout, model.tensors)
        checked = Unchanged(read, given)
        self._updates.publish(
            layout,
            checked,
            model.round,
            weight=weight,
            metrics=metrics,
            score=self._score,
            part=None if layout is whole else (whole, given.__getitem__),
        )
        own = self._factors.absent(model.round) - self._factors.fixed(model.round)
        if checked.throughout and all(same_bytes(read(n), model.tensors[n]) for n in sorted(own)):
            text = (
                f"the update of round {model.round} is all zeros: training changed no tensor; check the learning "
                "rate, and that what is trained is what was given to fedcore"
            )
            logger.warning("%s: %s", self.site, text)
            self.problem(text)
        self._model = None
        self._end(model.kind, model.round)

    def end_task(self) -> None:
        """End an evaluation task."""
        self._log.flush()
        model, self._model = self._model, None
        if model is not None:
            self.connection.end_task(model.kind, model.round)
            if self._score is None or self._score.version != model.version:
                self._score = protocol.Score(version=model.version, metrics={}, examples=1)
                self.connection.report(self._score)

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Show training metrics at the server while a round is under way; it keeps them with round and step.

        A script may call this at each step: where that is more often than five times a second, the last value of
        each metric goes with the next message and the last step, at the latest at the end of the task.

        Args:
            step: from 0 to 2**53 - 1; left out, it is the number of this call in the process.
        """
        if not self.connection.opened:
            return
        self._log.add(self._check(metrics), step)

    def _send_log(self, step: int, metrics: dict[str, float]) -> None:
        current = self._model or self._machine.task
        round_ = current.round if current else 0
        self.connection.send(protocol.Log(round=round_, step=step, metrics=metrics))

    def problem(self, text: str) -> None:
        """Tell the server about a local error; ``text`` must hold no private paths or data."""
        if self.connection.opened:
            self.connection.send(protocol.Problem(message=text[:4096]))

    def system_info(self) -> dict[str, str | int]:
        """Return ``run``, ``site``, ``server``, ``round``, ``rounds`` and ``version``.

        ``round`` and ``version`` are those of the current task, or of the last one; 0 before the first.
        """
        round_, version = self._standing
        return {
            "run": self.run,
            "site": self.site,
            "server": self.server,
            "round": round_,
            "rounds": self._machine.rounds,
            "version": version,
        }

    def want_run(self, run: str) -> None:
        """Take part in the run of this name or id and in no other.

        Raises:
            ConfigError: this site has joined another one, or its settings name another one.
        """
        here, wanted = (self.run, self.run_id), self._machine.wanted_run
        if self.run and run not in here:
            raise ConfigError(
                f"{self.site} takes part in run {self.run!r} already, and not in {run!r}"
            )
        if not self.run and wanted not in (None, run):
            raise ConfigError(
                f"{self.site} wants run {wanted!r} already (FEDCORE_RUN, its kit), and not {run!r}"
            )
        self._machine.wanted_run = run

    def close(self) -> None:
        """Leave the run and free the sockets; may be called more than once."""
        if not self.connection.close():
            return
        finish = self._machine.finish
        self._updates.close(keep=finish is None or not finish.ok)

    # --- the current task ----------------------------------------------------------------------------

    def _expects_model(self) -> bool:
        return (
            self._layout is None
            and self._machine.task is None
            and self._machine.welcome is not None
            and not self._machine.welcome.has_model
        )

    def _check_progress(self) -> None:
        task = self._machine.open_task()
        offer = (task.kind, task.round) if task else ("none", -1)
        if offer == self._offered:
            raise ClosedError(
                "the loop asked for work again without touching the current task: call "
                "trainer.validate and trainer.fit, trainer.evaluate and trainer.train, or fl.receive and "
                "fl.send in each pass"
            )
        self._offered = offer

    def _need_model(self, call: str) -> GlobalModel:
        if self._model is None:
            raise ClosedError(
                f"{call}: there is no current task; call it inside `while fl.is_running()`, after the global "
                "model was received"
            )
        return self._model

    def _deliver_kept(self, task: protocol.Task) -> bool:
        """Offer what an earlier process of this site has trained for this task, if there is that."""
        if not self._updates.deliver_kept(task):
            return False
        self.took_part = True
        self._standing = (task.round, task.version)
        self._end(task.kind, task.round)
        return True

    def _end(self, kind: str, round_: int) -> None:
        self._offered = None
        self.connection.end_task(kind, round_)

    # --- tensors -----------------------------------------------------------------------------------

    def _bind(
        self,
        specs: Sequence[TensorSpec],
        files: Mapping[str, str],
        fingerprints: Mapping[str, str],
        frozen: Sequence[FrozenGroup],
        said: tuple[Mapping[str, protocol.Role] | None, Pairs],
    ) -> Layout:
        assert self._machine.welcome is not None
        if self._layout is not None:
            difference = compare_layouts(
                specs, table(self._layout), "the model now", "the model before"
            )
            if difference:
                raise LayoutError(changed_layout(difference))
            return self._layout
        if len(specs) > protocol.MAX_TENSORS:
            raise LayoutError(
                f"the model has {len(specs):,} tensors that travel, and at most {protocol.MAX_TENSORS:,} may: "
                "choose fewer (include, exclude), or stack those of one shape into one tensor"
            )
        layout = Layout([(n, d, list(s)) for n, d, s in specs], self._machine.welcome.chunk_bytes)
        if layout.total_bytes == 0:
            raise LayoutError("the model has no trainable tensor, so there is nothing to send")
        tensors, (roles, pairs) = table(layout), said
        self._factors = Factors(self.lora, pairs, self.max_rank)
        self._factors.model_layout(layout)  # its rank may be too high
        if self._clip is not None and self.lora == "exact":
            raise ConfigError(
                "FEDCORE_CLIP bounds how far each factor of an adapter moves, and aggregation.lora = 'exact' "
                "combines their products, whose change is another one: unset FEDCORE_CLIP, or take part in a run "
                "with another method"
            )
        declare = protocol.Declare(
            tensors=tensors,
            packed=protocol.pack_table(tensors) if protocol.packs(tensors) else None,
            files=dict(files),
            fingerprints=dict(fingerprints),
            frozen=list(frozen),
            roles=None if roles is None else roles_message(tensors, roles, self._factors.pairs),
        )
        self.connection.declare(declare)
        self._layout = layout
        with self.connection.changed:
            for _ in self.connection.waiting("the server to check the layout"):
                if self._machine.accepted is not None:
                    if self._machine.accepted != layout_hash(layout):
                        raise ProtocolError(
                            "the server accepted another layout than this site declared"
                        )
                    break
                self._waits.check_open()
        return layout

    def _conclude(self) -> None:
        """Take note of how the run ended, say it, and leave."""
        finish = self._machine.finish
        if finish is not None and self._outcome is None:
            self._outcome = finish.outcome
            best = finish.best_version
            text = {"complete": "is complete", "stopped": f"was {finish.message or 'stopped'}"}
            logger.log(
                _LEVELS[finish.outcome],
                "%s: the run %s%s", self.site, text.get(finish.outcome, f"failed: {finish.message}"),
                "" if best is None else f"; best model{'' if finish.ok else ' so far'}: round {best}",
            )  # fmt: skip
        self.close()


def changed_layout(difference: str) -> str:
    """Say what to do where other tensors are trained than when the site joined."""
    return (
        f"the model changed since this site joined: {difference}; what travels is settled then, so let all that "
        "is ever trained have requires_grad when the site joins, and freeze it afterwards"
    )
