"""Keep a model's dtype over an evaluation that casts it, as ``bf16_full_eval`` does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["kept_dtypes"]


@contextlib.contextmanager
def kept_dtypes(model: Any) -> Iterator[None]:
    """Put the very tensors back that the model had before the block, with the values that a cast would round.

    They stay in memory beside their cast copies.
    """
    parameters = [(parameter, parameter.data) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        for parameter, before in parameters:
            if parameter.dtype != before.dtype:
                parameter.data = before
        for module, name, buffer in buffers:
            if buffer is not None and module._buffers[name].dtype != buffer.dtype:
                module._buffers[name] = buffer
