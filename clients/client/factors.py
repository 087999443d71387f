"""The factors of LoRA adapters in a torch model: which tensors they are, and how some stay as they are."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

import torch

from fedcore.adapters.groups import find_groups, parse_config
from fedcore.adapters.refusals import check_adapter
from fedcore.layout import TensorSpec
from fedcore.protocol import LoraMethod
from fedcore.roles import Pairs

from .sharding import address

__all__ = ["Held", "lora_pairs"]

logger = logging.getLogger("fedcore.client")


def lora_pairs(card: str, tensors: Sequence[TensorSpec], method: LoraMethod) -> Pairs:
    """Return the names of A and B of each module that an adapter changes; say what its method does not get right.

    Args:
        card: the text of its ``adapter_config.json``.
        tensors: what travels of it.
        method: how the run combines it.

    Raises:
        ConfigError: the method refuses what the adapter has; the message says why, and what works.
        LayoutError: it holds no adapted module, or half of one.
    """
    config = parse_config(card, where="the adapter")
    for note in check_adapter(config, tensors, method, where="the adapter"):
        logger.warning("%s", note)
    return tuple(sorted((group.a, group.b) for group in find_groups(tensors)[0]))


_on_gradient: Any = torch.Tensor.register_post_accumulate_grad_hook


class Held:
    """Keeps parameters as they are while others are trained: they never have a gradient when an optimizer steps.

    ``requires_grad`` would not do: trainers make an optimizer once, of what requires a gradient then, and it is to
    hold both factors where they are trained in turn; and PEFT sets it anew when an adapter is chosen.
    """

    def __init__(self) -> None:
        self._hooks: list[Any] = []

    def hold(self, model: torch.nn.Module, tensors: Collection[torch.Tensor]) -> None:
        """Hold the parameters in which these tensors lie, and no others any more."""
        self.remove()
        places = {address(tensor) for tensor in tensors}
        for parameter in model.parameters():
            if parameter.requires_grad and address(parameter) in places:
                parameter.grad = None
                self._hooks.append(_on_gradient(parameter, _drop))

    def remove(self) -> None:
        """Let all be trained again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None
