"""Messages to bytes and back: UTF-8 JSON. Each field of what comes is checked before it is used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fedcore.errors import ProtocolError

from .base import Message
from .fields import (
    MAX_ANSWER_BYTES,
    MAX_LISTED,
    MAX_METRICS,
    MAX_TENSORS,
    SMALL_BYTES,
    SiteName,
    Version,
    shown,
)
from .frames import MAX_CONTROL_BYTES, Kind, frame_header
from .messages import (
    Accepted,
    Alive,
    Answer,
    Commit,
    Declare,
    Dropped,
    Finish,
    Join,
    Leave,
    Log,
    Problem,
    Ready,
    Refused,
    Rejoin,
    Score,
    Stopped,
    Task,
    Welcome,
)
from .status import Command, CommandReply, MetricsReply, MetricsRequest, StatusReply, StatusRequest

_M = TypeVar("_M", bound=Message)
_TEXT_MARKS: Final = 50_000
"""So many commas and colons, and a fifth as many brackets, may be in a declaration's files and names."""

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
    | MetricsRequest
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
    | MetricsReply
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
    body = message.model_dump_json(exclude=message.left_out()).encode()
    if len(body) > MAX_CONTROL_BYTES:
        raise ProtocolError(
            f"a {message.type!r} message of {len(body)} bytes exceeds the limit of {MAX_CONTROL_BYTES}"
        )
    return body


def control_frames(
    message: FromSite | FromServer | bytes, version: int | None = None
) -> tuple[bytes, bytes]:
    """Return the header and body frames of a control message, or of a body that is one already.

    ``version`` is for a receiver of another version of the protocol.
    """
    body = message if isinstance(message, bytes) else encode(message)
    if version is None:
        return frame_header(Kind.CONTROL, body=body), body
    return frame_header(Kind.CONTROL, body=body, version=version), body


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
        return _decode(_FROM_SITE, body, tensors=tensors)
    found = _LARGE_TYPE.match(body)
    kind = found[1].decode() if found else ""
    if kind == "declare":
        listed = min(tensors, MAX_LISTED)
        most, brackets, commas = MAX_CONTROL_BYTES, 2 * listed, 5 * listed
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
        raise ProtocolError(
            f"bad control message: {kind}: more than {min(tensors, MAX_LISTED)} tensors or values"
        )
    return _decode(_LARGE[kind], body, kind, tensors)


class Greeting(BaseModel):
    """What the `Join` of every version says, whatever else is in it."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    type: Literal["join"]
    protocol: int
    version: Version
    site: SiteName


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


def _decode(
    adapter: TypeAdapter[_M], body: bytes, kind: str = "", tensors: int = MAX_TENSORS
) -> _M:
    try:
        message = adapter.validate_json(body, context={"tensors": tensors})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        # What the sender wrote can be in both: its keys are part of the place, its type of the message.
        place = [kind] * bool(kind) + [str(part) for part in first["loc"]]
        where = shown(".".join(place) or "message", 200)
        raise ProtocolError(f"bad control message: {where}: {shown(first['msg'], 500)}") from None
    if message.ext is not None and message.ext.unknown:
        raise ProtocolError(
            f"bad control message: {message.type}: ext.must names {', '.join(message.ext.unknown)}, which this "
            f"version of fedcore does not know; install the same version on both sides"
        )
    return message
