"""Each fault under each rule of several passes, in whichever pass it strikes: the exact bytes of the decision."""

from __future__ import annotations

import random
from typing import Final

import numpy as np
import pytest

from fedcore.rules.several import SEVERAL

from .faults import LEFT_OUT, Fault, inject
from .reference import CHUNK, flat, mean, random_layout, random_update, stands_for
from .surveyed import SurveyedWorld, distances
from .world import Site

OPTIONS: Final = {
    "krum": {"f": 0},
    "multi-krum": {"f": 0, "m": 2},
    "rfa": {},
    "centred-clipping": {},
    "norm-clipping": {},
}
MAYBE: Final = {Fault.OTHER_BYTES_LATER: "changed", Fault.HUGE: "distance"}
"""With these a site is left out only where the second pass asks for the chunk, or the tensor is F64."""
PERHAPS_GONE: Final = ("lost", "refused")
"""A site that is not needed any more may be gone without being left out."""


def test_every_rule_of_several_passes_is_here() -> None:
    assert OPTIONS.keys() == SEVERAL.keys()


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_fault_in_either_pass_ends_in_what_is_decided_of_the_survivors(
    name: str, fault: Fault
) -> None:
    dice = random.Random(f"{name}/{fault.value}")
    layout = random_layout(dice)
    base = bytes(random_update(layout, 7))
    sites = [
        Site(site, dice.randrange(1, 1 << 24), random_update(layout, dice.randrange(1 << 30)))
        for site in "cabd"
    ]
    struck = dice.choice(sites)
    inject(fault, layout, struck, dice)
    world = SurveyedWorld(
        layout,
        sites,
        dice,
        dice.choice([6 * CHUNK * len(sites), 1 << 30]),
        base,
        several=SEVERAL[name],
        options=OPTIONS[name],
        spilling=dice.random() < 0.7,
        threads=dice.choice([1, 3]),
        encoding=dice.choice(["raw", "bf16", "int8", "nf4"]),
    )
    world.run()
    code = LEFT_OUT.get(fault) or MAYBE.get(fault)
    found = {name: code for name, (code, _) in world.rejections.items()}
    if fault in MAYBE or code is None or code in PERHAPS_GONE:
        assert found.items() <= {struck.name: code}.items()
    else:
        assert found == {struck.name: code}
    flats = [
        stands_for(layout, bytes(site.update), base, world.encoding) for site in world.surveyed
    ]
    assert [s.name for s in world.surveyed] == [s.name for s in world.sites if s.name not in found]
    wanted = distances(layout, [*flats, base])
    np.testing.assert_allclose(world.squares, wanted, rtol=1e-9)
    assert world.decision is not None
    kept = [(w, update) for w, update in zip(world.decision.weights, flats, strict=True) if w]
    if world.decision.base:
        kept.append((world.decision.base, base))
    assert world.result == flat(layout, mean(layout, kept, base))
