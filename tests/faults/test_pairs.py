"""Every pair of faults, at random sites, layouts, encodings and orders of arrival: the exact bytes or the exact
rejection.

A case is made by its pair and seed alone: ``FEDCORE_FAULT_SEED=N pytest tests/faults/test_pairs.py -k PAIR``
repeats one that failed. ``FEDCORE_FAULT_CASES=N`` plays that many of each pair.
"""

from __future__ import annotations

import itertools
import os
import random
from dataclasses import replace

import pytest

from .faults import LEFT_OUT, Fault, inject
from .reference import CHUNK, flat, mean, random_layout, random_update, stands_for
from .world import Frame, Site, World

CASES = int(os.environ.get("FEDCORE_FAULT_CASES", "2"))
SEED = os.environ.get("FEDCORE_FAULT_SEED")
PAIRS = list(itertools.combinations_with_replacement(Fault, 2))


def held_back(world: World, site: Site, frame: Frame) -> list[Frame]:
    """What a site sends arrives in the second second at the earliest."""
    return [replace(frame, due=max(frame.due, 1000))]


def play(faults: tuple[Fault, Fault], seed: int) -> tuple[bytes | None, bytes | None]:
    """Play a case to its end; returns the result, and the exact mean of the sites that are left."""
    dice = random.Random(f"{faults[0].value}+{faults[1].value}/{seed}")
    layout = random_layout(dice)
    sites = [
        Site(name, dice.randrange(1, 1 << 24), random_update(layout, dice.randrange(1 << 30)))
        for name in "cabd"[: dice.randrange(2, 5)]
    ]
    codes: dict[str, set[str]] = {}
    for place, fault in enumerate(faults):
        site = dice.choice(sites)
        inject(fault, layout, site, dice, place=place)
        if fault in LEFT_OUT:
            codes.setdefault(site.name, set()).add(LEFT_OUT[fault])
    budget = dice.choice([1, 2 * CHUNK * len(sites), 5 * CHUNK * len(sites), 1 << 30])
    base = bytes(random_update(layout, 7)) if dice.random() < 0.5 else None
    spilling = dice.random() < 0.5
    if spilling:  # the others are ahead of one site, by more than the budget holds
        budget = dice.choice([1, 2]) * CHUNK * len(sites)
        dice.choice(sites).interferences.append(held_back)
    ahead = dice.random() < 0.5
    threads = dice.choice([1, 3])
    encoding = "raw" if base is None else dice.choice(["raw", "bf16", "int8", "nf4", "top-k"])
    how = {"spilling": spilling, "ahead": ahead, "threads": threads, "encoding": encoding}
    world = World(layout, sites, dice, budget, base, **how)  # type: ignore[arg-type]
    world.run()
    assert world.rejections.keys() == codes.keys()
    for name, (code, message) in world.rejections.items():
        assert code in codes[name], message
    survivors = [(s.weight, bytes(s.update)) for s in world.sites if s.name not in codes]
    if not survivors:
        return world.result, None
    if base is not None:
        survivors = [(w, stands_for(layout, update, base, encoding)) for w, update in survivors]
    return world.result, flat(layout, mean(layout, survivors, base))


@pytest.mark.parametrize("pair", PAIRS, ids=[f"{a.value}+{b.value}" for a, b in PAIRS])
def test_two_faults_end_in_the_survivors_exact_mean(pair: tuple[Fault, Fault]) -> None:
    for seed in range(CASES) if SEED is None else [int(SEED)]:
        try:
            result, expected = play(pair, seed)
            assert result == expected
        except BaseException as error:
            error.add_note(f"repeat: FEDCORE_FAULT_SEED={seed}, {pair[0].value}+{pair[1].value}")
            raise
