"""Training with encoded updates: with the residual it reaches what raw updates reach, without it it does not.

Least squares, whose solutions differ between the sites: so updates never vanish, and what an encoding always loses
of them adds up.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fedcore._core import Codec, Layout, MappedFile
from fedcore.encoding import UpdateEncoder

SIZE, SITES, ROUNDS, RATE = 512, 3, 120, 0.05
LAYOUT = Layout([("w", "F32", [SIZE])])
Problem = list[tuple[NDArray[np.float64], NDArray[np.float64]]]


def problem() -> Problem:
    dice = np.random.default_rng(0)
    sites = []
    for _ in range(SITES):
        inputs = dice.standard_normal((200, SIZE)) / np.sqrt(200) * np.linspace(0.3, 1.5, SIZE)
        sites.append((inputs, inputs @ (3 * dice.standard_normal(SIZE))))
    return sites


def loss(sites: Problem, model: NDArray[np.float32]) -> float:
    return float(np.mean([0.5 * np.sum((x @ model - y) ** 2) for x, y in sites]))


def train(encoding: str, *, feedback: bool = True) -> float:
    """Return the loss after some rounds of one gradient step at each site."""
    sites, model = problem(), np.zeros(SIZE, np.float32)
    base, local = (MappedFile.anonymous(LAYOUT.total_bytes) for _ in range(2))
    encoders = [UpdateEncoder(LAYOUT, encoding, top_k=0.1) for _ in sites]
    codec = Codec(LAYOUT, encoding)
    for round_ in range(1, ROUNDS + 1):
        base.write(0, model)
        updates = []
        for (x, y), encoder in zip(sites, encoders, strict=True):
            local.write(0, (model - RATE * x.T @ (x @ model - y)).astype(np.float32))
            sent = encoder.encode(round_, local, 0, base, 0)
            got = np.empty(SIZE, np.float32)
            codec.decode(0, sent.encodings[0], sent.file.view(0, sent.nbytes), got, base.view())
            encoder.settle(round_, included=feedback)
            updates.append(got)
        model = np.mean(np.array(updates, np.float64), axis=0).astype(np.float32)
    return loss(sites, model)


@pytest.mark.parametrize(
    ("encoding", "near", "far"), [("nf4", 1.0005, 1.002), ("top-k", 1.03, 2.0)]
)
def test_with_the_residual_training_reaches_what_raw_updates_reach(
    encoding: str, near: float, far: float
) -> None:
    raw = train("raw")
    assert raw < 0.3 * loss(problem(), np.zeros(SIZE, np.float32))
    assert train(encoding) < near * raw
    assert train(encoding, feedback=False) > far * raw
