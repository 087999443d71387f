"""What travels of a model, by how the run combines the factors of adapters."""

from __future__ import annotations

from torch import nn

from fedcore.protocol import LoraMethod

from .parameters import Joined, ModelParameters
from .personal import PersonalParameters
from .ranked import RankedParameters

__all__ = ["model_parameters"]


def model_parameters(
    model: nn.Module, joined: Joined | None, method: LoraMethod | None, max_rank: int | None
) -> ModelParameters:
    """Return what travels of a model.

    Args:
        model, joined: see `ModelParameters`.
        method: how the run combines factors; None: each tensor for itself.
        max_rank: the highest rank of the global model, where products are combined.
    """
    if method == "exact" and max_rank is not None:
        return RankedParameters(model, joined, max_rank)
    if method == "share-a":
        return PersonalParameters(model, joined)
    return ModelParameters(model, joined)
