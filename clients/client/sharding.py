"""Tensors of which each rank holds a part: whole for the way out, in parts again on the way in.

One tensor is whole at a time. `whole` and `put` are collective calls: every rank names the same tensor.

- FSDP2 and other users of DTensor: the tensor knows its mesh and how it is placed.
- DeepSpeed ZeRO-3: the parameter knows its partitions (``ds_id``).
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["address", "is_sharded", "put", "shape_of", "whole"]


def _is_dtensor(tensor: torch.Tensor) -> bool:
    return type(tensor).__name__ == "DTensor" or any(
        cls.__name__ == "DTensor" for cls in type(tensor).__mro__
    )


def _is_zero(tensor: Any) -> bool:
    return hasattr(tensor, "ds_id") and hasattr(tensor, "ds_shape")


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether each rank holds a part of this tensor only."""
    return _is_dtensor(tensor) or _is_zero(tensor)


def shape_of(tensor: Any) -> list[int]:
    """Return the whole tensor's shape."""
    return list(tensor.ds_shape if _is_zero(tensor) else tensor.shape)


def address(tensor: Any) -> int:
    """Return where this rank's part begins; 0 if it holds nothing."""
    local = tensor.to_local() if _is_dtensor(tensor) else tensor
    return int(local.data_ptr())


def whole(tensor: Any) -> torch.Tensor:
    """Return the whole tensor, on the device that holds the parts."""
    if _is_dtensor(tensor):
        full: torch.Tensor = tensor.full_tensor()
        return full
    if _is_zero(tensor):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return torch.as_tensor(tensor.data).clone()
    return tensor


def put(target: Any, value: torch.Tensor) -> None:
    """Copy a whole tensor, which each rank has, into the parts."""
    if _is_dtensor(target):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(device=target.device, dtype=target.dtype)
        part = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
        target.copy_(part)
    elif _is_zero(target):
        from deepspeed.zero import GatheredParameters

        with GatheredParameters([target], modifier_rank=0):
            target.data.copy_(value)
    else:
        target.copy_(value)
