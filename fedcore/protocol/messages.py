"""What sites and server say to each other in a run: the control messages."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    ValidationInfo,
    model_validator,
)

from .base import Message, OfRun, Part
from .fields import (
    MAX_ANSWER_BYTES,
    MAX_DECLARE_BYTES,
    MAX_LISTED,
    MAX_RANK,
    MAX_SETS,
    MODEL,
    Features,
    FrozenTable,
    LayoutHash,
    LoraMethod,
    MetricRows,
    Metrics,
    Outputs,
    Role,
    Round,
    SetId,
    SetName,
    SiteName,
    TensorTable,
    Text,
    UpdateEncoding,
    Version,
    Weight,
    few,
    shown_within,
)
from .frames import MAX_CHUNK_BYTES, PROTOCOL_VERSION
from .tables import Packed, tensor_limit, unpack_table

_S = TypeVar("_S", bound="NamedSet")


class Transfer(Part):
    """How chunks travel in a run: part of `Welcome`.

    ``update`` is the encoding of updates and ``top_k`` the share that top-k keeps; ``lossless`` says whether
    chunks may be shuffled and compressed on top. A chunk may be raw all the same.
    """

    update: UpdateEncoding = "raw"
    top_k: Annotated[float, Field(gt=0, le=1)] = 0.01
    lossless: bool = False


class NamedSet(Part):
    """A tensor set that is published: what it is, the id to pull it by, and the hash of its layout."""

    name: SetName = MODEL
    id: SetId
    layout: LayoutHash


class OpenSet(NamedSet):
    """A published set for those who may not know its layout: ``tensors``, or ``packed``, describes it."""

    tensors: TensorTable = []
    packed: Packed | None = None

    @model_validator(mode="after")
    def _unpacked(self, info: ValidationInfo) -> OpenSet:
        _unpack(self, info)
        return self


def _unique(sets: list[_S]) -> list[_S]:
    if len({one.name for one in sets}) != len(sets):
        raise ValueError("two sets have one name")
    return sets


def _unpack(message: OpenSet | Declare, info: ValidationInfo) -> None:
    """Put the tensors of a packed table where the readers of a message look for them."""
    if message.packed is not None and (info.mode == "json" or not message.tensors):
        if message.tensors:
            raise ValueError("tensors: given twice, listed and packed")
        found = unpack_table(message.packed, tensor_limit(info))
        object.__setattr__(message, "tensors", found)  # its own, before anyone else has seen it
    if not message.tensors:
        raise ValueError("tensors: expected at least one")


def _with_model(sets: list[_S]) -> list[_S]:
    if all(one.name != MODEL for one in sets):
        raise ValueError(f"no set is named {MODEL}")
    return sets


def features(*, lossless: bool) -> dict[str, int]:
    """Return what this version can do, by name; ``lossless`` says whether it can unpack compressed chunks here."""
    return {"encodings": 1, "lora": 1, **({"lossless": 1} if lossless else {})}


# --- from a site -----------------------------------------------------------------------------------


class Join(Message):
    """First message of a site's process, and again whenever the server asks for it with `Rejoin`.

    ``instance`` is random per process: it tells a site that came back from a second process that was
    started under the same name by mistake. ``features`` are what this process can do (`features`), and ``run`` is
    the name or id of the run that it wants to take part in; None: of any.
    """

    type: Literal["join"] = "join"
    protocol: int = PROTOCOL_VERSION
    version: Version
    site: SiteName
    instance: SetId
    features: Features = {}
    run: Text | None = None

    def left_out(self) -> set[str]:
        """Return the fields that are not written where they say nothing."""
        return super().left_out() | ({"run"} if self.run is None else set())


class OfRole(Part):
    """Tensors of one role, by their places in the table of a `Declare`.

    The tensors of ``lora-a`` and those of ``lora-b`` are in one order: the two of a place are the factors of one
    adapted module.
    """

    role: Role
    tensors: Annotated[
        list[Annotated[int, Field(ge=0)]],
        Field(min_length=1, max_length=MAX_LISTED, fail_fast=True),
    ]


class Declare(OfRun):
    """The tensors that this site would send and load, and the small text files that describe its model.

    ``files`` holds the likes of ``config.json`` or ``adapter_config.json``; the server writes them beside
    ``best/`` and ``final/`` so that the folders open with the usual loaders. ``fingerprints`` are digests of what
    must be alike at all sites, such as the tokenizer. ``packed`` stands for ``tensors`` on the wire where there
    are many: `fedcore.protocol.tables`. ``frozen`` describes what the model has and does not
    travel, as `fedcore.files.frozen` compares it. ``roles`` says what each tensor is to the model; what no entry
    names is a parameter, or an integer by its dtype. None: the site does not know.
    """

    type: Literal["declare"] = "declare"
    tensors: TensorTable = []
    packed: Packed | None = None
    files: Annotated[
        dict[
            Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.json$")],
            Annotated[str, StringConstraints(max_length=1 << 20)],
        ],
        BeforeValidator(few),
    ] = {}
    fingerprints: Annotated[
        dict[
            Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")],
            Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")],
        ],
        BeforeValidator(few),
    ] = {}
    frozen: FrozenTable = []
    roles: Annotated[list[OfRole], Field(max_length=16, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _leaves_room(self, info: ValidationInfo) -> Declare:
        """What a site declares comes back in each `Task`, with a little more beside it."""
        _unpack(self, info)
        _check_places(self.roles or [], len(self.tensors))
        if len(self.model_dump_json(exclude=self.left_out())) > MAX_DECLARE_BYTES:
            raise ValueError("tensors and files are too large")
        return self

    def left_out(self) -> set[str]:
        """Return the fields that are not written where they say nothing, or where another one says it."""
        silent = {"roles"} if self.roles is None else set()
        return super().left_out() | silent | ({"packed"} if self.packed is None else {"tensors"})


def _check_places(roles: list[OfRole], count: int) -> None:
    places = [place for of_role in roles for place in of_role.tensors]
    if any(place >= count for place in places):
        raise ValueError(f"roles: a place is beyond the {count:,} tensors")
    if len(set(places)) != len(places):
        raise ValueError("roles: a tensor is named twice")


class Ready(OfRun):
    """An update (round >= 1) or the initial model (round 0) is published and may be pulled."""

    type: Literal["ready"] = "ready"
    round: Round
    sets: Annotated[
        list[NamedSet],
        Field(max_length=MAX_SETS),
        AfterValidator(_unique),
        AfterValidator(_with_model),
    ]
    weight: Weight
    metrics: Metrics = {}

    @property
    def model(self) -> NamedSet:
        """The set that holds the update itself."""
        return next(one for one in self.sets if one.name == MODEL)


class Score(OfRun):
    """Validation metrics of global model ``version`` on this site's data (``examples`` of them).

    ``rows`` holds the number of examples of each metric that was measured on others than all ``examples``.
    """

    type: Literal["score"] = "score"
    version: Round
    metrics: Metrics
    examples: Weight
    rows: MetricRows = {}


class Answer(OfRun):
    """What a site's script chose to say of global model ``version`` in an inference task, and no more.

    At most `MAX_ANSWER_BYTES` as JSON.
    """

    type: Literal["answer"] = "answer"
    version: Round
    outputs: Outputs
    examples: Weight

    @model_validator(mode="after")
    def _small(self) -> Answer:
        size = len(self.model_dump_json())
        if size > MAX_ANSWER_BYTES:
            raise ValueError(f"outputs: {size:,} bytes exceed the limit of {MAX_ANSWER_BYTES:,}")
        return self


class Log(OfRun):
    """Training metrics while a round is under way; shown, never used for selection."""

    type: Literal["log"] = "log"
    round: Round
    step: Annotated[int, Field(ge=0, lt=1 << 53)]
    metrics: Metrics


class Alive(OfRun):
    """A site that is busy with its task is there; the server answers `Rejoin` if it does not know it."""

    type: Literal["alive"] = "alive"


class Problem(OfRun):
    """A site reports an error of its own; the server shows it under the site's name."""

    type: Literal["problem"] = "problem"
    message: Text


class Leave(OfRun):
    """The site's process ends on purpose."""

    type: Literal["leave"] = "leave"
    reason: Text = ""


# --- from the server -------------------------------------------------------------------------------


class Welcome(Message):
    """Answer to `Join`.

    ``run`` is the run's name, ``has_model`` false while the server waits for a first site's model, and
    ``features`` are what the server can do. ``lora`` says how the factors of adapters are combined; None: each
    tensor for itself. It goes only to a site that names the feature ``lora``. ``max_rank`` is the highest rank of
    the global model where the products of the factors are combined; else None.
    """

    type: Literal["welcome"] = "welcome"
    run: Text
    run_id: SetId
    rounds: Round
    chunk_bytes: Annotated[int, Field(ge=4096, le=MAX_CHUNK_BYTES)]
    has_model: bool
    version: Version
    transfer: Transfer = Transfer()
    features: Features = {}
    lora: LoraMethod | None = None
    max_rank: Annotated[int, Field(ge=1, le=MAX_RANK)] | None = None

    def left_out(self) -> set[str]:
        """Return the fields that are not written where they say nothing."""
        of = {"lora": self.lora, "max_rank": self.max_rank}
        return super().left_out() | {name for name, value in of.items() if value is None}


class Accepted(OfRun):
    """Answer to `Declare`: the layouts agree. ``warnings`` say what else differs from other sites."""

    type: Literal["accepted"] = "accepted"
    layout_hash: LayoutHash
    warnings: Annotated[list[Text], Field(max_length=8)] = []


class Refused(Message):
    """The server will not work with this site; ``code`` is machine-readable."""

    type: Literal["refused"] = "refused"
    code: Annotated[str, StringConstraints(max_length=64)]
    message: Annotated[str, StringConstraints(max_length=16384), shown_within(16384)]


class Rejoin(Message):
    """The server does not know the sender (it was restarted, or gave the site up): join again."""

    type: Literal["rejoin"] = "rejoin"


class Task(OfRun):
    """What the site should do now.

    ``kind`` is ``"initial"`` (publish your model as version 0), ``"train"`` (pull version
    ``round - 1``, score it, train, publish), ``"submit"`` (as "train", from version 0; the update becomes version
    ``round``), ``"evaluate"`` (pull version ``round``, score it) or ``"infer"`` (pull it, answer). ``sets`` are
    what is published of the version, the model among them; there are none for ``"initial"``.
    ``included`` is the last version that holds an update of this site, for one that missed a `Commit`.
    ``checksum`` is that of the version's bytes: an update that was trained from other bytes is of no use.
    """

    type: Literal["task"] = "task"
    kind: Literal["initial", "train", "submit", "evaluate", "infer"]
    round: Round
    rounds: Round
    version: Round
    included: Round | None = None
    checksum: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{8})?$")] = ""
    sets: Annotated[list[OpenSet], Field(max_length=MAX_SETS), AfterValidator(_unique)] = []
    seed: Annotated[int, Field(ge=0, lt=1 << 53)] = 0

    @property
    def model(self) -> OpenSet | None:
        """The set that holds the model itself; None for ``"initial"``."""
        return next((one for one in self.sets if one.name == MODEL), None)


class Commit(OfRun):
    """Model ``version`` exists; the site may drop its update. ``included`` says if it counted."""

    type: Literal["commit"] = "commit"
    version: Round
    included: bool
    participants: Annotated[list[SiteName], Field(max_length=100_000)] = []
    message: Text = ""


class Dropped(OfRun):
    """This site's update for ``round`` does not count, and why; it may take part in the next round."""

    type: Literal["dropped"] = "dropped"
    round: Round
    message: Text


class Finish(OfRun):
    """The run is over; no further task will come.

    ``outcome`` says how it ended: all rounds are done, an operator stopped it, or it was given up. ``ok`` is
    whether it is ``"complete"``.
    """

    type: Literal["finish"] = "finish"
    ok: bool
    outcome: Literal["complete", "stopped", "failed"]
    message: Text = ""
    best_version: Round | None = None


class Stopped(OfRun):
    """The server ends before the run does, and why in general words; the run goes on once it is started again."""

    type: Literal["stopped"] = "stopped"
    message: Text
