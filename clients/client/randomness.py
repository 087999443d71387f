"""The states of the random generators that training draws from, taken and put back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["generators", "put_back", "take"]


def take(loader: Any = None) -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's generators, and of those that a loader's samplers hold.

    All of it can be written by `fedcore.client.state_file.write_state`.
    """
    import numpy as np

    name, keys, at, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(np.asarray(keys, np.int64)), at, has_gauss, gauss),
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "loader": [generator.get_state() for generator in generators(loader)],
    }


def put_back(states: dict[str, Any], loader: Any = None) -> None:
    """Put states back that `take` returned; those of a loader go to one that was made in the same way."""
    import numpy as np

    version, values, gauss = states["python"]
    random.setstate((version, tuple(values), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    mine = list(generators(loader))
    if len(mine) == len(states["loader"]):
        for generator, state in zip(mine, states["loader"], strict=True):
            generator.set_state(state)


def generators(loader: Any) -> Iterator[torch.Generator]:
    """Walk from a loader to its samplers, as accelerate and others wrap them."""
    seen: set[int] = set()
    found: set[int] = set()
    waiting = [loader]
    while waiting:
        at = waiting.pop(0)
        if at is None or id(at) in seen:
            continue
        seen.add(id(at))
        generator = getattr(at, "generator", None)
        if isinstance(generator, torch.Generator) and id(generator) not in found:
            found.add(id(generator))
            yield generator
        waiting += [getattr(at, name, None) for name in ("batch_sampler", "sampler")]
