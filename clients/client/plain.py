"""The plain loop: `init`, `is_running`, `receive`, `send`, for any framework."""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedcore.errors import ClosedError, LayoutError, WeightError
from fedcore.layout import check_names, compare_layouts
from fedcore.site.error_text import report_uncaught
from fedcore.site.session import GlobalModel, Outcome, Session

from .arrays import Arrays, to_numpy
from .choice import choose, forget_choice, travelling
from .current import get_session, intend, loop_goes_on, reset_session
from .loading import LoadingHooks

if TYPE_CHECKING:
    from fedcore.model_file import Reader

    from .factors import Held
    from .parameters import ModelParameters
    from .personal import Kept
    from .ranks import RankedSession
    from .still import Still

logger = logging.getLogger("fedcore.client")

__all__ = [
    "answer",
    "begin",
    "init",
    "is_evaluate",
    "is_infer",
    "is_running",
    "is_submit",
    "is_train",
    "load",
    "log",
    "outcome",
    "receive",
    "send",
    "shutdown",
    "system_info",
]

_SAME_NAMES: Final = "send it under the names that fl.receive() gives"
_OWN_NAMES: Final = (
    "where a module is wrapped or has an adapter, fl.load(params) takes the global model, and fl.send(weight=...) "
    "without tensors sends the module's own"
)
LEFT_OUT: Final[Any] = object()
"""Stands for an argument that `send` was not given."""

_warned: set[str] = set()
"""Which arguments of `send` were left out and warned of."""


def _get_session() -> Session | RankedSession:
    """Return this process's session; a script without torch.distributed has no need of torch."""
    if "torch.distributed" in sys.modules or os.environ.get("WORLD_SIZE", "1") != "1":
        from .ranks import site_session

        return site_session()
    return get_session()


_model: ModelParameters | None = None
_own_factors: Kept = {}
_factors_of: Session | RankedSession | None = None
_loaded: GlobalModel | None = None
"""The global model that `load` has put into the module."""
_still: Still | None = None
_held: Held | None = None
_own: dict[str, str] = {}
_hooks: LoadingHooks | None = None
_arrays: Arrays | None = None
_tokenizer: Any = None
_sent = False
_listener: Session | RankedSession | None = None


def init(
    model: Any = None,
    *,
    tokenizer: Any = None,
    include: Iterable[str] | str = (),
    exclude: Iterable[str] | str = (),
    run: str | None = None,
) -> None:
    """Join the run that the environment names.

    Args:
        model: a ``torch.nn.Module`` or a mapping of names to arrays. It says which tensors travel, and is the
            initial model where the server has none. Without it the server must have one.
        tokenizer: the server refuses sites whose tokenizers differ.
        include, exclude: which of the tensors travel, by name; see `fedcore.client.choice`.
        run: name (or id) of the run that this script is for; a server that serves another one refuses it.
    """
    global _model, _own, _hooks, _arrays, _tokenizer, _listener  # noqa: PLW0603 - one session per process is the contract
    choose(include, exclude)
    _forget_model()
    intend(run)
    _listener = _get_session()
    report_uncaught(_tell)
    _tokenizer = tokenizer
    if model is None or isinstance(model, Mapping):
        check_names(model or ())
        arrays = {} if model is None else {name: model[name] for name in travelling(list(model))}
        _arrays = None if model is None else Arrays(arrays)
        return
    if not hasattr(model, "named_parameters"):
        raise LayoutError(
            f"fl.init() was given {type(model).__name__}: expected a torch module, or a mapping of names to "
            "arrays such as {'weight': array}"
        )
    from .parameters import ModelParameters

    parameters = ModelParameters(model)
    if parameters.sharded:
        raise LayoutError(
            "the module's tensors are sharded over processes: call fl.init(module) before they are, and pass "
            "whole tensors to fl.send, such as torch.distributed.checkpoint's get_model_state_dict gathers"
        )
    _model, _own = parameters, parameters.own_names()
    _hooks = LoadingHooks(model, _own, parameters.names)


def _forget_model() -> None:
    global _model, _own, _hooks, _arrays, _still, _held, _loaded  # noqa: PLW0603
    for hooks in (_hooks, _held):
        if hooks is not None:
            hooks.remove()
    _model = _hooks = _arrays = _still = _held = _loaded = None
    _own = {}


def _tell(text: str) -> None:
    if _listener is not None and not _listener.over:
        _listener.problem(text)


def is_running() -> bool:
    """Wait for the next task; False when the run is complete or was stopped: `outcome` tells.

    Raises:
        RunFailedError: the run was given up; a script that does not catch it ends with status 1.
        TransferTimeout, RefusedError, ClosedError: see `Session.is_running`.
    """
    global _sent  # noqa: PLW0603 - one session per process is the contract
    running = loop_goes_on(_get_session())
    _sent = False
    return running


def outcome() -> Outcome | None:
    """Return how the run ended; None while it goes on.

    ``"complete"``; ``"stopped"``: by an operator, before its last round; ``"failed"``: it was given up;
    ``"unknown"``: the server was gone before it said so.
    """
    return _get_session().outcome


def receive() -> dict[str, Any]:
    """Return the global model: name -> torch tensor after ``init(module)``, else name -> NumPy array.

    Tensors are copies that may be changed. ``module.load_state_dict(params, strict=False)`` takes them, where the
    module is wrapped as well; a PEFT model takes them by `load`, and says so if they are given to it otherwise.
    """
    task = _begin()
    if _model is not None or (_arrays is not None and _arrays.of_torch):
        from .parameters import from_view

        return {spec[0]: from_view(task.tensors[spec[0]], spec).clone() for spec in task.specs}
    return {spec[0]: to_numpy(task.tensors[spec[0]], spec) for spec in task.specs}


def load(params: Mapping[str, Any]) -> None:
    """Put a received global model into the module that `init` was given.

    PEFT models need it: their tensors travel under the names of PEFT's file format and not of ``state_dict``.

    Raises:
        ClosedError: `init` was given no module.
        LayoutError: the tensors are not the module's.
    """
    if _model is None:
        raise ClosedError("load() puts the global model into the module given to fl.init(module)")
    global _loaded  # noqa: PLW0603
    given = Arrays({_own.get(name, name): value for name, value in params.items()})
    _refreshed().load(list(given.specs), {spec[0]: given.read(spec[0]) for spec in given.specs})
    _loaded = _get_session().model


def _begin() -> GlobalModel:
    session = _get_session()
    if session.over:
        raise ClosedError("the run is over: fl.is_running() returned False, and there is no task")
    if _sent:
        raise ClosedError(
            "this pass's update was sent already: each pass of `while fl.is_running()` sends once, and "
            "fl.is_running() waits for the next task"
        )
    if _model is not None and session.model is None:
        if isinstance(session, Session):
            session.join()
        return _begin_with(session, _refreshed())
    source = _model if _model is not None else _arrays
    if source is not None:
        if session.bound:
            return session.begin(source.specs, {}, source.read)
        frozen = source.frozen()
        return session.begin(source.specs, source.files, source.read, _fingerprints(), frozen)
    specs = session.offered_specs()
    if specs is None:
        raise ClosedError(
            "the server has no initial model yet: pass yours to fl.init(model), or set [model] initial in the "
            "run file"
        )

    kept = sorted({spec[0] for spec in specs} - set(travelling([spec[0] for spec in specs])))
    if kept:
        raise LayoutError(
            f"include and exclude keep {kept[0]!r} at this site, but the run's model holds it; give fl.init "
            "the model"
        )

    def nothing_to_read(_: str) -> memoryview:
        raise ClosedError("the server asked for an initial model; pass yours to fl.init(model)")

    return session.begin(specs, {}, nothing_to_read, {} if session.bound else _fingerprints())


def _begin_with(session: Session | RankedSession, model: ModelParameters) -> GlobalModel:
    """Begin a task with a module, in which what is frozen is then as it was before the first round."""
    global _still  # noqa: PLW0603
    from .still import Still

    if _still is None:
        _still = Still(model.frozen_tensors)
    elif text := _still.settle(model.frozen_tensors()):
        logger.warning("%s: %s", session.system_info()["site"], text)
        session.problem(text)
    if session.bound:
        task = session.begin(model.specs, {}, model.read)
    else:
        prints, frozen = _fingerprints(), model.frozen()
        pairs = model.pairs(session.lora)
        task = session.begin(
            model.specs, model.files, model.read, prints, frozen, roles=model.roles, pairs=pairs
        )
    _hold(model, session.fixed)
    return task


def _hold(model: ModelParameters, names: Iterable[str]) -> None:
    """Have these tensors of the module, and no others, stay as they are in training."""
    global _held  # noqa: PLW0603
    from .factors import Held

    if _held is None:
        _held = Held()
    model.hold(_held, names)


def _refreshed() -> ModelParameters:
    """Look the module's tensors up again: it may have been moved to another device, which makes new ones."""
    global _model, _factors_of  # noqa: PLW0603
    assert _model is not None
    from .by_method import model_parameters

    session, joined = _get_session(), _model.joined()
    if _factors_of is not session:  # those of another run
        _own_factors.clear()
        _factors_of = session
    _model = model_parameters(joined.given, joined, (session.lora, session.max_rank), _own_factors)
    if session.model is not None:
        _model.begin(session.model, _kept_folder())
    return _model


def _kept_folder() -> Path | None:
    session = _get_session()
    return session.kept_folder() if isinstance(session, Session) else None


def _fingerprints() -> dict[str, str]:
    if _tokenizer is None:
        return {}
    from .tokenizer import tokenizer_fingerprint

    return {"tokenizer": tokenizer_fingerprint(_tokenizer)}


def begin() -> tuple[GlobalModel, bool]:
    """Return the current task, and whether `init` was given a module."""
    return _begin(), _model is not None


def send(
    params: Mapping[str, Any] | None = None,
    *,
    weight: int = LEFT_OUT,
    metrics: Mapping[str, float] | None = None,
    examples: int | None = None,
    train_metrics: Mapping[str, float] | None = None,
) -> None:
    """Send this round's update and the global model's score; ends the task.

    Args:
        params: name -> array of every tensor that travels; more names (a whole ``state_dict``) are ignored. After
            ``init(module)`` it may be left out: the module's own values are sent.
        weight: number of training examples seen this round, an integer (of NumPy or torch as well) from 1 to
            2**64 - 1. Left out, it is 1, with a warning: a site of 10,000 examples weighs as much as one of 10.
        metrics: validation metrics of the *global* model, as received; the server selects on them.
        examples: number of validation examples behind ``metrics``; ``weight`` if left out, else 1 with a warning.
        train_metrics: shown at the server.

    In an evaluation task (`is_evaluate`) only ``metrics`` count.

    Raises:
        LayoutError: a tensor is missing, or has another dtype or shape than the global model's.
        WeightError: the weight is no such integer.
        ClosedError: this pass of the loop has sent already, the run is over, or this is not rank 0 of a site that
            trains in several processes.
    """
    global _sent  # noqa: PLW0603
    session = _sender()
    task = _begin()
    if task.kind == "infer":
        raise ClosedError(
            "this task asks for outputs of the model, not for an update: fl.answer(...)"
        )
    if task.trains or metrics:
        _check_loaded(session, task)
    read = _reader(params, task) if task.trains else None
    stated = None if weight is LEFT_OUT else weight if read is None else _integer(weight)
    if metrics:
        scored = examples if examples is not None else stated
        session.score(metrics, 1 if scored is None else scored)
        if scored is None:
            _warn_of_one("examples=", "this score", "validation")
    if read is None:
        session.end_task()
    else:
        if stated is None:
            _warn_of_one("weight=", "this update", "training")
        if _model is not None:
            _model.keep(task, _kept_folder())
        session.submit(read, 1 if stated is None else stated, train_metrics)
    if _held is not None:
        _held.remove()
    _sent = True


def _check_loaded(session: Session, task: GlobalModel) -> None:
    """Refuse what was scored or trained from another model: PEFT would put factors into an adapter as they are."""
    if session.lora in ("exact", "share-a") and _model is not None and _loaded is not task:
        raise ClosedError(
            f"the run combines adapters by aggregation.lora = {session.lora!r}, and fl.load has not put this "
            "task's global model into the module: call fl.load(fl.receive()) in each pass, before anything else"
        )


def _warn_of_one(argument: str, what: str, kind: str) -> None:
    """Say once that a number was left out by which the server weighs sites."""
    if argument not in _warned:
        _warned.add(argument)
        logger.warning(
            "%s: fl.send() was given no %s: %s weighs 1, whatever the number of %s examples; state that number",
            _get_session().system_info()["site"], argument.rstrip("="), what, kind,
        )  # fmt: skip


def _sender() -> Session:
    """Return the session of the one process that sends."""
    session = _get_session()
    return session if isinstance(session, Session) else session.sender()


def _integer(weight: Any) -> int:
    """Return an integer of any kind (Python's, NumPy's, torch's) as Python's."""
    if str(getattr(weight, "dtype", type(weight).__name__)).rpartition(".")[2] != "bool":
        with contextlib.suppress(TypeError):
            return operator.index(weight)
    raise WeightError(
        f"weight {weight!r}: expected the number of training examples as an integer; int(...) makes one of a "
        "float"
    )


def _reader(params: Mapping[str, Any] | None, task: GlobalModel) -> Reader:
    if params is None:
        if _model is None:
            raise LayoutError(
                "send() needs the parameters, name -> array, unless a module was given to init"
            )
        read: Reader = _refreshed().read
        return read
    if not isinstance(params, Mapping):
        raise LayoutError(
            f"send() was given {type(params).__name__}: expected a mapping of names to arrays, such as "
            "model.state_dict()"
        )
    if (method := _get_session().lora) in ("exact", "share-a"):
        raise LayoutError(
            f"the run combines adapters by aggregation.lora = {method!r}, so the module given to fl.init says "
            "what is sent: call fl.send(weight=...) without parameters"
        )
    wanted = {spec[0] for spec in task.specs}
    named = {_own.get(name, name): value for name, value in params.items()}
    chosen = {name: value for name, value in named.items() if name in wanted}
    if params and not chosen:
        raise LayoutError(
            f"the update has other names than the global model: {next(iter(params))!r} where that has "
            f"{task.specs[0][0]!r}; {_SAME_NAMES if _model is None else _OWN_NAMES}"
        )
    given = Arrays(chosen)
    difference = compare_layouts(given.specs, task.specs, "this update", "the global model")
    if difference is not None:
        raise LayoutError(f"the update does not fit the global model: {difference}")
    return given.read


def answer(outputs: Mapping[str, Any], *, examples: int = 1) -> None:
    """Answer an inference task (`is_infer`): ``outputs`` is all that leaves; ends the task.

    Args:
        outputs: numbers, texts and lists of them (of NumPy and torch as well) by name, at most 1 MiB as JSON.
        examples: number of local examples behind them.

    Raises:
        ProtocolError: an output is of another kind, or they are too large.
        ClosedError: this is no inference task.
    """
    global _sent  # noqa: PLW0603
    _begin()
    plain = {
        str(name): value.tolist() if hasattr(value, "tolist") else value
        for name, value in outputs.items()
    }
    get_session().answer(plain, examples)
    _sent = True


def is_infer() -> bool:
    """Whether the current task asks for outputs of the model; call it after `receive`."""
    return _begin().kind == "infer"


def is_submit() -> bool:
    """Whether the current task asks for a model of this site's own; call it after `receive`."""
    return _begin().kind == "submit"


def is_train() -> bool:
    """Whether the current task asks for training; call it after `receive`."""
    return _begin().kind == "train"


def is_evaluate() -> bool:
    """Whether the current task only asks for a score; call it after `receive`."""
    return _begin().kind == "evaluate"


def log(metrics: Mapping[str, float], step: int | None = None) -> None:
    """Show training metrics at the server while a round is under way."""
    _get_session().log(metrics, step)


def system_info() -> dict[str, str | int]:
    """Return ``run``, ``site``, ``server``, ``round``, ``rounds`` and ``version``."""
    return _get_session().system_info()


def shutdown() -> None:
    """Leave the run; the next `init` starts over."""
    global _tokenizer, _sent, _listener  # noqa: PLW0603
    _forget_model()
    _tokenizer = _listener = None
    _sent = False
    _warned.clear()
    forget_choice()
    if "fedcore.client.ranks" in sys.modules:
        from .ranks import forget_session

        forget_session()
    reset_session()
