"""Messages between sites and server, and the 48-byte frame header that carries them.

Tensor bytes travel in data frames, which the compiled core reads and writes. Everything else is a
*control message*: a small, typed, versioned model of this module, sent as UTF-8 JSON behind the same
header. Both sides validate each field before they use it. ``docs/protocol.md`` gives every byte.
"""

from __future__ import annotations

import enum
import json
import math
import re
import struct
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from .errors import ProtocolError

PROTOCOL_VERSION: Final = 1
MAGIC: Final = b"FDC1"
HEADER: Final = struct.Struct("<4sBBBB16sQIIII")
HEADER_BYTES: Final = 48
MAX_CONTROL_BYTES: Final = 8 << 20
MAX_CHUNK_BYTES: Final = 4 << 20
DEFAULT_CHUNK_BYTES: Final = 1 << 20
MAX_WEIGHT: Final = (1 << 24) - 1
MAX_METRICS: Final = 64
MAX_NAME: Final = 128
MAX_ANSWER_BYTES: Final = 1 << 20
MAX_TENSORS: Final = 100_000
MAX_TENSOR_NAME: Final = 1024
RESERVED_NAME: Final = "__metadata__"
"""The key of a safetensors header that is no tensor."""
SMALL_BYTES: Final = 128 << 10
"""What a message may have that neither declares tensors nor answers, with room for text that is spelled out."""
MAX_DECLARE_BYTES: Final = MAX_CONTROL_BYTES - SMALL_BYTES
_TEXT_MARKS: Final = 50_000
"""So many commas and colons, and a fifth as many brackets, may be in a declaration's files and names."""
REPEAT_SECONDS: Final = 5.0
"""A site says something at least this often, so that a server that does not know it can ask it to join again."""
RETURN_SECONDS: Final = 12.0
"""Within this time a site that is there joins a server that was started again: it redials at most two seconds
apart, and then is asked to as soon as it is heard, or speaks within ``REPEAT_SECONDS``."""
NO_SET: Final = bytes(16)

_T = TypeVar("_T")

SITE_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"


class Kind(enum.IntEnum):
    """What a frame is; the byte at offset 5 of its header."""

    GET = 1
    CHUNK = 2
    REFUSE = 3
    PING = 4
    PONG = 5
    CONTROL = 6


def shown(text: str, limit: int) -> str:
    """Return a text as a log or a terminal may show it, at most ``limit`` characters.

    A line break or a tab becomes a space; whatever else is not printable (terminal escapes, marks that turn the
    direction of writing) is spelled out as in Python.
    """
    if not text.isprintable():
        spaced = (" " if c in "\n\r\t" else c for c in text[:limit])
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in spaced)
    return text[:limit]


def _shown_within(limit: int) -> AfterValidator:
    return AfterValidator(lambda text: shown(text, limit))


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected printable characters")
    return text


def _tensor_name(text: str) -> str:
    if text == RESERVED_NAME:
        raise ValueError("model files call their header so; rename the tensor")
    return _printable(text)


SiteName = Annotated[str, StringConstraints(pattern=SITE_NAME)]
MetricName = Annotated[
    str, StringConstraints(min_length=1, max_length=MAX_NAME), _shown_within(MAX_NAME)
]
Metrics = Annotated[
    dict[MetricName, Annotated[float, Field(allow_inf_nan=True)]], Field(max_length=MAX_METRICS)
]
SetId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
LayoutHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, StringConstraints(max_length=4096), _shown_within(4096)]
Version = Annotated[str, StringConstraints(max_length=64), _shown_within(64)]
Round = Annotated[int, Field(ge=0, le=1_000_000)]
Steer = Literal["pause", "resume", "stop", "evaluate"]
Weight = Annotated[int, Field(ge=1, le=MAX_WEIGHT)]
UpdateEncoding = Literal["raw", "bf16", "fp16", "int8", "nf4", "top-k"]
"""How the floats of an update travel; the encodings of ``docs/protocol.md``."""


def _scalars(value: Any) -> Any:
    """Check an output by hand: each of a million wrong ones would have an error of its own, and several kinds."""
    for one in value if isinstance(value, list) else (value,):
        if type(one) not in (bool, int, float, str):
            raise ValueError("expected a number, a text or a list of them")
    return value


Outputs = Annotated[
    dict[MetricName, Annotated[Any, AfterValidator(_scalars)]],
    Field(min_length=1, max_length=MAX_METRICS),
]
"""Numbers, texts and lists of them, by name."""


def _few(value: Any) -> Any:
    """Count what a dict has before each of its entries is looked at, and has an error of its own."""
    if isinstance(value, dict) and len(value) > 16:
        raise ValueError("expected at most 16 entries")
    return value


TensorEntry = tuple[
    Annotated[
        str,
        StringConstraints(min_length=1, max_length=MAX_TENSOR_NAME),
        AfterValidator(_tensor_name),
    ],
    Annotated[str, StringConstraints(max_length=8), AfterValidator(_printable)],
    Annotated[list[Annotated[int, Field(ge=0, lt=1 << 48)]], Field(max_length=16, fail_fast=True)],
]
TensorTable = Annotated[
    list[TensorEntry], Field(min_length=1, max_length=MAX_TENSORS, fail_fast=True)
]


class Message(BaseModel):
    """Base of all control messages: unknown fields and wrong types are refused."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, ser_json_inf_nan="constants"
    )


class Transfer(Message):
    """How chunks travel in a run: part of `Welcome`.

    ``update`` is the encoding of updates and ``top_k`` the share that top-k keeps; ``lossless`` says whether
    chunks may be shuffled and compressed on top. A chunk may be raw all the same.
    """

    update: UpdateEncoding = "raw"
    top_k: Annotated[float, Field(gt=0, le=1)] = 0.01
    lossless: bool = False


# --- from a site -----------------------------------------------------------------------------------


class Join(Message):
    """First message of a site's process, and again whenever the server asks for it with `Rejoin`.

    ``instance`` is random per process: it tells a site that came back from a second process that was
    started under the same name by mistake. ``lossless`` says whether this process can unpack compressed chunks.
    """

    type: Literal["join"] = "join"
    protocol: int = PROTOCOL_VERSION
    version: Version
    site: SiteName
    instance: SetId
    lossless: bool = False


class Greeting(BaseModel):
    """What the `Join` of every version says, whatever else is in it."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: Literal["join"]
    protocol: int
    version: Version
    site: SiteName


class Declare(Message):
    """The tensors that this site would send and load, and the small text files that describe its model.

    ``files`` holds the likes of ``config.json`` or ``adapter_config.json``; the server writes them beside
    ``best/`` and ``final/`` so that the folders open with the usual loaders. ``fingerprints`` are digests of what
    must be alike at all sites, such as the tokenizer.
    """

    type: Literal["declare"] = "declare"
    tensors: TensorTable
    files: Annotated[
        dict[
            Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.json$")],
            Annotated[str, StringConstraints(max_length=1 << 20)],
        ],
        BeforeValidator(_few),
    ] = {}
    fingerprints: Annotated[
        dict[
            Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]{0,31}$")],
            Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")],
        ],
        BeforeValidator(_few),
    ] = {}

    @model_validator(mode="after")
    def _leaves_room(self) -> Declare:
        """What a site declares comes back in each `Task`, with a little more beside it."""
        if len(self.model_dump_json()) > MAX_DECLARE_BYTES:
            raise ValueError("tensors and files are too large")
        return self


class Ready(Message):
    """An update (round >= 1) or the initial model (round 0) is published and may be pulled."""

    type: Literal["ready"] = "ready"
    round: Round
    set_id: SetId
    layout_hash: LayoutHash
    weight: Weight
    metrics: Metrics = {}


class Score(Message):
    """Validation metrics of global model ``version`` on this site's data (``examples`` of them)."""

    type: Literal["score"] = "score"
    version: Round
    metrics: Metrics
    examples: Weight


class Answer(Message):
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


class Log(Message):
    """Training metrics while a round is under way; shown, never used for selection."""

    type: Literal["log"] = "log"
    round: Round
    step: Annotated[int, Field(ge=0, lt=1 << 53)]
    metrics: Metrics


class Alive(Message):
    """A site that is busy with its task is there; the server answers `Rejoin` if it does not know it."""

    type: Literal["alive"] = "alive"


class Problem(Message):
    """A site reports an error of its own; the server shows it under the site's name."""

    type: Literal["problem"] = "problem"
    message: Text


class Leave(Message):
    """The site's process ends on purpose."""

    type: Literal["leave"] = "leave"
    reason: Text = ""


class StatusRequest(Message):
    """Asked by ``fedcore status``; needs no `Join`."""

    type: Literal["status-request"] = "status-request"


class Command(Message):
    """An operator steers the run; needs no `Join`. ``"pause"``: begin no round after the one under way."""

    type: Literal["command"] = "command"
    action: Steer


# --- from the server -------------------------------------------------------------------------------


class Welcome(Message):
    """Answer to `Join`. ``has_model`` is false while the server waits for a first site's model."""

    type: Literal["welcome"] = "welcome"
    run: Text
    run_id: SetId
    rounds: Round
    chunk_bytes: Annotated[int, Field(ge=4096, le=MAX_CHUNK_BYTES)]
    has_model: bool
    version: Version
    transfer: Transfer = Transfer()


class Accepted(Message):
    """Answer to `Declare`: the layouts agree."""

    type: Literal["accepted"] = "accepted"
    layout_hash: LayoutHash


class Refused(Message):
    """The server will not work with this site; ``code`` is machine-readable."""

    type: Literal["refused"] = "refused"
    code: Annotated[str, StringConstraints(max_length=64)]
    message: Annotated[str, StringConstraints(max_length=16384), _shown_within(16384)]


class Rejoin(Message):
    """The server does not know the sender (it was restarted, or gave the site up): join again."""

    type: Literal["rejoin"] = "rejoin"


class Task(Message):
    """What the site should do now.

    ``kind`` is ``"initial"`` (publish your model as version 0), ``"train"`` (pull version
    ``round - 1``, score it, train, publish), ``"submit"`` (as "train", from version 0; the update becomes version
    ``round``), ``"evaluate"`` (pull version ``round``, score it) or ``"infer"`` (pull it, answer). ``set_id``
    names the published model to pull and ``tensors`` is its layout; both are empty for ``"initial"``.
    ``included`` is the last version that holds an update of this site, for one that missed a `Commit`.
    """

    type: Literal["task"] = "task"
    kind: Literal["initial", "train", "submit", "evaluate", "infer"]
    round: Round
    rounds: Round
    version: Round
    included: Round | None = None
    set_id: SetId | None = None
    layout_hash: LayoutHash | None = None
    tensors: TensorTable | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 53)] = 0


class Commit(Message):
    """Model ``version`` exists; the site may drop its update. ``included`` says if it counted."""

    type: Literal["commit"] = "commit"
    version: Round
    included: bool
    participants: Annotated[list[SiteName], Field(max_length=100_000)] = []
    message: Text = ""


class Dropped(Message):
    """This site's update for ``round`` does not count, and why; it may take part in the next round."""

    type: Literal["dropped"] = "dropped"
    round: Round
    message: Text


class Finish(Message):
    """The run is over (``ok``) or was given up; no further task will come."""

    type: Literal["finish"] = "finish"
    ok: bool
    message: Text = ""
    best_version: Round | None = None


class Stopped(Message):
    """The server ends before the run does, and why in general words; the run goes on once it is started again."""

    type: Literal["stopped"] = "stopped"
    message: Text


class CommandReply(Message):
    """Answer to `Command`: whether it is carried out, and what that means or why not."""

    type: Literal["command-reply"] = "command-reply"
    ok: bool
    message: Text


class SiteStatus(Message):
    """One site's line in a `StatusReply`."""

    site: SiteName
    state: Literal[
        "absent", "joined", "training", "uploading", "delivered", "lost", "dropped", "left"
    ]
    examples: int | None = None
    metrics: Metrics = {}
    message: Text = ""


class VersionStatus(Message):
    """One global model in a `StatusReply`: its weighted validation metrics and who is in it."""

    version: Round
    metrics: Metrics = {}
    participants: list[SiteName] = []
    seconds: float | None = None
    bytes: int = 0


class StatusReply(Message):
    """A snapshot of the run, as ``fedcore status`` and the live views show it."""

    type: Literal["status-reply"] = "status-reply"
    run: Text
    phase: Literal["waiting", "initial", "training", "aggregating", "evaluating", "done", "failed"]
    round: Round
    rounds: Round
    metric: Text | None
    mode: Literal["min", "max"] | None
    best_version: Round | None = None
    model_bytes: int = 0
    chunks_done: int = 0
    chunks: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    elapsed: float = 0.0
    eta: float | None = None
    sites: list[SiteStatus] = []
    versions: list[VersionStatus] = []
    message: Text = ""


FromSite = (
    Join
    | Declare
    | Ready
    | Score
    | Answer
    | Log
    | Alive
    | Problem
    | Leave
    | StatusRequest
    | Command
)
FromServer = (
    Welcome
    | Accepted
    | Refused
    | Rejoin
    | Task
    | Commit
    | Dropped
    | Finish
    | Stopped
    | StatusReply
    | CommandReply
)

_FROM_SITE: TypeAdapter[FromSite] = TypeAdapter(Annotated[FromSite, Field(discriminator="type")])
_LARGE: Final[dict[str, TypeAdapter[FromSite]]] = {
    "declare": TypeAdapter(Declare),
    "answer": TypeAdapter(Answer),
}
_LARGE_TYPE: Final = re.compile(rb'\s{0,9}\{\s{0,9}"type"\s{0,9}:\s{0,9}"(declare|answer)"')
_FROM_SERVER: TypeAdapter[FromServer] = TypeAdapter(
    Annotated[FromServer, Field(discriminator="type")]
)


def encode(message: FromSite | FromServer) -> bytes:
    """Return the JSON body of ``message``. NaN and infinity keep their JavaScript spelling."""
    body = message.model_dump_json().encode()
    if len(body) > MAX_CONTROL_BYTES:
        raise ProtocolError(
            f"a {message.type!r} message of {len(body)} bytes exceeds the limit of {MAX_CONTROL_BYTES}"
        )
    return body


def decode_from_site(body: bytes, tensors: int = MAX_TENSORS) -> FromSite:
    """Parse and validate a site's message.

    What takes memory and time to parse is counted first, and a large message is of the type that it begins with: a
    bracket takes a kilobyte, and each wrong value an error of its own.

    Args:
        tensors: how many a `Declare` may name.

    Raises:
        ProtocolError: names the field, what was expected and what came.
    """
    if len(body) <= SMALL_BYTES:
        return _decode(_FROM_SITE, body)
    found = _LARGE_TYPE.match(body)
    kind = found[1].decode() if found else ""
    if kind == "declare":
        most, brackets, commas = MAX_CONTROL_BYTES, 2 * tensors, 5 * tensors
    elif kind == "answer":
        most, brackets, commas = MAX_ANSWER_BYTES + SMALL_BYTES, 0, MAX_ANSWER_BYTES
    else:
        most, brackets, commas = SMALL_BYTES, 0, 0
    if len(body) > most:
        raise ProtocolError(
            f"bad control message: {len(body)} bytes; one that begins with its type may have {MAX_CONTROL_BYTES} "
            f"if it declares tensors, {MAX_ANSWER_BYTES} if it answers, others {SMALL_BYTES}"
        )
    if (
        body.count(b"[") + body.count(b"{") > brackets + _TEXT_MARKS // 5
        or body.count(b",") > commas + _TEXT_MARKS
        or body.count(b":") > brackets // 2 + _TEXT_MARKS
    ):
        raise ProtocolError(f"bad control message: {kind}: more than {tensors} tensors or values")
    return _decode(_LARGE[kind], body, kind)


def greeting(body: bytes) -> Greeting | None:
    """Return who speaks in a message that `decode_from_site` can't read; None if it is no `Join`."""
    if len(body) > SMALL_BYTES:
        return None
    try:
        return Greeting.model_validate_json(body)
    except ValidationError:
        return None


def decode_from_server(body: bytes) -> FromServer:
    """Parse and validate a server's message; errors as in `decode_from_site`."""
    return _decode(_FROM_SERVER, body)


def strict_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """Return values as JSON for other programs, which knows neither NaN nor infinity: null stands for them."""

    def strict(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: strict(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [strict(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(strict(values), indent=indent, allow_nan=False)


def first_metrics(metrics: Mapping[str, float], chosen: str | None) -> dict[str, float]:
    """Return as many metrics as a message holds, ``chosen`` among them: each site may have names of its own."""
    names = sorted(metrics, key=lambda name: (name != chosen, name))[:MAX_METRICS]
    return {name: metrics[name] for name in sorted(names)}


def _decode(adapter: TypeAdapter[_T], body: bytes, kind: str = "") -> _T:
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # What the sender wrote can be in both: its keys are part of the place, its type of the message.
        place = [kind] * bool(kind) + [str(part) for part in first["loc"]]
        where = shown(".".join(place) or "message", 200)
        raise ProtocolError(f"bad control message: {where}: {shown(first['msg'], 500)}") from None
