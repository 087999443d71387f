"""Read GGUF files of version 2 and 3, with quantised tensors widened to float32.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): a header of typed key-value pairs, a table
of tensors, then the tensors' bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import numpy as np
from numpy.typing import NDArray

from .assets import AssetError

__all__ = ["Floats", "GgufFile"]

Floats = NDArray[np.float32]

_MAGIC: Final = b"GGUF"
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_BLOCK: Final = 32


def _halves(blocks: NDArray[np.uint8], start: int) -> Floats:
    """The half-precision number at a byte of every block, as a column."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view("<f2").astype(np.float32)


def _q4_1(blocks: NDArray[np.uint8]) -> Floats:
    """Scale, minimum, 16 bytes: the low halves are the block's first 16 values, the high ones the rest."""
    packed = blocks[:, 4:]
    values = np.concatenate([packed & 0x0F, packed >> 4], axis=1).astype(np.float32)
    return values * _halves(blocks, 0) + _halves(blocks, 2)


def _q8_0(blocks: NDArray[np.uint8]) -> Floats:
    """Scale, 32 signed bytes."""
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _halves(blocks, 0)


@dataclass(frozen=True)
class _Kind:
    """How one type of tensor is stored."""

    values: int
    size: int
    widen: Callable[[NDArray[np.uint8]], Floats]


#: By the number that stands for the type in the file.
_KINDS: Final = MappingProxyType(
    {
        0: _Kind(1, 4, lambda blocks: blocks.view("<f4").astype(np.float32)),
        1: _Kind(1, 2, lambda blocks: blocks.view("<f2").astype(np.float32)),
        3: _Kind(_BLOCK, 20, _q4_1),
        8: _Kind(_BLOCK, 34, _q8_0),
    }
)


class GgufFile:
    """The metadata and the tensors of a GGUF file.

    Raises:
        AssetError: it is no GGUF file, or it is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self._table: dict[str, tuple[tuple[int, ...], int, int]] = {}
        try:
            with path.open("rb") as file:
                self._read_header(file)
        except (struct.error, UnicodeDecodeError) as error:
            raise AssetError(f"{path} is cut short or damaged: {error}") from error

    def _read_header(self, file: BinaryIO) -> None:
        magic, version = file.read(4), _number(file, "I")
        if magic != _MAGIC or version not in (2, 3):
            raise AssetError(f"{self.path} is no GGUF file of version 2 or 3")
        tensors, pairs = _number(file, "Q"), _number(file, "Q")
        for _ in range(pairs):
            key = _text(file)
            self.metadata[key] = _value(file, _number(file, "I"))
        for _ in range(tensors):
            name = _text(file)
            # The format counts dimensions from the innermost one.
            shape = tuple(_number(file, "Q") for _ in range(_number(file, "I")))[::-1]
            self._table[name] = (shape, _number(file, "I"), _number(file, "Q"))
        alignment = int(self.metadata.get("general.alignment", 32))
        self._start = -(-file.tell() // alignment) * alignment

    def names(self) -> list[str]:
        """Every tensor's name, in the file's order."""
        return list(self._table)

    def tensor(self, name: str) -> Floats:
        """Return one tensor, widened to float32.

        Raises:
            AssetError: the tensor is of a type that this reader does not know, or its bytes are missing.
        """
        shape, number, offset = self._table[name]
        kind = _KINDS.get(number)
        if kind is None:
            raise AssetError(f"{self.path}: {name} has type {number}, which is not supported")
        count = int(np.prod(shape)) // kind.values
        start = self._start + offset
        if start + count * kind.size > self.path.stat().st_size:
            raise AssetError(f"{self.path} is cut short: {name} lies beyond its end")
        blocks = np.fromfile(self.path, np.uint8, count * kind.size, offset=start)
        return kind.widen(blocks.reshape(count, kind.size)).reshape(shape)


def _number(file: BinaryIO, code: str) -> Any:
    layout = struct.Struct("<" + code)
    return layout.unpack(file.read(layout.size))[0]


def _text(file: BinaryIO) -> str:
    length = _number(file, "Q")
    return file.read(length).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _text(file)
    if kind == _ARRAY:
        inner, count = _number(file, "I"), _number(file, "Q")
        return [_value(file, inner) for _ in range(count)]
    if kind not in _SCALARS:
        raise AssetError(f"a value of type {kind}, which no GGUF file has")
    return _number(file, _SCALARS[kind])
