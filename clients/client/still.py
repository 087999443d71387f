"""What is frozen stays as it was: buffers that training has moved are put back, and parameters are watched.

In training mode a frozen module still moves its buffers, such as the running statistics of a batch norm. They do
not travel, so a score would be that of a model which nobody else has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

import torch
from torch import nn

__all__ = ["Still", "moved_text"]

_PROBES: Final = 16
_SHOWN: Final = 6


class Still:
    """Remembers what is frozen in a model, before it was trained.

    Args:
        tensors: yields name, owning module and tensor of what is frozen, at each call as it is now.
    """

    def __init__(
        self, tensors: Callable[[], Iterator[tuple[str, nn.Module, torch.Tensor]]]
    ) -> None:
        self._said = ""
        self._buffers: dict[str, torch.Tensor] = {}
        self._probes: dict[str, torch.Tensor] = {}
        for name, module, tensor in tensors():
            if _is_buffer(module, tensor):
                self._buffers[name] = tensor.detach().to("cpu", copy=True)
            elif not tensor.is_meta:
                self._probes[name] = _probe(tensor)

    def settle(self, tensors: Iterable[tuple[str, nn.Module, torch.Tensor]]) -> str:
        """Put moved buffers back; returns what is to be said of it, empty if it was said before."""
        text = moved_text(*self.restore(tensors))
        if text == self._said:
            return ""
        self._said = text or self._said
        return text

    def restore(
        self, tensors: Iterable[tuple[str, nn.Module, torch.Tensor]]
    ) -> tuple[list[str], list[str]]:
        """Put moved buffers back; returns their names, and those of parameters that moved and were left."""
        restored: list[str] = []
        moved: list[str] = []
        with torch.no_grad():
            for name, _, tensor in tensors:
                if (kept := self._buffers.get(name)) is not None:
                    known = kept.to(device=tensor.device, dtype=tensor.dtype)
                    if known.shape == tensor.shape and not torch.equal(known, tensor):
                        tensor.copy_(known)
                        restored.append(name)
                elif (probe := self._probes.get(name)) is not None and not tensor.is_meta:
                    now = _probe(tensor)
                    if now.dtype != probe.dtype or now.shape != probe.shape:
                        self._probes[name] = now
                    elif not torch.equal(now, probe):
                        self._probes[name] = now
                        moved.append(name)
        return restored, moved


def moved_text(restored: list[str], moved: list[str]) -> str:
    """Return what a site says of frozen tensors that training has changed; empty if it has changed none."""
    texts = []
    if restored:
        texts.append(
            f"training changed buffers of frozen modules, which do not travel: {_few(restored)}; they were put "
            "back, so that the global model is what is scored: call eval() on these modules in training, or train "
            "their parameters as well, so that they travel"
        )
    if moved:
        texts.append(
            f"training changed frozen parameters, which do not travel: {_few(moved)}; each site has its own "
            "now, and no model of the run holds them: set requires_grad to have them travel, or leave them be"
        )
    return "; ".join(texts)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _is_buffer(module: nn.Module, tensor: torch.Tensor) -> bool:
    """Whether training may move it: a quantiser's codes and scales are buffers too, and large."""
    if isinstance(tensor, nn.Parameter) or tensor.is_meta:
        return False
    return not any(
        buffer.ndim and not (buffer.is_floating_point() or buffer.dtype == torch.bool)
        for buffer in module.buffers(recurse=False)
    )


def _probe(tensor: torch.Tensor) -> torch.Tensor:
    """Return a few elements of what this process holds of a tensor, in main memory."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    flat = local.detach().reshape(-1)
    if flat.numel() <= _PROBES:
        return flat.to("cpu", copy=True)
    step = (flat.numel() - 1) / (_PROBES - 1)
    places = torch.tensor([round(place * step) for place in range(_PROBES)], device=flat.device)
    return flat[places].cpu()
