"""Where means are computed: on the CPU, or on an NVIDIA GPU where that was asked for.

Both give the same bits. ``auto`` is the CPU: a mean reads every byte once, and bytes that come from a network
card or a file are in the host's memory, so a GPU would have to be sent all of them over a bus that is slower
than the memory itself. Of encoded updates, which go there as they travelled, no GPU's time was measured
(docs/numerics.md).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from . import _core
from .errors import ConfigError

if TYPE_CHECKING:
    from ._cuda import Device

__all__ = ["CHOICES", "device_blocks", "device_failure", "use_device"]

CHOICES: Final = ("auto", "cpu", "cuda")

_in_use: Device | None = None


def use_device(choice: str | None = None) -> str:
    """Choose for this process where means are computed, and return the name of that place.

    Args:
        choice: ``auto``, ``cpu`` or ``cuda``; the variable FEDCORE_DEVICE decides if None, else ``auto``.

    Raises:
        ConfigError: the choice is none of the three, or it is ``cuda`` and no GPU can be used.
    """
    global _in_use  # noqa: PLW0603 - as the choice of the kernels, one per process
    source = "--device" if choice is not None else "FEDCORE_DEVICE"
    chosen = choice or os.environ.get("FEDCORE_DEVICE") or "auto"
    if chosen not in CHOICES:
        raise ConfigError(f"{source}={chosen}: expected one of {', '.join(CHOICES)}")
    if chosen != "cuda":
        _core.set_device(None)
        _in_use = None
        return "CPU"
    device = open_gpu(source)
    _core.set_device(device.capsule())
    _in_use = device
    return device.name


def device_failure() -> str:
    """Return what ended the use of the GPU, after which the CPU went on; empty if nothing did."""
    return "" if _in_use is None else _in_use.failure


def device_blocks() -> int:
    """Return how many blocks the GPU in use has averaged in this process; 0 on the CPU."""
    return 0 if _in_use is None else _in_use.blocks


def open_gpu(source: str) -> Device:
    try:
        from . import _cuda
    except ImportError as error:
        raise ConfigError(
            f"{source}=cuda: this installation was built without CUDA ({error}); install it again where nvcc "
            "is on the path with -C cmake.define.FEDCORE_CUDA=ON, or use cpu"
        ) from None
    count, why = _cuda.device_count()
    if count == 0:
        raise ConfigError(f"{source}=cuda: no GPU can be used: {why}; use cpu")
    try:
        return _cuda.open_device(0)
    except ValueError as error:
        raise ConfigError(f"{source}=cuda: {error}; use cpu") from None
