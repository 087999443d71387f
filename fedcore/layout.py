"""Tensor tables and their hash.

A *layout* is the canonical order, dtypes, shapes and byte offsets of a tensor set, with its chunk grid; the
compiled core computes it (`fedcore._core.Layout`). This module gives a layout its hash and compares two of them in
words. `fedcore.model_file` has the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ._core import Layout
from .errors import LayoutError
from .protocol import DEFAULT_CHUNK_BYTES, MAX_TENSOR_NAME, RESERVED_NAME

__all__ = [
    "DEFAULT_CHUNK_BYTES",
    "FLOATS",
    "ITEMSIZE",
    "TensorSpec",
    "check_names",
    "compare_layouts",
    "layout_hash",
    "table",
]

ITEMSIZE: Final[Mapping[str, int]] = {
    "F64": 8, "I64": 8, "U64": 8,
    "F32": 4, "I32": 4, "U32": 4,
    "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of each dtype, by its ``safetensors`` name."""
FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"})
"""The dtypes that are averaged; tensors of the others are taken from the global model."""

TensorSpec = tuple[str, str, Sequence[int]]
"""Name, dtype (a key of `ITEMSIZE`) and shape of one tensor."""


def check_names(names: Iterable[Any]) -> None:
    """Refuse names of tensors that a model file or a message can't hold.

    Raises:
        LayoutError: a name is no text, is empty, too long or not printable, or has a meaning in the file format.
    """
    for name in names:
        if not isinstance(name, str):
            wrong = f"is {type(name).__name__} and no text; use a text as its name, such as {str(name)!r}"
        elif name == RESERVED_NAME:
            wrong = "is what safetensors files call their own header; rename the tensor"
        elif not name:
            wrong = "is empty; give the tensor a name"
        elif len(name) > MAX_TENSOR_NAME:
            wrong = f"has {len(name):,} characters, and at most {MAX_TENSOR_NAME:,} are allowed; shorten it"
        elif not name.isprintable():
            bad = next(c for c in name if not c.isprintable())
            wrong = f"holds {bad!a}, which is not printable; rename the tensor without it"
        else:
            continue
        shown = ascii(name) if len(str(name)) <= 100 else ascii(str(name)[:100]) + "..."
        raise LayoutError(f"the tensor's name {shown} {wrong}")


def layout_hash(layout: Layout) -> str:
    """Return the SHA-256 (hex) of a layout's canonical JSON: names, dtypes and shapes in canonical order."""
    text = json.dumps(table(layout), separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def table(layout: Layout) -> list[tuple[str, str, list[int]]]:
    """Return ``(name, dtype, shape)`` of every tensor in canonical order."""
    return [(name, dtype, list(shape)) for name, dtype, shape, _, _ in layout.tensors]


def compare_layouts(
    ours: Iterable[TensorSpec],
    theirs: Iterable[TensorSpec],
    our_name: str,
    their_name: str,
    *,
    limit: int = 5,
) -> str | None:
    """Describe how two tensor sets differ, or return None where they agree.

    The text names each tensor that differs with dtype and shape on both sides, ``limit`` of them at most.
    """
    a = {name: (dtype, list(shape)) for name, dtype, shape in ours}
    b = {name: (dtype, list(shape)) for name, dtype, shape in theirs}
    if a == b:
        return None
    lines = [
        f"tensor {name!r}: {our_name} {_describe(a.get(name))}, {their_name} {_describe(b.get(name))}"
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    ]
    more = f"; and {len(lines) - limit} more" if len(lines) > limit else ""
    return "; ".join(lines[:limit]) + more


def _describe(entry: tuple[str, list[int]] | None) -> str:
    return "does not have it" if entry is None else f"has {entry[0]} {entry[1]}"
