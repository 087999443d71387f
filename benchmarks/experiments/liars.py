"""The liars experiment: sites that lie about their updates, against the mean and each robust rule.

Ten sites train a linear head on what a frozen encoder makes of messages of 20 topics; some of them lie in every
round. What they send is combined by fedcore's own rules.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from .heads import Heads, HeadSettings, mark_of
from .peft import Source, keep, read_kept

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ATTACKS", "LiarSettings", "Lies", "rules", "run_liars"]


@dataclass(frozen=True)
class LiarSettings(HeadSettings):
    """What all runs share.

    Attributes:
        liars: how many of the sites lie; the rules are given this number.
    """

    liars: int = 2


@dataclass(frozen=True)
class Lies:
    """What liars know in a round: all that honest sites send.

    Attributes:
        honest: the updates of the honest sites.
        own: what a liar would send if it was honest.
        mislabelled: what it has trained on wrong labels.
        sites: how many sites take part.
        noise: random values of the shape of an update, the same for all liars of a round.
    """

    honest: Tensor
    own: Tensor
    mislabelled: Tensor
    sites: int
    noise: Tensor


def _alie(lies: Lies) -> Tensor:
    """As far from the mean as a site can be without standing out (Baruch et al. 2019, algorithm 3)."""
    honest = len(lies.honest)
    supporters = lies.sites // 2 + 1 - (lies.sites - honest)
    z = NormalDist().inv_cdf((honest - supporters) / honest)
    return lies.honest.mean(0) - z * lies.honest.std(0)


def _inner_product(lies: Lies) -> Tensor:
    """The mean turned round, just long enough that the mean of all points back (Xie et al. 2019)."""
    honest = len(lies.honest)
    length = 1.25 * honest / (lies.sites - honest)
    return lies.honest.mean(0) * -length


def _collusion(lies: Lies) -> Tensor:
    """All liars in one direction, as long as an honest update: to each other they are near."""
    length = float(lies.honest.norm(dim=1).median() / lies.noise.norm())
    return lies.noise * length


def _last_part(lies: Lies) -> Tensor:
    """Honest but for the last tenth."""
    sent = lies.own.clone()
    sent[-(len(sent) // 10) :] *= -100
    return sent


ATTACKS: Final[Mapping[str, Callable[[Lies], Tensor]]] = MappingProxyType(
    {
        "none": lambda lies: lies.own,
        "sign flipped": lambda lies: -lies.own,
        "scaled by 100": lambda lies: 100 * lies.own,
        "labels flipped": lambda lies: lies.mislabelled,
        "a little is enough": _alie,
        "inner product": _inner_product,
        "collusion": _collusion,
        "last tenth": _last_part,
    }
)
"""What the liars send, by name."""


def rules(liars: int) -> dict[str, tuple[str, dict[str, float]]]:
    """Return the rules that are compared: what a table calls each, its name, and its options."""
    f = {"f": float(liars)}
    return {
        "mean": ("mean", {}),
        "median": ("median", {}),
        "trimmed mean": ("trimmed-mean", {"trim": float(liars)}),
        "krum": ("krum", f),
        "multi-krum": ("multi-krum", f),
        "multi-krum, mixed": ("multi-krum", {**f, "mix": float(liars)}),
        "rfa": ("rfa", {}),
        "rfa, mixed": ("rfa", {"mix": float(liars)}),
        "centred clipping": ("centred-clipping", {}),
        "norm clipping": ("norm-clipping", {}),
    }


def run_liars(
    folder: Path,
    settings: LiarSettings,
    source: Source,
    seeds: Sequence[int],
    notice: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Train what is not in the folder yet; return one result for each attack, rule and seed."""
    kept = folder / "runs"
    kept.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in seeds:
        heads: Heads | None = None
        mark = mark_of(settings, source, seed)
        for attack in ATTACKS:
            for rule in rules(settings.liars):
                path = kept / f"{attack}-{rule}-{seed}.json".replace(" ", "_").replace(",", "")
                result = read_kept(path, mark)
                if result is None:
                    heads = heads or Heads(settings, source, seed)
                    begun, cpu = time.monotonic(), time.process_time()
                    result = {
                        "attack": attack,
                        "rule": rule,
                        "seed": seed,
                        "settings": mark,
                        "accuracy": _run(heads, settings, seed, attack, rule),
                        "seconds": time.monotonic() - begun,
                        "cpu_seconds": time.process_time() - cpu,
                    }
                    keep(path, result)
                found.append(result)
            last = {r["rule"]: r["accuracy"][-1] for r in found if r["attack"] == attack}
            notice(f"seed {seed}, {attack}: " + ", ".join(f"{k} {v:.2f}" for k, v in last.items()))
    return found


def _run(heads: Heads, settings: LiarSettings, seed: int, attack: str, rule: str) -> list[float]:
    """Return the accuracy on all test rows before the first round and after each."""
    import torch

    from .federation import combine

    name, options = rules(settings.liars)[rule]
    liars = sorted(random.Random(f"{seed}/liars").sample(range(settings.sites), settings.liars))
    model = heads.start()
    dice = torch.Generator().manual_seed(seed)
    curve = [heads.score(model)]
    for round_ in range(settings.rounds):
        updates = [heads.train(model, site, round_) for site in range(settings.sites)]
        honest = torch.stack([u for k, u in enumerate(updates) if k not in liars])
        noise = torch.randn(model.shape, generator=dice)
        for site in liars:
            wrong = heads.train(model, site, round_, flipped=True)
            updates[site] = ATTACKS[attack](
                Lies(honest, updates[site], wrong, settings.sites, noise)
            )
        states = [{"head": model + update} for update in updates]
        made = combine(states, None, rule=name, settings=options, base={"head": model})
        model = made["head"]
        curve.append(heads.score(model))
    return curve
