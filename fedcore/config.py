"""The run file: one TOML file that says everything about a run.

Every error names the file, the key, what was expected and what came; all of them are listed at once.
Relative paths in a run file are relative to the file.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    Strict,
    ValidationError,
    model_serializer,
    model_validator,
)

from fedcore.security.keys import is_loopback, parse_toml

from .errors import ConfigError
from .protocol import MAX_RANK, SITE_NAME, LoraMethod, Transfer
from .quantities import parse_duration, parse_size
from .rules import RULES
from .rules.compatibility import Choices, Task, conflicts
from .rules.finishers import FINISHERS, factor_of
from .rules.options import Option, complete
from .rules.several import SEVERAL
from .weighing import Weighing
from .wrong_values import explain, hint

__all__ = ["RunConfig", "load_run_file", "parse_run"]

_PATHS: Final = ("run.dir", "model.initial", "server.keys", "server.spill_dir", "simulate.script")
_MIN_MEMORY: Final = 16 << 20
_RATE: Final = "learning_rate"
_MOST_POINTS: Final = 1000


def _importable(text: str, kind: str) -> str:
    module, colon, name = text.partition(":")
    if not (colon and all(map(str.isidentifier, [*module.split("."), *name.split(".")]))):
        raise ValueError(f"expected 'package.module:{kind}', got {text!r}")
    return text


def _function(text: str) -> str:
    return _importable(text, "function")


FunctionName = Annotated[str, AfterValidator(_function)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
Size = Annotated[int, BeforeValidator(parse_size)]
Name = Annotated[str, Field(pattern=SITE_NAME)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)


class RunSection(_Section):
    """``[run]``: name, task, rounds, seed, and the folder that run folders lie in."""

    name: Name
    task: Task = "train"
    rounds: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    dir: str = "runs"

    @model_validator(mode="after")
    def _consistent(self) -> RunSection:
        if self.task == "train" and "rounds" not in self.model_fields_set:
            raise ValueError("rounds: missing; it must be given")
        if self.task == "train" and self.rounds < 1:
            raise ValueError(f"rounds: expected 1 or more, got {self.rounds}")
        if self.task != "train" and self.rounds:
            raise ValueError(
                f"rounds is for task = 'train'; task is {self.task!r}, so leave it out"
            )
        return self


class ModelSection(_Section):
    """``[model]``: the initial model, a safetensors file or a folder with one (absent: the first site's), and what
    becomes of a site whose frozen base is not that of the others (``same_base``)."""

    initial: str | None = None
    same_base: Literal["warn", "strict"] = "warn"


class ParticipantsSection(_Section):
    """``[participants]``: who takes part (``sites`` by name or any ``count``), how many of them train in a round
    (``sample``), and when a round may close."""

    sites: list[Name] | None = None
    count: Annotated[int, Field(ge=1, le=100_000)] | None = None
    sample: Annotated[int, Field(ge=1)] | None = None
    min_results: Annotated[int, Field(ge=1)] | None = None
    join_timeout: Duration = 300.0
    round_deadline: Duration = 86400.0
    idle_timeout: Duration = 3.0

    @model_validator(mode="after")
    def _consistent(self) -> ParticipantsSection:
        if (self.sites is None) == (self.count is None):
            raise ValueError("give either sites = [names] or count = NUMBER")
        if self.sites is not None and (not self.sites or len(set(self.sites)) != len(self.sites)):
            raise ValueError("sites: expected at least one name, each once")
        if self.sample is not None and self.sample > self.expected:
            raise ValueError(f"sample is {self.sample}, but there are only {self.expected} sites")
        if self.min_results is not None and self.min_results > (self.sample or self.expected):
            train = f"train in a round (sample = {self.sample})" if self.sample else "in the run"
            raise ValueError(
                f"min_results is {self.min_results}, but there are only "
                f"{self.sample or self.expected} sites {train}"
            )
        return self

    @property
    def expected(self) -> int:
        """How many sites take part when all are there."""
        return len(self.sites) if self.sites is not None else (self.count or 0)

    @property
    def trained(self) -> int:
        """How many updates a round takes, at most."""
        return self.sample or self.expected

    @property
    def quorum(self) -> int:
        """How many valid updates a round needs."""
        return self.min_results or self.sample or self.expected


class OptimizerSection(_Section):
    """``[aggregation.optimizer]``: what the server makes of the step that the updates come to, but for tensors of
    which a pattern in ``plain`` is the name. ``schedule`` has pairs of a round and a factor of the learning rate.
    The other keys are the numbers that the optimizer takes. Absent, the step is added to the model as it is."""

    model_config = ConfigDict(extra="allow")

    name: str
    plain: list[str] = []
    schedule: Annotated[
        list[Annotated[tuple[int, float], Strict(False)]], Field(max_length=_MOST_POINTS)
    ] = []
    __pydantic_extra__: dict[str, float]

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, values: Any) -> Any:
        kind = FINISHERS.get(str(values.get("name"))) if isinstance(values, dict) else None
        if kind is None:
            return values
        return {name: option.default for name, option in kind.options.items()} | values

    @model_validator(mode="after")
    def _known(self) -> OptimizerSection:
        if self.name not in FINISHERS:
            names = ", ".join(repr(name) for name in FINISHERS)
            raise ValueError(f"name: expected one of {names}, got {self.name!r}")
        options = FINISHERS[self.name].options
        for name, value in self.options.items():
            if name not in options:
                near = hint(name, ["name", "plain", "schedule", *options])
                raise ValueError(f"unknown key {name!r} of {self.name!r}{near}")
            if not options[name].allows(value):
                raise ValueError(f"{name}: expected {options[name].bounds}, got {value}")
        self._check_schedule(options)
        return self

    def _check_schedule(self, options: Mapping[str, Option]) -> None:
        if self.schedule and _RATE not in options:
            raise ValueError(f"schedule: {self.name!r} has no {_RATE}")
        rounds = [round_ for round_, _ in self.schedule]
        if rounds != sorted(set(rounds)) or any(round_ < 1 for round_ in rounds):
            raise ValueError("schedule: expected rounds from 1 on, each later than the one before")
        for round_, factor in self.schedule:
            if not options[_RATE].allows(self.options[_RATE] * factor):
                text = f"a factor that leaves {_RATE} {options[_RATE].bounds}"
                raise ValueError(f"schedule: expected {text}, got {factor} for round {round_}")

    @model_serializer(mode="wrap")
    def _without_empty(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out an empty schedule: runs that began before there were any go on."""
        of: dict[str, Any] = dump(self)
        if not self.schedule:
            del of["schedule"]
        return of

    @property
    def options(self) -> dict[str, float]:
        """The numbers that the optimizer takes, by name."""
        return {name: float(value) for name, value in (self.__pydantic_extra__ or {}).items()}

    def options_of(self, round_: int) -> dict[str, float]:
        """The same in one round, with the learning rate of the schedule."""
        if not self.schedule:
            return self.options
        rate = self.options[_RATE] * factor_of(self.schedule, round_)
        return self.options | {_RATE: rate}


class AggregationSection(_Section):
    """``[aggregation]``: the rule that combines the sites' updates, the numbers that it takes (``options``), what
    an update weighs (``weights``, ``max_share``), what the server makes of the result (``optimizer``), the part of
    the models' average that stays in each round (``ema``), how the factors of adapters are combined (``lora``), of
    ``exact`` to which rank (``max_rank``) and onto what (``base``)."""

    rule: str = "mean"
    options: dict[str, float] = {}
    weights: Literal["examples", "equal"] | None = None
    max_share: float | None = None
    optimizer: OptimizerSection | None = None
    ema: Annotated[float, Field(ge=0, lt=1)] | None = None
    lora: LoraMethod | None = None
    max_rank: Annotated[int, Field(ge=1, le=MAX_RANK)] | None = None
    base: Literal["difference", "zero"] | None = None

    @model_validator(mode="after")
    def _ranked(self) -> AggregationSection:
        if self.lora == "exact":
            if self.max_rank is None:
                raise ValueError(
                    "max_rank: missing; lora = 'exact' needs the highest rank of the global model, at least that "
                    "of each site's adapter"
                )
            return self
        for name in ("max_rank", "base"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: it is for lora = 'exact'; leave it out")
        return self

    @model_validator(mode="after")
    def _known(self) -> AggregationSection:
        if ":" in self.rule:  # a class in Python, which the server imports
            try:
                _importable(self.rule, "Class")
            except ValueError as error:
                raise ValueError(f"rule: {error}") from None
            return self
        kind = RULES.get(self.rule) or SEVERAL.get(self.rule)
        if kind is None:
            names = ", ".join(repr(name) for name in (*RULES, *SEVERAL))
            raise ValueError(
                f"rule: expected one of {names} or 'package.module:Class', got {self.rule!r}"
            )
        try:
            complete(kind.options, self.options, self.rule)
        except ValueError as error:
            raise ValueError(f"options: {error}") from None
        return self

    @model_validator(mode="after")
    def _share_is_one(self) -> AggregationSection:
        Weighing(max_share=self.max_share)
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what changes no weight: runs that began before it could be given go on."""
        of: dict[str, Any] = dump(self)
        if not self.weighing.equal:
            del of["weights"]
        for name in ("max_share", "ema", "lora", "max_rank", "base"):
            if of[name] is None:
                del of[name]
        if of.get("base") == "difference":
            del of["base"]
        return of

    @property
    def weighing(self) -> Weighing:
        """What makes the weights of updates; in a rule that does not weigh, those of buffers.

        In a rule of several passes updates weigh the same unless the run file says otherwise: what it promises
        counts weights, and a site states its own number of examples.
        """
        counted = self.max_share is None and self.rule in SEVERAL
        equal = self.weights == "equal" or (self.weights is None and counted)
        return Weighing(equal, self.max_share)


class TransferSection(Transfer):
    """``[transfer]``: how updates travel (``update``, of top-k the share ``top_k`` that is kept), and whether
    chunks are shuffled and compressed where that pays (``lossless``), models included."""

    @model_validator(mode="after")
    def _consistent(self) -> TransferSection:
        if "top_k" in self.model_fields_set and self.update != "top-k":
            raise ValueError(
                f"top_k is for update = 'top-k'; update is {self.update!r}, so leave it out"
            )
        return self

    @property
    def message(self) -> Transfer:
        """What the sites are told."""
        return Transfer(**self.model_dump())


class SelectionSection(_Section):
    """``[selection]``: which validation metric picks the best model, whether less or more is better, and how the
    sites' values become one (``average``, ``max_share``). Of the best models ``keep_best`` are kept; the run ends
    early after ``patience`` rounds without a better one, or once one reaches ``target``."""

    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    average: Literal["mean", "median"] = "mean"
    max_share: float | None = None
    keep_best: Annotated[int, Field(ge=1, le=1000)] = 1
    patience: Annotated[int, Field(ge=1)] | None = None
    target: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> SelectionSection:
        for name in ("keep_best", "patience", "target"):
            if self.metric is None and name in self.model_fields_set:
                raise ValueError(f"{name}: there is no metric that selects; give metric and mode")
        if (self.metric is None) != (self.mode is None):
            raise ValueError("metric and mode ('min' or 'max') go together")
        Weighing(max_share=self.max_share)
        if self.max_share is not None and self.average == "median":
            raise ValueError("max_share: examples do not count in a median; leave it out")
        return self


class ServerSection(_Section):
    """``[server]``: where to listen, the server's keys or plain text instead, the memory budget for chunks, the
    spill file beyond it, the threads that reduce, how many models are kept, how long to stay after the end, and
    which functions hear of the run's events or are asked before a round."""

    listen: Annotated[str, Field(pattern=r"^tcp://[^\s/]+:([0-9]{1,5}|\*)$")] = (
        "tcp://127.0.0.1:7733"
    )
    keys: str | None = None
    insecure: bool = False
    insecure_network: bool = False
    memory: Size = 256 << 20
    spill: bool = True
    spill_dir: str | None = None
    threads: Annotated[int, Field(ge=1, le=64)] | None = None
    keep_versions: Annotated[int, Field(ge=1)] | None = None
    linger: Duration = 8.0
    listeners: list[FunctionName] = []
    gates: list[FunctionName] = []

    @model_validator(mode="after")
    def _consistent(self) -> ServerSection:
        port = self.listen.rpartition(":")[2]
        if port != "*" and int(port) > 65535:
            raise ValueError(f"listen: expected a port up to 65535, got {port}")
        if self.memory < _MIN_MEMORY:
            raise ValueError("memory: expected at least 16MiB")
        if self.insecure and self.keys is not None:
            raise ValueError("give either keys or insecure = true")
        if self.insecure and not self.insecure_network and not is_loopback(self.listen):
            raise ValueError(
                f"insecure = true means plain text and no check of who connects, and {self.listen} can be reached "
                "from other machines; use keys (`fedcore provision`), or insist with insecure_network = true"
            )
        return self


class SimulatedSite(_Section):
    """``[simulate.site.NAME]``: arguments and environment of one site, after the common ones."""

    args: list[str] = []
    env: dict[str, str] = {}


class SimulateSection(_Section):
    """``[simulate]``: what ``fedcore simulate`` starts for each site."""

    script: str | None = None
    args: list[str] = []
    env: dict[str, str] = {}
    site: dict[Name, SimulatedSite] = {}


class RunConfig(_Section):
    """A whole run file."""

    run: RunSection
    model: ModelSection = ModelSection()
    participants: ParticipantsSection
    aggregation: AggregationSection = AggregationSection()
    transfer: TransferSection = TransferSection()
    selection: SelectionSection = SelectionSection()
    server: ServerSection = ServerSection()
    simulate: SimulateSection = SimulateSection()
    folder: Path = Path()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        for name in self.simulate.site:
            if name not in self.site_names:
                near = difflib.get_close_matches(name, self.site_names, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"simulate.site.{name}: no site has that name{hint}")
        return self

    @model_validator(mode="after")
    def _fits_task(self) -> RunConfig:
        task = self.run.task
        if task in ("evaluate", "infer") and self.model.initial is None:
            raise ValueError(f"model.initial: missing; it names the model for run.task = {task!r}")
        if task == "compare" and self.participants.sites is None:
            raise ValueError("participants.sites: missing; run.task = 'compare' needs the names")
        return self

    @model_validator(mode="after")
    def _go_together(self) -> RunConfig:
        optimizer = self.aggregation.optimizer
        found = conflicts(
            Choices(
                task=self.run.task,
                rule=self.aggregation.rule,
                options=self.aggregation.options,
                update=self.transfer.update,
                optimizer=None if optimizer is None else optimizer.name,
                weights=self.aggregation.weights,
                max_share=self.aggregation.max_share,
                ema=self.aggregation.ema,
                lora=self.aggregation.lora,
                score_share=self.selection.max_share,
                quorum=self.participants.quorum,
                sample=self.participants.sample is not None,
                early=self.selection.patience is not None or self.selection.target is not None,
            )
        )
        if found:
            raise ValueError("\n".join(conflict.text for conflict in found))
        return self

    @property
    def run_folder(self) -> Path:
        """The folder that this run writes: ``[run] dir`` / ``[run] name``."""
        return self.folder / self.run.dir / self.run.name

    @property
    def spill_folder(self) -> Path:
        """Where the spill file goes: ``[server] spill_dir``, or the run folder."""
        named = self.server.spill_dir
        return self.run_folder if named is None else self.folder / named

    @property
    def reducer_threads(self) -> int:
        """Chunks that the server reduces at the same time: ``[server] threads``, or half its cores, at most 4."""
        return self.server.threads or max(1, min(4, (os.cpu_count() or 1) // 2))

    @property
    def keys_folder(self) -> Path | None:
        """The folder with the server's keys, or None."""
        return None if self.server.keys is None else self.folder / self.server.keys

    @property
    def initial_path(self) -> Path | None:
        """The initial model's file or folder, or None."""
        return None if self.model.initial is None else self.folder / self.model.initial

    @property
    def site_names(self) -> list[str]:
        """The sites' names; with ``count``, ``site-1`` and so on, as a simulation names them."""
        if self.participants.sites is not None:
            return list(self.participants.sites)
        return [f"site-{i + 1}" for i in range(self.participants.expected)]


def load_run_file(path: Path | str, overrides: Iterable[str] = ()) -> RunConfig:
    """Read and check a run file.

    Args:
        path: the TOML file.
        overrides: ``section.key=value`` texts that win over the file; the value is TOML, or a bare text.

    Raises:
        ConfigError: lists everything that is wrong; a path in the file leads out of its folder.
    """
    path = Path(path)
    try:
        values = parse_toml(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read run file {path}: {error.strerror}") from None
    given = [_apply(values, override) for override in overrides]
    _check_paths(values, given, path)
    return parse_run(values, folder=path.parent, source=str(path))


def parse_run(
    values: Mapping[str, Any], *, folder: Path = Path(), source: str = "run file"
) -> RunConfig:
    """Check the values of a run file; ``source`` names them in errors."""
    if "folder" in values:
        raise ConfigError(f"{source}: unknown key 'folder'")
    try:
        return RunConfig.model_validate({**values, "folder": folder})
    except ValidationError as error:
        options = [name for finisher in FINISHERS.values() for name in finisher.options]
        lines = explain(error, RunConfig, {OptimizerSection: options})
        raise ConfigError(f"{source}: " + f"\n{source}: ".join(lines)) from None


def _check_paths(values: Mapping[str, Any], given: Iterable[str], path: Path) -> None:
    """Refuse what leads out of the run file's folder, unless it was given on the command line."""
    home = path.parent.resolve()
    for key in _PATHS:
        section, name = key.split(".")
        table = values.get(section)
        value = table.get(name) if isinstance(table, dict) else None
        if not isinstance(value, str) or key in given:
            continue
        if not (home / value).resolve().is_relative_to(home):
            raise ConfigError(
                f"{path}: {key}: {value!r} leads out of the run file's folder; a run file names nothing outside "
                f"of it. Give it on the command line instead: --set {key}={value}"
            )


def _apply(values: dict[str, Any], override: str) -> str:
    """Put an override in its place; returns its key."""
    key, found, text = override.partition("=")
    parts = key.strip().split(".")
    if not found or len(parts) < 2 or not all(parts):
        raise ConfigError(
            f"override {override!r}: expected section.key=value, such as run.rounds=3"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    table = values
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"override {override!r}: {part} is not a section")
    table[parts[-1]] = value
    return ".".join(parts)
