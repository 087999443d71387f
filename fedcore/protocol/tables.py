"""Tables of tensors that are packed to travel: per-expert adapters of large mixtures have a million of them.

A packed table is the JSON of ``[[name, dtype, shape], ...]``, compressed with zlib, as base64. What it unpacks to
is bounded before it is looked at.
"""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError, ValidationInfo

from .fields import MAX_TENSORS, TensorEntry, shown

__all__ = ["MAX_PACKED_TEXT", "Packed", "pack_table", "packs", "tensor_limit", "unpack_table"]

PACK_FROM: Final = 10_000
"""So many tensors and more travel packed."""
MAX_PACKED_TEXT: Final = 100_000_000
"""Bytes that a packed table may unpack to: the header of a model file, which says more, may have no more."""
_PER_TENSOR: Final = 2048
_MARKS: Final = 100

Packed = Annotated[str, StringConstraints(min_length=1, max_length=8 << 20)]
_TABLE: TypeAdapter[list[TensorEntry]] = TypeAdapter(
    Annotated[list[TensorEntry], Field(min_length=1, max_length=MAX_TENSORS, fail_fast=True)]
)


def packs(tensors: Sequence[Any]) -> bool:
    """Whether a table of these tensors travels packed."""
    return len(tensors) >= PACK_FROM


def pack_table(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> str:
    """Return a packed table."""
    listed = [(name, dtype, list(shape)) for name, dtype, shape in tensors]
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    return base64.b64encode(zlib.compress(text, 6)).decode()


def tensor_limit(info: ValidationInfo) -> int:
    """Return how many tensors the reader of a message takes."""
    context = info.context
    return int(context["tensors"]) if isinstance(context, dict) else MAX_TENSORS


def unpack_table(packed: str, most: int) -> list[TensorEntry]:
    """Return the tensors of a packed table.

    Raises:
        ValueError: it is none; or it has more than ``most`` tensors, or more text than these may have.
    """
    limit = min(MAX_PACKED_TEXT, most * _PER_TENSOR)
    try:
        reader = zlib.decompressobj()
        text = reader.decompress(base64.b64decode(packed, validate=True), limit + 1)
        whole = reader.eof and not reader.unused_data
    except (binascii.Error, ValueError, zlib.error):
        raise ValueError("expected a packed table of tensors") from None
    if len(text) > limit:
        raise ValueError(
            f"more than {limit:,} bytes of text in a table of at most {most:,} tensors"
        )
    if not whole:
        raise ValueError("expected a packed table of tensors")
    # What takes memory to parse is counted first, as in messages that list their tensors.
    if text.count(b"[") > 2 * most + _MARKS or text.count(b",") > 5 * most + _MARKS or b"{" in text:
        raise ValueError(f"more than {most:,} tensors")
    try:
        found = _TABLE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(shown(f"{where}: {first['msg']}", 300)) from None
    if len(found) > most:
        raise ValueError(f"more than {most:,} tensors")
    return found
