"""A site that trains in several processes: rank 0 alone talks to the server, the others hear from it.

`RankedSession` has the methods of `Session` that a script's loop needs. Each of them is called by all ranks, in
the same order, but for `log` and `problem`. Between ranks go JSON and raw bytes, over a gloo group of their own:
nothing depends on the backend that trains and a rank may wait for hours while rank 0 waits for others.
An error of rank 0 is raised by all; an error of another rank ends its process, which cuts the group's connections.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from fedcore import errors
from fedcore.errors import ClosedError
from fedcore.files.frozen import FrozenGroup
from fedcore.layout import TensorSpec
from fedcore.model_file import Reader
from fedcore.protocol import LoraMethod, Role
from fedcore.roles import Pairs
from fedcore.site.session import GlobalModel, Outcome, Session

from .current import get_session, reset_session

__all__ = ["Gathered", "RankedSession", "Ranks", "forget_session", "site_session"]

_PATIENCE: Final = timedelta(days=30)
_TASK_FIELDS: Final = ("kind", "round", "rounds", "version", "seed")


class Gathered:
    """A reader of sharded tensors: every rank has to take part when one is read."""

    def __init__(self, read: Reader) -> None:
        self._read = read

    def __call__(self, name: str) -> Any:
        """Return the whole tensor's bytes; a collective call."""
        return self._read(name)


class Ranks:
    """Small messages and raw bytes between the processes of one site.

    Attributes:
        rank, size: this process's number and how many there are.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
        atexit.register(self.close)

    def close(self) -> None:
        """Let go of the group, and wait for its threads.

        A thread of gloo drops the last collective's tensors some time after that has returned, which takes the
        interpreter. Where the interpreter ends first, the whole process aborts ("terminate called without an
        active exception"). So this runs before it ends. The same holds for a default group of gloo, which scripts
        and trainers leave open.
        """
        atexit.unregister(self.close)
        group, self._group = self._group, None
        if group is None:
            return
        with contextlib.suppress(RuntimeError, ValueError):  # the script has let go of it before
            dist.destroy_process_group(group)
        del group
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()

    def together(
        self, lead: Callable[[], Any], serve: Callable[[str], object] | None = None
    ) -> Any:
        """Run ``lead`` on rank 0 and return its result (what JSON can hold) on all ranks.

        Meanwhile the other ranks run ``serve`` for each `call` of rank 0.

        Raises:
            FedcoreError: what ``lead`` raised, on the other ranks with "rank 0: " before its text.
        """
        if self.rank == 0:
            try:
                result = lead()
            except BaseException as error:
                self._send({"error": type(error).__name__, "text": str(error)})
                raise
            self._send({"result": result})
            return result
        while True:
            heard = self._hear()
            if "call" in heard:
                assert serve is not None
                serve(heard["call"])
            elif "error" in heard:
                raise _error(heard["error"], heard["text"])
            else:
                return heard["result"]

    def call(self, argument: str) -> None:
        """On rank 0, within `together`: have the others run ``serve(argument)``."""
        self._send({"call": argument})

    def spread(self, view: memoryview | None, nbytes: int) -> memoryview:
        """Return rank 0's bytes on all ranks; the others pass None."""
        if nbytes == 0:
            return memoryview(b"")
        flat = torch.empty(nbytes, dtype=torch.uint8) if view is None else _readable(view)
        self._guard(lambda: dist.broadcast(flat, 0, group=self._group))
        return flat.numpy().data if view is None else view

    def gather(self, value: Any) -> list[Any]:
        """Return what each rank passed, by rank."""
        return [self._pass(value, source) for source in range(self.size)]

    def _send(self, value: Any) -> None:
        self._pass(value, 0)

    def _hear(self) -> Any:
        return self._pass(None, 0)

    def _pass(self, value: Any, source: int) -> Any:
        data = bytearray(json.dumps(value).encode()) if self.rank == source else bytearray()
        size = torch.tensor([len(data)])
        self._guard(lambda: dist.broadcast(size, source, group=self._group))
        data = data or bytearray(int(size))
        text = torch.frombuffer(data, dtype=torch.uint8)
        self._guard(lambda: dist.broadcast(text, source, group=self._group))
        return json.loads(data)

    def _guard(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise ClosedError(
                f"rank {self.rank} lost another process of this site; what that one printed last says why "
                f"({error})"
            ) from error


def _readable(view: memoryview) -> torch.Tensor:
    from .parameters import from_view

    return from_view(view, ("", "U8", [len(view)]))


def _error(kind: str, text: str) -> BaseException:
    if kind == "SystemExit":
        return SystemExit(int(text) if text.isascii() and text.isdigit() else text)
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, errors.FedcoreError):
        return known(f"rank 0: {text}")
    return ClosedError(f"rank 0 ended with {kind}: {text}")


class _Tensors(Mapping[str, memoryview]):
    """The global model's tensors on any rank: each look-up is a broadcast, in which all ranks take part."""

    def __init__(
        self, ranks: Ranks, sizes: Mapping[str, int], held: Mapping[str, memoryview] | None
    ) -> None:
        self._ranks, self._sizes, self._held = ranks, sizes, held

    def __getitem__(self, name: str) -> memoryview:
        view = None if self._held is None else self._held[name]
        return self._ranks.spread(view, self._sizes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


class RankedSession:
    """One of several training processes of a site; what `Session` does, done by all of them together.

    Attributes:
        lora, fixed: as if the run combined each tensor for itself, so that no factors are declared. A run that
            combines factors refuses the site by name: a trainer of several processes waits for the gradient of
            each parameter, and one that is held has none.
    """

    lora: LoraMethod | None = None
    max_rank: int | None = None
    fixed: frozenset[str] = frozenset()

    def __init__(self, session: Session | None, ranks: Ranks) -> None:
        self._session = session
        self.ranks = ranks
        self._task: GlobalModel | None = None
        self._bound = False
        self._outcome: Outcome | None = None
        self._info: dict[str, str | int] = {}

    def _lead(self) -> Session:
        assert self._session is not None
        return self._session

    def is_running(self) -> bool:
        """Wait for the next task; see `Session.is_running`."""

        def ask() -> Any:
            running = self._lead().is_running()
            return running, self._lead().outcome, self._lead().system_info()

        running, self._outcome, self._info = self.ranks.together(ask)
        self._task = None
        return bool(running)

    def begin(
        self,
        specs: Sequence[TensorSpec],
        files: Mapping[str, str],
        read: Reader,
        fingerprints: Mapping[str, str] | None = None,
        frozen: Sequence[FrozenGroup] = (),
        *,
        roles: Mapping[str, Role] | None = None,
        pairs: Pairs = (),  # noqa: ARG002
    ) -> GlobalModel:
        """Return the current task's global model; see `Session.begin`.

        A look-up of one of its tensors is a collective call. ``pairs`` are not passed on.
        """
        if self._task is not None:
            return self._task
        led: list[GlobalModel] = []

        def begin() -> Any:
            shared = self._shared(read)
            led.append(self._lead().begin(specs, files, shared, fingerprints, frozen, roles=roles))
            info = self._lead().system_info()
            return [getattr(led[0], field) for field in _TASK_FIELDS], list(led[0].specs), info

        values, found, self._info = self.ranks.together(begin, self._serve(read))
        self._bound = True
        table = [(name, dtype, list(shape)) for name, dtype, shape in found]
        held = led[0].tensors if led else None
        tensors = _Tensors(self.ranks, _sizes(table), held)
        task = dict(zip(_TASK_FIELDS, values, strict=True))
        self._task = GlobalModel(**task, specs=table, tensors=tensors)
        return self._task

    def _shared(self, read: Reader) -> Reader:
        """Return rank 0's reader, which calls the others where a tensor is sharded."""
        if not isinstance(read, Gathered):
            return read

        def gather(name: str) -> Any:
            self.ranks.call(name)
            return read(name)

        return gather

    def _serve(self, read: Reader) -> Callable[[str], object] | None:
        return read if isinstance(read, Gathered) else None

    def submit(self, read: Reader, weight: int, metrics: Mapping[str, float] | None = None) -> None:
        """Publish this round's update; see `Session.submit`."""
        shared = self._shared(read)
        self._task = None
        self.ranks.together(lambda: self._lead().submit(shared, weight, metrics), self._serve(read))

    def sender(self) -> Session:
        """Return rank 0's own session, for a loop in which rank 0 alone sends.

        Raises:
            ClosedError: this is another rank, or not all of them have received the task's model.
        """
        if self._session is None:
            raise ClosedError(
                f"fl.send was called by rank {self.ranks.rank} of {self.ranks.size}: rank 0 alone sends, so put "
                "it under `if torch.distributed.get_rank() == 0:`"
            )
        if self._task is None:
            raise ClosedError("call fl.receive() on every rank before rank 0 calls fl.send")
        return self._session

    def score(
        self, metrics: Mapping[str, float], examples: int, rows: Mapping[str, int] | None = None
    ) -> None:
        """Report the global model's metrics, those of rank 0; see `Session.score`."""
        self.ranks.together(lambda: self._lead().score(metrics, examples, rows))

    def end_task(self) -> None:
        """End an evaluation task."""
        self._task = None
        self.ranks.together(lambda: self._lead().end_task())

    def offered_specs(self) -> list[TensorSpec] | None:
        """Return the tensors of the run's model; see `Session.offered_specs`."""
        found: list[TensorSpec] | None = self.ranks.together(lambda: self._lead().offered_specs())
        return found

    @property
    def model(self) -> GlobalModel | None:
        """The global model of the current task, or None outside one."""
        return self._task

    @property
    def over(self) -> bool:
        """Whether the run has ended and `is_running` has said so."""
        return self._outcome is not None

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended; None while it goes on."""
        return self._outcome

    @property
    def bound(self) -> bool:
        """Whether the server has accepted this site's layout."""
        return self._bound

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Show training metrics at the server; those of the other ranks than 0 stay here."""
        if self._session is not None:
            self._session.log(metrics, step)

    def problem(self, text: str) -> None:
        """Tell the server about an error, if this is rank 0."""
        if self._session is not None:
            self._session.problem(text)

    def system_info(self) -> dict[str, str | int]:
        """Return ``run``, ``site``, ``server``, ``round``, ``rounds`` and ``version``, as rank 0 last had them."""
        return dict(self._info) if self._session is None else self._session.system_info()


def _sizes(table: Sequence[TensorSpec]) -> dict[str, int]:
    from .parameters import to_dtype

    sizes: dict[str, int] = {}
    for name, dtype, shape in table:
        elements = 1
        for extent in shape:
            elements *= extent
        sizes[name] = elements * to_dtype(dtype).itemsize
    return sizes


_ranked: RankedSession | None = None


def site_session() -> Session | RankedSession:
    """Return this process's session, made on first use.

    Raises:
        ClosedError: this is one of several training processes, and they do not know each other yet.
    """
    global _ranked  # noqa: PLW0603 - one session per process is the contract
    if _ranked is not None:
        return _ranked
    several = int(os.environ.get("WORLD_SIZE", "1") or 1)
    module = sys.modules.get("torch.distributed")
    ready = module is not None and module.is_available() and module.is_initialized()
    if not ready or dist.get_world_size() == 1:
        if several > 1:
            raise ClosedError(
                f"this is one of {several} training processes (WORLD_SIZE), which are not connected yet: call "
                "fl.patch(trainer), or in a loop of your own torch.distributed.init_process_group(), before "
                "fl.is_running()"
            )
        return get_session()
    ranks = Ranks()
    session: list[Session] = []
    ranks.together(lambda: session.append(get_session()))
    _ranked = RankedSession(session[0] if session else None, ranks)
    return _ranked


def forget_session() -> None:
    """Leave the run; the next `site_session` makes another session."""
    global _ranked  # noqa: PLW0603
    _ranked = None
    reset_session()
