"""Prompts that a small network computes (p-tuning, prefix tuning with a projection), loaded and trained on.

What travels is the prompt, in PEFT's file format: the network that computes it stays at its site. A loaded prompt
can't be put into that network, so an offset is added to its output that makes it the loaded prompt; training goes
on from there.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["computes_prompt", "is_computed", "load_prompt"]

_OFFSET = "_fedcore_offset"


def is_computed(model: Any, adapter: str) -> bool:
    """Whether a network computes the prompt; a table of embeddings is the prompt itself."""
    encoder = model.prompt_encoder[adapter]
    return {name for name, _ in encoder.named_parameters()} != {"embedding.weight"}


def computes_prompt(model: Any) -> bool:
    """Whether this is a PEFT model one of whose adapters is a computed prompt."""
    return any(is_computed(model, adapter) for adapter in getattr(model, "prompt_encoder", {}))


def load_prompt(model: Any, adapter: str, prompt: torch.Tensor) -> None:
    """Make ``prompt`` (tokens x width) what the adapter computes, up to one rounding."""
    encoder = model.prompt_encoder[adapter]
    if not hasattr(encoder, _OFFSET):
        encoder.register_forward_hook(_add_offset)
    setattr(encoder, _OFFSET, None)
    training = encoder.training
    encoder.eval()
    with torch.no_grad():
        computed = model.get_prompt_embedding_to_save(adapter)
    encoder.train(training)
    setattr(encoder, _OFFSET, prompt.to(computed) - computed)


def _add_offset(encoder: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
    offset = getattr(encoder, _OFFSET)
    return output if offset is None else output + offset.to(output)
