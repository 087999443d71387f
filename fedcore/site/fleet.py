"""Many virtual sites in one process: a `SiteMachine` each, all driven by one thread.

A global model is downloaded once for all of them. What a site trains and scores is its
`Trainer`'s, which must not wait for anything.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from fedcore import protocol
from fedcore._core import (
    Codec,
    Collector,
    CollectorDone,
    CollectorOptions,
    FrameMalformed,
    Layout,
    SourceRejected,
)
from fedcore.encoding import EncodedUpdate, can_pack
from fedcore.errors import ConfigError, LayoutError, ProtocolError
from fedcore.layout import layout_hash, table
from fedcore.model_file import ModelFile, create_model
from fedcore.transport.link import DataEvent, other_version
from fedcore.transport.many_links import ManyLinks
from fedcore.transport.many_secured import ManySecuredLinks

from . import outputs as out
from .machine import SiteMachine
from .settings import SiteSettings, clip_of

if TYPE_CHECKING:
    from fedcore.security.keys import Credentials

__all__ = ["Fleet", "Trained", "Trainer"]

_STEP_SECONDS: Final = 1.0
_TICK_SECONDS: Final = 0.25
_WINDOW_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class Trained:
    """What a site has trained: an update, encoded as the run wants it, and the number of its examples."""

    update: EncodedUpdate
    weight: int
    metrics: Mapping[str, float] = field(default_factory=dict)


class Trainer(Protocol):
    """What one virtual site does. The model is None where the site gives the first one; it is read-only."""

    def train(self, task: protocol.Task, model: ModelFile | None) -> Trained:
        """Return the update of a task."""

    def score(self, task: protocol.Task, model: ModelFile) -> protocol.Score | None:
        """Return what this site measures of a model, before it trains from it; None: nothing."""


class Fleet:
    """Virtual sites of one run, from the first message to the last.

    Args:
        server: address of the server, ``tcp://HOST:PORT``.
        layout: of the tensors of all of them.
        trainers: what each site does, by its name.
        listen: called with a site's name and each event of its machine.
        keys: what each site dials with, by its name; None: the connections are plain text, and take less memory.
        clip: the largest norm of an update, as `SiteSettings.clip`; None: what ``FEDCORE_CLIP`` says. An update
            that was not encoded with the stage ``clip``, or whose norm is larger, does not leave.

    Raises:
        ConfigError: the address or ``FEDCORE_CLIP`` is malformed, or this process may have too few files open.
    """

    def __init__(
        self,
        server: str,
        layout: Layout,
        trainers: Mapping[str, Trainer],
        listen: Callable[[str, out.Event], None] = lambda *_: None,
        keys: Mapping[str, Credentials] | None = None,
        *,
        clip: float | None = None,
    ) -> None:
        self._layout, self._hash = layout, layout_hash(layout)
        self._declare = protocol.Declare(tensors=table(layout))
        self._trainers = dict(trainers)
        self._listen = listen
        self._clip = clip_of(os.environ) if clip is None else clip
        self.machines = {
            name: SiteMachine(SiteSettings(server, name, clip=self._clip)) for name in trainers
        }
        names = [(name, machine.instance.bytes) for name, machine in self.machines.items()]
        self._links: ManyLinks | ManySecuredLinks = (
            ManyLinks(server, names) if keys is None else ManySecuredLinks(server, names, keys)
        )
        self._over: set[str] = set()
        self._trained: set[str] = set()  # sites that were asked to train
        self._waiting: dict[str, list[str]] = {}  # the sites that wait for a set
        self._next_tick = 0.0
        self._download: tuple[str, Collector, ModelFile] | None = None  # the set that is downloaded
        self._model: tuple[str, ModelFile] | None = None
        now = time.monotonic()
        for name, machine in self.machines.items():
            machine.join(now)
            self._carry_out(name, machine)

    @property
    def running(self) -> bool:
        """Whether the run goes on for any of the sites."""
        return len(self._over) < len(self.machines)

    def step(self, seconds: float = _STEP_SECONDS) -> None:
        """Do what is due, and wait up to so many seconds for something to arrive.

        Raises:
            FedcoreError: the server has refused a site, or the run is not of the layout.
        """
        for arrived in self._links.step(seconds):
            if isinstance(arrived, tuple):
                name, message = arrived
                machine = self.machines[name]
                machine.receive(message.body, time.monotonic())
                self._carry_out(name, machine)
            else:
                self._on_event(arrived)
        self._download_next()
        now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + _TICK_SECONDS
            for name, machine in self.machines.items():
                machine.tick(now)
                self._carry_out(name, machine)

    def run(self) -> None:
        """Take part until the run is over for all sites.

        Raises:
            FedcoreError: the server has refused a site.
        """
        while self.running:
            self.step()

    def close(self) -> None:
        """Leave the run and close the connections."""
        for name, machine in self.machines.items():
            machine.leave("the fleet is closed")
            self._carry_out(name, machine)
        self._links.close()

    # --- what the machines ask for ---

    def _carry_out(self, name: str, machine: SiteMachine) -> None:
        while outputs := machine.take_outputs():
            for output in outputs:
                match output:
                    case out.Send(message):
                        self._links.send(name, message)
                    case out.Publish() | out.Withdraw():
                        out.serve(self._links.exchange, output)
                    case out.Pull(wanted):
                        self._on_pull(name, machine, wanted)
                    case out.StopPull(set_id):
                        self._waiting[set_id].remove(name)
                    case _:
                        self._on_output(name, machine, output)

    def _on_output(self, name: str, machine: SiteMachine, event: out.Event) -> None:
        match event:
            case out.Joined():
                welcome, grid = machine.welcome, self._layout.chunk_bytes
                if welcome is None or welcome.chunk_bytes != grid:
                    raise LayoutError(f"the run's chunks are not the layout's, of {grid:,} bytes")
                machine.declare(self._declare)
            case out.Tasked(task):
                self._on_task(name, machine, task)
            case out.Pulled(task):
                assert self._model is not None
                self._work(name, machine, task, self._model[1])
            case out.Finished():
                self._over.add(name)
                machine.stop_pull()
            case out.Failed(error):
                raise error
        self._listen(name, event)

    # --- tasks and their models ---

    def _on_task(self, name: str, machine: SiteMachine, task: protocol.Task) -> None:
        if machine.open_task() is None or machine.pulls(task):
            return
        if task.model is None:
            self._work(name, machine, task, None)
        elif task.model.layout != self._hash:
            raise LayoutError(f"the run's tensors are not those of {name}")
        else:
            machine.pull(task)

    def _on_pull(self, name: str, machine: SiteMachine, wanted: protocol.OpenSet) -> None:
        if self._model is not None and self._model[0] == wanted.id:
            machine.pulled(wanted.id, time.monotonic())
        else:
            self._waiting.setdefault(wanted.id, []).append(name)

    def _work(
        self, name: str, machine: SiteMachine, task: protocol.Task, model: ModelFile | None
    ) -> None:
        trainer = self._trainers[name]
        if task.kind == "evaluate" and model is not None:
            score = trainer.score(task, model)
            machine.report(score or protocol.Score(version=task.version, metrics={}, examples=1))
        elif task.kind in ("initial", "train", "submit"):
            score = None if model is None else trainer.score(task, model)
            if score is not None:
                machine.report(score)
            self._check_kind(name, task, model)
            trained = trainer.train(task, model)
            if model is not None:
                self._check_norm(name, trained.update)
            machine.publish(
                protocol.Ready(
                    round=task.round,
                    sets=[protocol.NamedSet(id=uuid.uuid4().hex, layout=self._hash)],
                    weight=trained.weight,
                    metrics=dict(trained.metrics),
                ),
                trained.update,
            )
        else:
            raise ProtocolError(f"a task of kind {task.kind!r} is not for virtual sites")
        machine.end_task(task.kind, task.round)
        self._carry_out(name, machine)

    def _check_kind(self, name: str, task: protocol.Task, model: ModelFile | None) -> None:
        """Refuse what would let a trained model leave without a bound: as a first one, or as no change of any."""
        if task.kind != "initial":
            if model is None:
                raise ProtocolError(f"{name}: the server asks for training, and names no model")
            self._trained.add(name)
        elif self._clip is not None and name in self._trained:
            raise ProtocolError(
                f"{name}: the server asks for an initial model after training; what was trained does not leave "
                "without the bound of FEDCORE_CLIP"
            )

    def _check_norm(self, name: str, update: EncodedUpdate) -> None:
        if self._clip is None:
            return
        if update.stages[-1:] != ("clip",):
            raise ConfigError(
                f"{name}: an update has no bound on its norm, and FEDCORE_CLIP is {self._clip:g}: "
                "it does not leave. Encode it with the stage 'clip', after all others"
            )
        if not update.decoded[-1] <= self._clip:
            raise ConfigError(
                f"{name}: an update has a norm of {update.decoded[-1]:.6g}, and FEDCORE_CLIP is "
                f"{self._clip:g}: it does not leave"
            )

    def _download_next(self) -> None:
        """Begin a download that sites wait for; end the one under way if none waits for it any more."""
        if self._download is not None:
            if self._waiting.get(self._download[0]):
                return
            self._end_download()
        self._waiting = {set_id: sites for set_id, sites in self._waiting.items() if sites}
        if not self._waiting:
            return
        set_id = next(iter(self._waiting))
        name = self._waiting[set_id][0]
        file = create_model(None, self._layout)
        collector = Collector(
            self._layout,
            [(name.encode(), bytes.fromhex(set_id), 1)],
            file.file,
            file.data_offset,
            None,
            CollectorOptions(
                _WINDOW_BYTES,
                rule="copy",
                codec=Codec(self._layout, "raw", True) if can_pack() else None,
            ),
        )
        self._download = set_id, collector, file
        self._links.exchange.start(collector)

    def _end_download(self) -> None:
        if self._download is not None:
            self._links.exchange.cancel(self._download[1])
            self._download = None

    def _on_event(self, event: DataEvent) -> None:
        if isinstance(event, FrameMalformed):
            version = other_version(event.message)
            if version is not None:
                for name, machine in self.machines.items():
                    machine.other_version(version)
                    self._carry_out(name, machine)
            return
        if self._download is None or not isinstance(event, CollectorDone | SourceRejected):
            return
        set_id, collector, file = self._download
        if event.collector != collector.id:
            return
        self._end_download()
        if isinstance(event, CollectorDone):
            self._model = set_id, file
        problem = event.code if isinstance(event, SourceRejected) else ""
        for name in self._waiting.pop(set_id):
            self.machines[name].pulled(set_id, time.monotonic(), problem)
            self._carry_out(name, self.machines[name])
