"""The liars experiment: sites that lie about their updates, against the mean and each robust rule.

Ten sites train a linear head on what a frozen encoder makes of messages of 20 topics; some of them lie in every
round. What they send is combined by fedcore's own rules.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from fedcore.files.partition import dirichlet

from .peft import Lab, Settings, Source, keep, read_kept

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ATTACKS", "LiarSettings", "Lies", "rules", "run_liars"]

_SCALE: Final = 10.0
"""The length of a row's vector, as the head of the other experiments has it."""


@dataclass(frozen=True)
class LiarSettings(Settings):
    """What all runs share.

    Attributes:
        sites: how many take part, with texts dealt out by label with the skew ``alpha``.
        liars: how many of them lie; the rules are told this number.
        rate: of the sites' SGD.
    """

    max_tokens: int = 48
    train_rows: int = 1600
    test_rows: int = 400
    rounds: int = 30
    steps: int = 10
    batch_size: int = 16
    sites: int = 10
    liars: int = 2
    alpha: float = 1.0
    rate: float = 0.3


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
        bench: _Bench | None = None
        mark = _fingerprint(settings, source, seed)
        for attack in ATTACKS:
            for rule in rules(settings.liars):
                path = kept / f"{attack}-{rule}-{seed}.json".replace(" ", "_").replace(",", "")
                result = read_kept(path, mark)
                if result is None:
                    bench = bench or _Bench(settings, source, seed)
                    begun, cpu = time.monotonic(), time.process_time()
                    result = {
                        "attack": attack,
                        "rule": rule,
                        "seed": seed,
                        "settings": mark,
                        "accuracy": bench.run(attack, rule),
                        "seconds": time.monotonic() - begun,
                        "cpu_seconds": time.process_time() - cpu,
                    }
                    keep(path, result)
                found.append(result)
            last = {r["rule"]: r["accuracy"][-1] for r in found if r["attack"] == attack}
            notice(f"seed {seed}, {attack}: " + ", ".join(f"{k} {v:.2f}" for k, v in last.items()))
    return found


class _Bench:
    """The sites of a seed, and their texts after the encoder."""

    def __init__(self, settings: LiarSettings, source: Source, seed: int) -> None:
        import torch

        self._settings, self._seed = settings, seed
        lab = Lab(settings, source, seed)
        self._x, self._y = _vectors(lab, "train")
        self._test = _vectors(lab, "test")
        self._classes = len(lab.pool.labels)
        labels = [text.label for text in lab.pool.train]
        held = dirichlet(
            labels, settings.sites, alpha=settings.alpha, min_size=settings.batch_size, seed=seed
        )
        self._held = [torch.tensor(list(numbers)) for numbers in held.sites]
        self._liars = sorted(
            random.Random(f"{seed}/liars").sample(range(settings.sites), settings.liars)
        )

    def run(self, attack: str, rule: str) -> list[float]:
        """Return the accuracy on all test rows before the first round and after each."""
        import torch

        from .federation import combine

        settings = self._settings
        name, options = rules(settings.liars)[rule]
        model = torch.zeros(self._x.shape[1] * self._classes)
        dice = torch.Generator().manual_seed(self._seed)
        curve = [self._score(model)]
        for round_ in range(settings.rounds):
            updates = [self._train(model, site, round_) for site in range(settings.sites)]
            honest = torch.stack([u for k, u in enumerate(updates) if k not in self._liars])
            noise = torch.randn(model.shape, generator=dice)
            for site in self._liars:
                wrong = self._train(model, site, round_, flipped=True)
                lies = Lies(honest, updates[site], wrong, settings.sites, noise)
                updates[site] = ATTACKS[attack](lies)
            states = [{"head": model + update} for update in updates]
            made = combine(states, None, rule=name, settings=options, base={"head": model})
            model = made["head"]
            curve.append(self._score(model))
        return curve

    def _train(self, model: Tensor, site: int, round_: int, *, flipped: bool = False) -> Tensor:
        """Return what some steps of SGD on a site's rows change; the batches follow from seed, site and round."""
        import torch

        rows, settings = self._held[site], self._settings
        dice = torch.Generator().manual_seed((self._seed * 1000 + site) * 10_000 + round_)
        head = model.view(self._classes, -1).clone()
        for _ in range(settings.steps):
            batch = rows[torch.randint(len(rows), (settings.batch_size,), generator=dice)]
            x, y = self._x[batch], self._y[batch]
            y = self._classes - 1 - y if flipped else y
            wrong = torch.softmax(x @ head.T, dim=1)
            wrong[torch.arange(len(y)), y] -= 1
            head -= settings.rate / len(y) * wrong.T @ x
        return head.flatten() - model

    def _score(self, model: Tensor) -> float:
        x, y = self._test
        return float(((x @ model.view(self._classes, -1).T).argmax(1) == y).double().mean())


def _vectors(lab: Lab, side: str) -> tuple[Tensor, Tensor]:
    """Return the mean of each text's token vectors, at a fixed length, and the class numbers."""
    import torch

    rows = lab.rows(side)
    means = torch.stack([state.mean(0) for state in rows.states])
    vectors = torch.nn.functional.normalize(means, dim=1) * _SCALE
    return torch.cat([vectors, torch.ones(len(vectors), 1)], dim=1), rows.labels


def _fingerprint(settings: LiarSettings, source: Source, seed: int) -> str:
    plain = {
        "settings": asdict(settings),
        "seed": seed,
        "model": Path(str(source.model)).name,
        "texts": [asdict(text) for text in source.texts],
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
