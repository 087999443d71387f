"""A file of nested values and tensors, for what a trainer keeps between processes: no pickle, no code.

The file is ``FDST1`` and a line break, 8 bytes with the length of a JSON text (little-endian), that text, the
bytes of the tensors back to back, and 4 bytes with the CRC-32C of all before. In the text, what JSON does not have
is an object of one member: ``f`` a float in hexadecimal, ``t`` a tuple, ``d`` a dict as pairs, ``b`` bytes in
hexadecimal, ``T`` a tensor: its dtype, its shape and where its bytes begin.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch

from fedcore._core import crc32c

__all__ = ["read_state", "write_state"]

_MAGIC: Final = b"FDST1\n"
_MOST_HEADER: Final = 256 << 20
_KINDS: Final = (torch.Tensor, torch.nn.Parameter)


def write_state(path: Path, value: Any) -> None:
    """Write dicts, lists, tuples, numbers, texts, bytes, None and dense tensors, nested as they are.

    Raises:
        TypeError: a value is of another kind; it is named.
        OSError: the file can't be written.
    """
    tensors: list[torch.Tensor] = []
    text = json.dumps(_plain(value, tensors, [0])).encode()
    with path.open("wb") as file:
        checksum = 0
        for part in (_MAGIC, len(text).to_bytes(8, "little"), text):
            checksum = crc32c(part, checksum)
            file.write(part)
        for tensor in tensors:
            data = _bytes_of(tensor)
            checksum = crc32c(data, checksum)
            file.write(data)
        file.write(checksum.to_bytes(4, "little"))


def read_state(path: Path) -> Any:
    """Return what `write_state` wrote; tensors are in main memory.

    Raises:
        ValueError: the file is torn, or no such file.
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        head = file.read(len(_MAGIC) + 8)
        length = int.from_bytes(head[len(_MAGIC) :], "little")
        if not head.startswith(_MAGIC) or len(head) < len(_MAGIC) + 8 or length > _MOST_HEADER:
            raise ValueError("it is no file of a trainer's state")
        text = file.read(length)
        data = torch.frombuffer(bytearray(file.read()) or bytearray(4), dtype=torch.uint8)
    body, checksum = data[:-4], bytes(data[-4:].tolist())
    found = crc32c(body.numpy().data, crc32c(text, crc32c(head)))
    if len(text) < length or found.to_bytes(4, "little") != checksum:
        raise ValueError("it is damaged (its checksum differs)")
    return _value(json.loads(text), body)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: memoryview = flat.view(torch.uint8).numpy().data
    return data


def _plain(value: Any, tensors: list[torch.Tensor], end: list[int]) -> Any:
    """Return a value as JSON has it; ``end`` is where the next tensor's bytes begin."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return {"f": value.hex() if math.isfinite(value) else str(float(value))}
    if isinstance(value, bytes):
        return {"b": value.hex()}
    if isinstance(value, Mapping):
        return {"d": [[_plain(k, tensors, end), _plain(v, tensors, end)] for k, v in value.items()]}
    if isinstance(value, list):
        return [_plain(item, tensors, end) for item in value]
    if isinstance(value, tuple):
        return {"t": [_plain(item, tensors, end) for item in value]}
    if type(value) in _KINDS and value.layout is torch.strided and not value.is_quantized:
        begin = end[0]
        end[0] += value.numel() * value.element_size()
        tensors.append(value)
        return {"T": [str(value.dtype).removeprefix("torch."), list(value.shape), begin]}
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        return _plain(value.item(), tensors, end)
    raise TypeError(f"a {type(value).__name__} can't be kept")


def _value(plain: Any, data: torch.Tensor) -> Any:
    if isinstance(plain, list):
        return [_value(item, data) for item in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind == "f":
        return float.fromhex(content)
    if kind == "b":
        return bytes.fromhex(content)
    if kind == "t":
        return tuple(_value(item, data) for item in content)
    if kind == "d":
        return {_value(key, data): _value(item, data) for key, item in content}
    name, shape, begin = content
    dtype = getattr(torch, name)
    if kind != "T" or not isinstance(dtype, torch.dtype):
        raise ValueError(f"it holds a value of an unknown kind {kind!r}")
    empty = torch.empty(shape, dtype=dtype)
    size = empty.numel() * empty.element_size()
    if size:
        empty.reshape(-1).view(torch.uint8).copy_(data[begin : begin + size])
    return empty
