"""What travels of a model, by how the run combines the factors of adapters."""

from __future__ import annotations

from torch import nn

from fedcore.protocol import LoraMethod

from .parameters import Joined, ModelParameters
from .personal import Kept, PersonalParameters
from .ranked import RankedParameters, forget_ranks

__all__ = ["model_parameters"]


def model_parameters(
    model: nn.Module,
    joined: Joined | None,
    run: tuple[LoraMethod | None, int | None],
    kept: Kept,
) -> ModelParameters:
    """Return what travels of a model.

    Args:
        model, joined: see `ModelParameters`.
        run: how it combines factors, None for each tensor for itself; and the highest rank of its global model,
            where products are combined.
        kept: what stays at this site.
    """
    method, max_rank = run
    if method == "exact" and max_rank is not None:
        return RankedParameters(model, joined, max_rank)
    forget_ranks(model)
    if method == "share-a":
        return PersonalParameters(model, joined, kept)
    return ModelParameters(model, joined)
