"""An adapter of a site's own rank over a global model of another rank, in a PEFT model.

The version holds each adapted module's whole effect W as two factors. ``B`` (rows x p) has columns in falling
order of their singular values, and ``A`` (p x columns) has rows of norm 1. So the best part of rank r is the
first r columns of B times the first r rows of A. A site trains these. Its layer adds ``scale * B A``, with a scale
of its own. What is left, the *remainder*, takes part in each forward pass and is not trained.

The remainder is a forward hook of the layer, and no second PEFT adapter. PEFT would set requires_grad of a second
active adapter, and write it into each checkpoint. A hook's tensors are no parameters: optimizers, checkpoints,
digests and the adapter's files do not have them, and the next version brings them anew. The hook gets the layer's
input before dropout and adds to its output. So the base may be quantised, and activations may be checkpointed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from fedcore.roles import Pairs

from .extras import active_adapter
from .sharding import address

__all__ = ["OwnRank", "drop_remainders"]


class OwnRank:
    """The layers of one PEFT model whose adapter has a rank of its own.

    Args:
        model: the PEFT model; its active adapter is the site's.
        tensors: the adapter's tensors, by the names under which they travel.
        pairs: the names of A and B of each adapted module.

    Attributes:
        names: those of the factors, and of the biases that go with B (``lora_bias``).
    """

    def __init__(self, model: Any, tensors: Mapping[str, torch.Tensor], pairs: Pairs) -> None:
        names = {address(tensors[a]): (a, b) for a, b in pairs}
        self._layers: dict[str, _Layer] = {}
        self._of_b: dict[str, _Layer] = {}
        self._of_bias: dict[str, _Layer] = {}
        for module, adapter in _adapted(model):
            if (pair := names.get(address(module.lora_A[adapter].weight))) is not None:
                layer = _Layer(module, adapter)
                self._layers[pair[0]] = self._of_b[pair[1]] = layer
                if (bias := pair[1].removesuffix("weight") + "bias") in tensors:
                    self._of_bias[bias] = layer
        self._pairs = pairs
        self.names = frozenset(self._layers) | frozenset(self._of_b) | frozenset(self._of_bias)

    def load(self, version: Mapping[str, torch.Tensor], seed: int) -> None:
        """Put a version into the layers: its best part of the site's rank is trained from now on.

        Rows of A that the version does not fill are drawn as PEFT draws them, with B = 0: were both zero, neither
        would ever have a gradient.

        Args:
            version: both factors of each adapted module, and their biases, by name.
            seed: of the drawn rows; the same at all sites, another in each round.
        """
        dice = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for a, b in self._pairs:
                self._layers[a].load(version[b], version[a], dice)
            for name, layer in self._of_bias.items():
                layer.bias.copy_(version[name].double() / layer.scale)

    def read(self, name: str) -> torch.Tensor:
        """Return a factor as it is sent, in binary32: A as it is, and B times the site's scale, rounded once.

        A bias of B has its own dtype, and is multiplied as B is.
        """
        if name in self._layers:
            return self._layers[name].a.detach().float()
        if name in self._of_bias:
            layer = self._of_bias[name]
            return (layer.bias.detach().double() * layer.scale).to(layer.bias.dtype)
        layer = self._of_b[name]
        return (layer.b.detach().double() * layer.scale).float()

    def whole(self, a: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return B and A of all that a layer adds, the remainder included, by the name of A; the scale is 1."""
        layer = self._layers[a]
        b, more_b, more_a = layer.b.detach().double() * layer.scale, *layer.remainder
        return torch.cat([b.float(), more_b], 1), torch.cat([layer.a.detach().float(), more_a])

    def remove(self) -> None:
        """Take the remainders out of the layers."""
        for layer in self._layers.values():
            layer.handle.remove()


class _Layer:
    """One layer: its trained factors, and the remainder that it adds to them."""

    def __init__(self, module: Any, adapter: str) -> None:
        self._module, self._adapter = module, adapter
        rows, columns = len(self.b), self.a.shape[1]
        self.remainder = torch.zeros(rows, 0), torch.zeros(0, columns)
        self._moved: tuple[torch.Tensor, torch.Tensor] | None = None
        _drop(module)
        # One hook for good: a compiled module does not see those that come after it was compiled.
        self.handle = module.register_forward_hook(self._add)

    @property
    def a(self) -> torch.Tensor:
        """The trained factor of shape rank x columns, as the module has it now."""
        found: torch.Tensor = self._module.lora_A[self._adapter].weight
        return found

    @property
    def b(self) -> torch.Tensor:
        """The trained factor of shape rows x rank."""
        found: torch.Tensor = self._module.lora_B[self._adapter].weight
        return found

    @property
    def bias(self) -> torch.Tensor:
        """What is added to the product of the two, before the scale."""
        found: torch.Tensor = self._module.lora_B[self._adapter].bias
        return found

    @property
    def scale(self) -> float:
        """What PEFT multiplies the product of the two with."""
        return float(self._module.scaling[self._adapter])

    def load(self, b: torch.Tensor, a: torch.Tensor, dice: torch.Generator) -> None:
        """Split a version's factors into the trained ones and the remainder."""
        rank, columns = self.a.shape
        used = int((b[:, :rank] != 0).any(0).sum())  # zero singular values come last
        drawn = torch.empty(rank - used, columns).uniform_(-1, 1, generator=dice) / math.sqrt(
            columns
        )
        self.a.copy_(torch.cat([a[:used], drawn]))
        of_b = torch.zeros(self.b.shape, dtype=torch.float64)
        of_b[:, :used] = b[:, :used].double() / self.scale
        self.b.copy_(of_b)
        self.remainder, self._moved = (b[:, rank:].float().clone(), a[rank:].float().clone()), None

    def _add(self, module: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        b, a = self.remainder
        if not len(a) or module.disable_adapters or self._adapter not in module.active_adapters:
            return output
        x, like, moved = inputs[0], self.a, self._moved
        if moved is None or (moved[0].device, moved[0].dtype) != (x.device, like.dtype):
            moved = self._moved = b.to(x.device, like.dtype), a.to(x.device, like.dtype)
        b, a = moved
        added = torch.nn.functional.linear(torch.nn.functional.linear(x.to(a.dtype), a), b)
        return output + added.to(output.dtype)


def drop_remainders(model: torch.nn.Module) -> None:
    """Take all remainders out of a model: those that came with a copy of it, or are of a run that is over."""
    for module in model.modules():
        _drop(module)


def _drop(module: torch.nn.Module) -> None:
    hooks = module._forward_hooks
    for key in [
        k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _Layer)
    ]:
        del hooks[key]


def _adapted(model: Any) -> Iterator[tuple[Any, str]]:
    """Yield each layer that the active adapter changes, with the adapter's name."""
    adapter = active_adapter(model)
    for module in model.modules():
        if adapter in getattr(module, "lora_A", {}) and adapter in getattr(module, "lora_B", {}):
            yield module, adapter
