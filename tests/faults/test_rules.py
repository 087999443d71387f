"""Each fault under each rule: the exact bytes of the sites that are left."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest

from fedcore._core import Layout
from fedcore.rules import PythonRule
from fedcore.rules.python import load_rule
from fedcore.rules.registry import RULES, Rule

from ..support.python_rules import named
from ..support.values import DTYPES, ranked
from .faults import LEFT_OUT, Fault, inject
from .reference import CHUNK, flat, mean, random_layout, random_update, stands_for
from .world import Site, World

Updates = list[tuple[int, bytes]]
SEEDS = range(2)


class Highest(PythonRule):
    """the highest value of each element, by NumPy"""

    weighted = False
    symmetric = True

    def combine(self, values: np.ndarray, out: np.ndarray) -> None:
        np.max(values + 0.0, axis=0, out=out)


def of_ranks(layout: Layout, updates: Updates, base: bytes | None, ranks: slice) -> bytes:
    """The mean of the values of these ranks, from the lowest to the highest."""
    rows = [bytearray(update) for _, update in updates]
    for _, dtype, _, offset, nbytes in layout.tensors:
        if dtype in DTYPES:
            part = slice(offset, offset + nbytes)
            stack = np.stack([np.frombuffer(row[part], DTYPES[dtype]) for row in rows])
            for row, values in zip(rows, ranked(stack), strict=True):
                row[part] = np.ascontiguousarray(values).tobytes()
    left = [(1, bytes(row)) for row in rows[ranks]]
    return flat(layout, mean(layout, left, base or updates[0][1]))


def middle(layout: Layout, updates: Updates, base: bytes | None) -> bytes:
    count = len(updates)
    return of_ranks(layout, updates, base, slice((count - 1) // 2, count // 2 + 1))


def trimmed(layout: Layout, updates: Updates, base: bytes | None) -> bytes:
    return of_ranks(layout, updates, base, slice(1, -1))


def highest(layout: Layout, updates: Updates, base: bytes | None) -> bytes:
    out = bytearray(updates[0][1] if base is None else base)
    for _, dtype, _, offset, nbytes in layout.tensors:
        if dtype in DTYPES:
            part, kind = slice(offset, offset + nbytes), np.dtype(DTYPES[dtype])
            rows = [np.frombuffer(u[part], kind).astype(np.float64) + 0.0 for _, u in updates]
            out[part] = np.max(rows, axis=0).astype(kind).tobytes()
    return bytes(out)


REFERENCES: dict[str, Callable[[Layout, Updates, bytes | None], bytes]] = {
    "mean": lambda layout, updates, base: flat(layout, mean(layout, updates, base)),
    "median": middle,
    "trimmed-mean": trimmed,
    "python": highest,
}


def rule_of(name: str) -> Rule:
    return load_rule(named(Highest)) if name == "python" else RULES[name].having({})


def test_every_rule_has_a_reference_here() -> None:
    assert REFERENCES.keys() == {*RULES, "python"}


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("name", REFERENCES)
def test_a_fault_ends_in_what_the_rule_makes_of_the_survivors(name: str, fault: Fault) -> None:
    for seed in SEEDS:
        dice = random.Random(f"{name}/{fault.value}/{seed}")
        layout, rule = random_layout(dice), rule_of(name)
        sites = [
            Site(site, dice.randrange(1, 1 << 24), random_update(layout, dice.randrange(1 << 30)))
            for site in "cabd"
        ]
        struck = dice.choice(sites)
        inject(fault, layout, struck, dice)
        base = bytes(random_update(layout, 7)) if dice.random() < 0.6 else None
        world = World(
            layout,
            sites,
            dice,
            dice.choice([6 * CHUNK * len(sites), 1 << 30]),
            base,
            spilling=dice.random() < 0.5,
            ahead=dice.random() < 0.5,
            threads=dice.choice([1, 3]),
            encoding="raw" if base is None else dice.choice(["raw", "bf16", "int8", "nf4"]),
            rule=rule.core,
        )
        world.run()
        lost = {struck.name} if fault in LEFT_OUT else set()
        assert world.rejections.keys() == lost
        left: Updates = [(s.weight, bytes(s.update)) for s in world.sites if s.name not in lost]
        if base is not None:
            left = [(w, stands_for(layout, update, base, world.encoding)) for w, update in left]
        assert world.result == REFERENCES[name](layout, left, base), f"seed {seed}"
