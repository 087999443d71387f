"""What is wrong with the values of a file, in words: each line names the key, what was expected and what came."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

__all__ = ["explain", "hint"]

_Loc = tuple[int | str, ...]


def explain(
    error: ValidationError, root: type[BaseModel], more: Mapping[type, Sequence[str]]
) -> list[str]:
    """Return the lines of a failed validation.

    Args:
        error: of ``root``, the model of the whole file.
        more: keys that a section takes besides its fields.
    """
    found = error.errors(include_url=False)
    texts = [
        _explain(item["loc"], item["type"], item["msg"], item.get("input"), (root, more))
        for item in found
    ]
    return [line for text in texts for line in text.split("\n")]


def _explain(
    loc: _Loc,
    kind: str,
    message: str,
    value: object,
    of: tuple[type[BaseModel], Mapping[type, Sequence[str]]],
) -> str:
    key = ".".join(str(part) for part in loc)
    if kind == "extra_forbidden":
        known = _known_keys(loc[:-1], *of)
        return f"unknown key {key!r}{hint(str(loc[-1]), known)}"
    if kind == "missing":
        return f"{key}: missing; it must be given"
    text = message.removeprefix("Value error, ")
    name, colon, rest = text.partition(": ")
    if (
        key and colon and name in _known_keys(loc, *of)
    ):  # a section's own check tells which of its keys it means
        key, text = f"{key}.{name}", rest
    if kind == "string_pattern_mismatch" and key.endswith("listen"):
        text = "expected an address such as 'tcp://0.0.0.0:7733'"
    elif kind == "string_pattern_mismatch":
        text = "expected 1 to 63 letters, digits, '.', '_' or '-', beginning with a letter or digit"
    elif kind == "list_type":
        text = (
            f"expected a list, such as [{value!r}]" if isinstance(value, str) else "expected a list"
        )
    elif kind == "model_type":
        text = "expected a table of keys"
    text = text.replace("Input should be", "expected")
    got = "" if "got " in text or isinstance(value, dict | BaseModel) else f", got {value!r}"
    return f"{key}: {text}{got}" if key else text


def hint(name: str, known: list[str]) -> str:
    """Return what is added to the text about an unknown key: the known one that is nearest, or all of them."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(known)}"


def _known_keys(loc: _Loc, root: type[BaseModel], more: Mapping[type, Sequence[str]]) -> list[str]:
    model: Any = root
    for part in loc:
        if isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            model = model.model_fields[str(part)].annotation
        else:
            arguments = typing.get_args(model)
            model = arguments[-1] if arguments else None
        if isinstance(model, types.UnionType):
            model = typing.get_args(model)[0]
    if isinstance(model, type) and issubclass(model, BaseModel):
        return [name for name in [*model.model_fields, *more.get(model, ())] if name != "folder"]
    return []
