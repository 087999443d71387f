"""Tensors of which each rank holds a part: whole for the way out, in parts again on the way in.

These are DTensors, as FSDP2 makes them, which know their mesh and how they are placed. One tensor is whole at a
time. `whole` and `put` are collective calls: every rank names the same tensor.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["address", "is_sharded", "local", "put", "whole"]


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether each rank may hold a part of this tensor only."""
    return any(cls.__name__ == "DTensor" for cls in type(tensor).__mro__)


def local(tensor: Any) -> torch.Tensor:
    """Return this rank's part, which shares the tensor's storage."""
    part: torch.Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def address(tensor: Any) -> int:
    """Return where this rank's part begins; 0 if it holds nothing."""
    return int(local(tensor).data_ptr())


def whole(tensor: Any) -> torch.Tensor:
    """Return the whole tensor, on the device that holds the parts."""
    full: torch.Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return full


def put(target: Any, value: torch.Tensor) -> None:
    """Copy a whole tensor, which each rank has, into the parts."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(device=target.device, dtype=target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    elif _is_flat(target) and _is_flat(value) and target.dtype == value.dtype and value.numel():
        # By one thread: torch's own would spin while they wait for each other, which costs more than it saves.
        target.reshape(-1).view(torch.uint8).numpy()[:] = (
            value.reshape(-1).view(torch.uint8).numpy()
        )
        return
    target.copy_(value)


def _is_flat(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()
