"""A federation in virtual time: a real server and real site machines in one thread, and dice for all else.

Frames take a while on their way, in order for each pair of peers. Training takes minutes. Sites crash, leave
and come back, and so does the server. Nothing waits for the machine's clock or for a thread, so two worlds of
one seed live through the same events.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import uuid
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from fedcore import protocol
from fedcore._core import (
    Collector,
    CollectorDone,
    CollectorOptions,
    Exchange,
    Layout,
    SourceRejected,
)
from fedcore.clock import ManualClock, milliseconds
from fedcore.config import RunConfig
from fedcore.encoding import EncodedUpdate, UpdateEncoder
from fedcore.layout import layout_hash, table
from fedcore.model_file import ModelFile, create_model
from fedcore.protocol import control_frames
from fedcore.server.host import Host
from fedcore.server.outcome import RunResult
from fedcore.server.timing import Timing
from fedcore.site import outputs as out
from fedcore.site.machine import SiteMachine
from fedcore.site.settings import SiteSettings
from fedcore.transport.link import SITE_LIMITS, Control, DataEvent, End

LAYOUT = Layout([("w", "F32", [3000]), ("h", "BF16", [500])])
_SERVER: Final = b""
_CHECK_SECONDS: Final = 10.0


class CrashError(Exception):
    """The server is killed here."""


class World:
    """A run of so many ``sites`` with a seed's troubles.

    Args:
        config: of the run; its participants are ``sites``.
        seed: of all that happens.
        calm: how many seconds lie between two troubles on average.

    Attributes:
        troubles: what happened, and how often.
    """

    def __init__(self, config: RunConfig, seed: int, calm: float) -> None:
        self.config, self.calm = config, calm
        self.clock = ManualClock()
        self.dice = random.Random(seed)
        self.sites = {name: Site(self, name) for name in config.participants.sites or ()}
        self.server: ServerSide | None = None
        self.troubles: dict[str, int] = {}
        self._crash = False
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._arrivals: dict[tuple[bytes, bytes], float] = {}

    def run(self) -> RunResult:
        """Live until the run is over."""
        for site in self.sites.values():
            self.after(self.dice.uniform(0, 100), site.start)
        self._next_trouble()
        while True:
            result = self._serve()
            if result is not None:
                return result
            self._pass(self.dice.choice((0.1, 5.0, 60.0, 400.0)))  # the server is down

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something later."""
        at = self.clock.monotonic() + seconds
        heapq.heappush(self._agenda, (at, next(self._numbers), action))

    def travel(self, sender: bytes, receiver: bytes, deliver: Callable[[], None]) -> None:
        """Deliver a frame after a while, behind those that went the same way before."""
        now = self.clock.monotonic()
        delay = self.dice.choice((0.001, 0.01, 0.05, 0.4))
        at = max(now + delay, self._arrivals.get((sender, receiver), now))
        self._arrivals[sender, receiver] = at
        heapq.heappush(self._agenda, (at, next(self._numbers), deliver))

    def happen(self, until: float) -> bool:
        """Let the next thing happen, if it does before a time; else move the clock there and return False."""
        if not self._agenda or self._agenda[0][0] > until:
            self.clock.advance(max(0.0, until - self.clock.monotonic()))
            return False
        at, _, action = heapq.heappop(self._agenda)
        self.clock.advance(max(0.0, at - self.clock.monotonic()))
        action()
        if self._crash:
            self._crash = False
            raise CrashError
        return True

    def _serve(self) -> RunResult | None:
        """Serve until the run is over, or the server crashes: then return None."""
        self.server = ServerSide(self)
        host = Host(
            [self.config], link=self.server, clock=self.clock, timing=Timing(check=_CHECK_SECONDS)
        )
        try:
            host.start()
            while not all(run.over for run in host.runs):
                host.step()
            return host.runs[0].result
        except CrashError:
            return None
        finally:
            self.server = None
            host.close()

    def _pass(self, seconds: float) -> None:
        until = self.clock.monotonic() + seconds
        while self.happen(until):
            pass

    # --- troubles ---

    def _next_trouble(self) -> None:
        self.after(self.dice.expovariate(1 / self.calm), self._trouble)

    def _trouble(self) -> None:
        site = self.dice.choice(sorted(self.sites))
        kind = self.dice.choice(("server", "crash", "crash", "leave"))
        away = self.dice.choice((1.0, 30.0, 1000.0))
        if kind == "server" and self.server is not None:
            self._crash = True
        elif kind == "crash":
            self.sites[site].crash()
            self.after(away, self.sites[site].start)
        elif kind == "leave":
            self.sites[site].leave()
            self.after(away, self.sites[site].start)
        self.troubles[kind] = self.troubles.get(kind, 0) + 1
        self._next_trouble()


class Alarm:
    """Does something once, at the earliest of the times that are asked for.

    Args:
        after: what does an action after so many seconds.
    """

    def __init__(
        self,
        after: Callable[[float, Callable[[], None]], None],
        action: Callable[[], None],
        clock: ManualClock,
    ) -> None:
        self._after, self._action, self._clock = after, action, clock
        self._at = math.inf

    def call(self, seconds: float) -> None:
        """Ring after so many seconds, unless it rings before."""
        at = self._clock.monotonic() + seconds
        if at < self._at:
            self._at = at
            self._after(seconds, lambda: self._ring(at))

    def _ring(self, at: float) -> None:
        if at == self._at:
            self._at = math.inf
            self._action()


class ServerSide(End):
    """The server's end of all connections."""

    endpoint, secure = "world", False

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self._carry_at = Alarm(world.after, self._carry, world.clock)

    def recv(self, timeout: float | None) -> Control | DataEvent | None:
        """Live until something has arrived."""
        until = self._world.clock.monotonic() + (timeout or 0.0)
        while True:
            self._carry()
            arrived = self.next_arrived(milliseconds(self._world.clock))
            if arrived is not None or not self._world.happen(until):
                return arrived

    def send(self, peer: bytes, message: protocol.FromServer, version: int | None = None) -> None:
        self._to(peer, *control_frames(self.of_run(message), version))

    def deliver(self, peer: bytes, header: bytes, body: bytes | None) -> None:
        self.exchange.deliver(milliseconds(self._world.clock), peer, header, body)
        self._carry()

    def nothing(self, *_: object) -> None:
        pass

    kick = wake = close = admit = block = mute = look = nothing

    def _carry(self) -> None:
        now = milliseconds(self._world.clock)
        wait = self.exchange.tick(now)
        while (frame := self.exchange.next_out(now)) is not None:
            self._to(*frame)
        if wait >= 0:
            self._carry_at.call(max(wait, 1) / 1000)

    def _to(self, peer: bytes, header: bytes, body: Any) -> None:
        world, body = self._world, None if body is None else bytes(body)

        def deliver() -> None:
            for site in world.sites.values():
                if site.identity == peer and site.machine is not None:
                    site.deliver(header, body)
                    return
            if world.server is self:
                self.exchange.unreachable(peer)

        world.travel(_SERVER, peer, deliver)


class Site:
    """A site's process, its link and its training."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.machine: SiteMachine | None = None
        self.identity = b""
        self._world = world
        self._exchange = Exchange()
        self._download: tuple[str, Collector, ModelFile] | None = None
        self._encoder: UpdateEncoder | None = None
        self._lives = 0
        self._number = 1 + sum(name.encode()) % 7

    # --- the process ---

    def start(self) -> None:
        """Begin a process, unless there is one or the run is over."""
        if self.machine is not None:
            return
        world, dice = self._world, self._world.dice
        self._lives += 1
        self._carry_at = Alarm(self._later, self._carry, world.clock)
        self._tick_at = Alarm(self._later, self._tick, world.clock)
        self.identity, instance = dice.randbytes(16), uuid.UUID(bytes=dice.randbytes(16), version=4)
        self.machine = SiteMachine(SiteSettings("tcp://world:1", self.name), instance)
        self._exchange, self._download = Exchange(), None
        self._exchange.set_limits(*SITE_LIMITS)
        update = world.config.transfer.update
        self._encoder = None if update == "raw" else UpdateEncoder(LAYOUT, update)
        self.machine.join(self._now)
        self._carry_out()
        self._tick()

    def crash(self) -> None:
        """End the process at once."""
        self.machine = None
        self._lives += 1

    def leave(self) -> None:
        """End the process after a word to the server."""
        if self.machine is not None:
            self.machine.leave("it is stopped")
            self._carry_out()
            self.crash()

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something later, if this process still lives."""
        life = self._lives
        self._world.after(seconds, lambda: action() if life == self._lives else None)

    def _tick(self) -> None:
        if self.machine is not None:
            self.machine.tick(self._now)
            self._carry_out()

    @property
    def _now(self) -> float:
        return self._world.clock.monotonic()

    # --- the link ---

    def deliver(self, header: bytes, body: bytes | None) -> None:
        """Take in a frame of the server."""
        now = milliseconds(self._world.clock)
        self._exchange.deliver(now, _SERVER, header, body)
        while self.machine is not None and (control := self._exchange.next_control(now)):
            self.machine.receive(control[1], self._now)
            self._carry_out()
        while (event := self._exchange.next_event()) is not None:
            self._on_event(event)
        self._carry()

    def _carry(self) -> None:
        now = milliseconds(self._world.clock)
        wait = self._exchange.tick(now)
        while (frame := self._exchange.next_out(now)) is not None:
            self._send(frame[1], frame[2])
        if wait >= 0:
            self._carry_at.call(max(wait, 1) / 1000)

    def _send(self, header: bytes, body: Any) -> None:
        world, identity = self._world, self.identity
        body = None if body is None else bytes(body)

        def deliver() -> None:
            if world.server is not None:
                world.server.deliver(identity, header, body)

        world.travel(identity, _SERVER, deliver)

    # --- the machine ---

    def _carry_out(self) -> None:
        while self.machine is not None and (outputs := self.machine.take_outputs()):
            for output in outputs:
                self._do(self.machine, output)
        if self.machine is not None and (due := self.machine.due()) is not None:
            self._tick_at.call(max(0.001, due - self._now))
        self._carry()

    def _do(self, machine: SiteMachine, output: out.Output) -> None:
        match output:
            case out.Send(message):
                self._send(*control_frames(message))
            case out.Publish() | out.Withdraw():
                out.serve(self._exchange, output)
            case out.Pull(wanted):
                self._pull(wanted.id)
            case out.StopPull():
                self._end_download()
            case out.Joined():
                assert machine.welcome is not None
                assert machine.welcome.chunk_bytes == LAYOUT.chunk_bytes
                machine.declare(protocol.Declare(tensors=table(LAYOUT)))
            case out.Tasked(task):
                if machine.open_task() is not None and not machine.pulls(task):
                    machine.pull(task)
            case out.Pulled(task):
                minutes = self._world.dice.uniform(1, 4) * self._number
                self._later(60 * minutes, lambda: self._work(machine, task))
            case out.Settled(ready, counts):
                if self._encoder is not None:
                    self._encoder.settle(ready.round, included=counts)
            case out.Finished():
                self.crash()
            case out.Failed(error):
                raise error

    def _pull(self, set_id: str) -> None:
        self._end_download()
        file = create_model(None, LAYOUT)
        source = (_SERVER, bytes.fromhex(set_id), 1)
        options = CollectorOptions(1 << 22, rule="copy")
        collector = Collector(LAYOUT, [source], file.file, file.data_offset, None, options)
        self._download = set_id, collector, file
        self._exchange.start(collector)

    def _end_download(self) -> None:
        if self._download is not None:
            self._exchange.cancel(self._download[1])

    def _on_event(self, event: DataEvent) -> None:
        if self._download is None or self.machine is None:
            return
        set_id, collector, _ = self._download
        if isinstance(event, CollectorDone | SourceRejected) and event.collector == collector.id:
            problem = event.code if isinstance(event, SourceRejected) else ""
            self.machine.pulled(set_id, self._now, problem)
            self._carry_out()

    def _work(self, machine: SiteMachine, task: protocol.Task) -> None:
        """Score and train: a step of random numbers that follow from the site and the model alone."""
        if machine.open_task() is not task or not machine.has_pulled(task):
            return  # the server wants something else by now
        assert self._download is not None
        model = self._download[2]
        values = np.frombuffer(model.view("w"), np.float32)
        loss = float(np.abs(values).mean(dtype=np.float64))
        machine.report(protocol.Score(version=task.version, metrics={"loss": loss}, examples=9))
        if task.kind == "train":
            machine.publish(
                protocol.Ready(
                    round=task.round,
                    sets=[protocol.NamedSet(id=self._id(), layout=layout_hash(LAYOUT))],
                    weight=self._number,
                ),
                self._train(task, model, values),
            )
        machine.end_task(task.kind, task.round)
        self._carry_out()

    def _train(
        self, task: protocol.Task, model: ModelFile, values: np.ndarray[Any, np.dtype[np.float32]]
    ) -> EncodedUpdate:
        steps = np.random.default_rng([self._number, task.version])
        trained = values + steps.standard_normal(values.size, np.float32)
        tensors = {"w": trained.tobytes(), "h": bytes(model.view("h"))}
        file = create_model(None, LAYOUT)
        file.fill(lambda name: tensors[name])
        if self._encoder is None:
            return EncodedUpdate.raw(file)
        return self._encoder.encode(
            task.round, file.file, file.data_offset, model.file, model.data_offset
        )

    def _id(self) -> str:
        return self._world.dice.randbytes(16).hex()
