"""Federated averaging of torch models in one process, with the reduction of fedcore's server."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedcore import _core
from fedcore.files.average import aggregate_files
from fedcore.rules.several import SEVERAL

__all__ = ["Optimizer", "State", "Stride", "combine", "load_state", "mean", "state_of"]

#: Trained tensors by name.
State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    """Return copies of all that is trained, each tensor once."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def load_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Put what `state_of` gave back into the model."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if trained.keys() != state.keys():
        raise ValueError(f"other tensors: {sorted(trained.keys() ^ state.keys())[:4]}")
    with torch.no_grad():
        for name, tensor in trained.items():
            tensor.copy_(state[name])


def mean(states: Sequence[State], weights: Sequence[int]) -> State:
    """Return the weighted mean: fp64 sums, rounded once, as the server makes it.

    Args:
        states: one per site, with the same names and shapes.
        weights: the sites' numbers of training rows.
    """
    return combine(states, weights)


def combine(
    states: Sequence[State],
    weights: Sequence[int] | None,
    *,
    rule: str = "mean",
    settings: Mapping[str, float] | None = None,
    base: State | None = None,
) -> State:
    """Return what a rule makes of the sites' models, as ``fedcore aggregate`` does.

    Args:
        states: one per site, with the same names and shapes.
        weights: the sites' numbers of training rows; None where the rule takes none.
        rule: its name, and ``settings`` its options.
        base: what the sites trained from; rules that make no use of it are not given it.
    """
    with tempfile.TemporaryDirectory(prefix="fedcore-combine-") as folder:
        paths = [Path(folder) / f"{number}.safetensors" for number in range(len(states))]
        for path, state in zip(paths, states, strict=True):
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
        start = None
        if base is not None and rule in SEVERAL and SEVERAL[rule].needs_base:
            start = Path(folder) / "base.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in base.items()}, start)
        out = Path(folder) / "combined.safetensors"
        aggregate_files(paths, weights, out, rule=rule, settings=settings, base=start)
        return {name: tensor.clone() for name, tensor in load_file(out).items()}


class Stride:
    """How far the global model goes towards a new mean, with a share of its last step carried on (FedAvgM).

    Args:
        momentum: the share; the new mean counts for the rest. Without any, the mean is the new model.
    """

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self._step: State = {}

    def take(self, last: State, new: State) -> State:
        """Return the next global model."""
        if not self._momentum:
            return new
        for name, tensor in new.items():
            step = (1 - self._momentum) * (tensor - last[name])
            if name in self._step:
                step += self._momentum * self._step[name]
            self._step[name] = step
        return {name: tensor + self._step[name] for name, tensor in last.items()}


class Optimizer:
    """A server optimizer of the core over the weighted mean, with its states from round to round.

    Args:
        name: as run files have it, or ``none``.
        options: all of its options.
        ema: the part of the average of the models that stays from round to round; None for no average.
    """

    def __init__(self, name: str, options: Mapping[str, float], ema: float | None = None) -> None:
        self._name, self._options, self._ema = name, dict(options), ema
        self._states: dict[str, tuple[_core.MappedFile, int]] = {}

    def take(self, last: State, states: Sequence[State], weights: Sequence[int]) -> State:
        """Return the next global model from the sites' models and their weights."""
        layout = _core.Layout([(name, "F32", list(t.shape)) for name, t in last.items()])
        finisher = _core.Finisher(
            layout, self._name, self._options, set(), self._states, ema=self._ema
        )
        after = {
            name: (_core.MappedFile.anonymous(of.total_bytes), 0) for name, of in finisher.states
        }
        out = bytearray(layout.total_bytes)
        updates = [_flat(layout, state) for state in states]
        _core.finish_mean(finisher, updates, list(weights), _flat(layout, last), out, after)
        self._states = after
        return _tensors(layout, out)

    def served(self, last: State) -> State:
        """Return what is handed out: the average of the models if there is one, else the last."""
        if self._ema is None:
            return last
        layout = _core.Layout([(name, "F32", list(t.shape)) for name, t in last.items()])
        file, at = self._states["ema"]
        return _tensors(layout, file.view(at, layout.total_bytes))


def _flat(layout: _core.Layout, state: State) -> bytes:
    """Return a state as the core has it."""
    return b"".join(state[name].numpy().tobytes() for name, *_ in layout.tensors)


def _tensors(layout: _core.Layout, flat: Any) -> State:
    """Return the tensors of a state that the core made."""
    return {
        name: torch.from_numpy(np.frombuffer(flat, np.float32, nbytes // 4, at).copy()).view(shape)
        for name, _, shape, at, nbytes in layout.tensors
    }
