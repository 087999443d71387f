"""The LoRA experiment: ways to bring adapters together, at sites of equal and of unlike ranks and data.

Eight sites train adapters of all linear layers in the upper part of an encoder on messages of 20 topics. A site's
optimizer begins anew in each round, as what it has kept would belong to other factors.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from fedcore.files.partition import dirichlet, iid

from .peft import Lab, Settings, Source, keep, read_kept

if TYPE_CHECKING:
    from .lora_ways import Factors, Sent, Server

__all__ = ["RANKS", "SPLITS", "LoraSettings", "run_lora"]

_SCALE: Final = 2.0
_HEAD: Final = "classifier"

RANKS: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {"equal": (8,), "mixed": (4, 4, 8, 16)}
)
"""The ranks of the sites, again and again in this order."""

SPLITS: Final = ("iid", "0.3")
"""How rows are dealt out: evenly, or by label with this Dirichlet skew."""

_WAYS: Final = ("factors", "freeze-a", "alternate", "share-a", "zero", "exact")


@dataclass(frozen=True)
class LoraSettings(Settings):
    """What all runs share.

    Attributes:
        sites: how many take part, all in every round.
        most: the rank that is kept where products are averaged.
        rates: of the sites' AdamW; the best one on the seed ``tuned_on`` is taken for each way and split, at
            equal ranks.
    """

    frozen: int = 4
    max_tokens: int = 32
    train_rows: int = 1600
    test_rows: int = 400
    rounds: int = 10
    steps: int = 6
    batch_size: int = 8
    sites: int = 8
    most: int = 32
    rates: tuple[float, ...] = (4e-3, 8e-3, 16e-3)
    tuned_on: int = 1000


def run_lora(
    folder: Path,
    settings: LoraSettings,
    source: Source,
    seeds: Sequence[int],
    notice: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Train what is not in the folder yet; return one result for each way, ranks, split and seed."""
    kept = folder / "runs"
    kept.mkdir(parents=True, exist_ok=True)
    labs: dict[int, _Sites] = {}

    def trained(seed: int, way: str, ranks: str, split: str, rate: float) -> dict[str, Any]:
        name = f"{way}-{ranks}-{split}-{rate:g}-{seed}"
        path, mark = kept / f"{name}.json", _fingerprint(settings, source, seed)
        result = read_kept(path, mark)
        if result is None:
            if seed not in labs:
                labs.clear()  # one seed's texts at a time
                labs[seed] = _Sites(settings, source, seed)
            begun, cpu = time.monotonic(), time.process_time()
            result = {
                "way": way,
                "ranks": ranks,
                "split": split,
                "rate": rate,
                "seed": seed,
                "settings": mark,
                **labs[seed].run(way, ranks, split, rate),
                "seconds": time.monotonic() - begun,
                "cpu_seconds": time.process_time() - cpu,
            }
            keep(path, result)
            notice(f"{name}: {result['accuracy'][-1]:.3f}")
        return result

    rates: dict[tuple[str, str], float] = {}
    for split in SPLITS:
        for way in _WAYS:
            tried = {
                rate: statistics.fmean(
                    trained(settings.tuned_on, way, "equal", split, rate)["accuracy"][-3:]
                )
                for rate in settings.rates
            }
            rates[way, split] = max(tried, key=lambda rate: tried[rate])
    return [
        trained(seed, way, ranks, split, rates[way, split])
        for seed in seeds
        for split in SPLITS
        for ranks in RANKS
        for way in _WAYS
    ]


class _Sites:
    """The sites of a seed, and a model of each rank."""

    def __init__(self, settings: LoraSettings, source: Source, seed: int) -> None:
        self._settings, self._seed = settings, seed
        self._lab = Lab(settings, source, seed)
        self._models: dict[int, _Model] = {}

    def run(self, way: str, ranks: str, split: str, rate: float) -> dict[str, Any]:
        """Return accuracy after each round, what averaging the factors would lose in each, and bytes a round."""
        from .classifier import accuracy
        from .lora_ways import WAYS, averaging_error

        settings, lab = self._settings, self._lab
        rows, test = lab.rows("train"), lab.rows("test")
        held = self._held(split)
        orders = [
            _order(held[k], settings, f"{self._seed}/site-{k}") for k in range(settings.sites)
        ]
        of = [RANKS[ranks][k % len(RANKS[ranks])] for k in range(settings.sites)]
        models = [self._model(rank) for rank in of]
        largest = self._model(max(of))
        server: Server = WAYS[way].server(largest.first(), settings.most)
        head = largest.first_head()
        weights = [len(numbers) for numbers in held]

        def scored() -> float:
            """The mean over sites where each has an adapter of its own, else that of the one."""
            places = range(settings.sites) if way == "share-a" else range(1)
            found = []
            for site in places:
                largest.score(server.whole(site), head)
                found.append(float(accuracy(largest.model, test)[1].double().mean()))
            return statistics.fmean(found)

        curve, wrong = [scored()], []
        for round_ in range(1, settings.rounds + 1):
            made: dict[int, Factors] = {}
            heads = []
            for site, model in enumerate(models):
                model.begin(server.begin(site, of[site], round_), head)
                made[site] = model.train(rows, orders[site], settings.steps, rate)
                heads.append(model.head())
            wrong.append(averaging_error(weights, list(made.values())))
            server.end(weights, made)
            head = _mean_head(heads, weights)
            curve.append(scored())
        traffic = [
            WAYS[way].traffic(m, n, of[k], settings.most)
            for k in range(settings.sites)
            for m, n in largest.shapes()
        ]
        return {
            "accuracy": curve,
            "averaging_error": wrong,
            "bytes_up": sum(up for up, _ in traffic),
            "bytes_down": sum(down for _, down in traffic),
            "rows": weights,
            "site_ranks": of,
        }

    def _model(self, rank: int) -> _Model:
        if rank not in self._models:
            self._models[rank] = _Model(self._lab, rank)
        return self._models[rank]

    def _held(self, split: str) -> list[list[int]]:
        labels, sites = [text.label for text in self._lab.pool.train], self._settings.sites
        if split == "iid":
            found = iid(len(labels), sites, seed=self._seed)
        else:
            least = self._settings.batch_size
            found = dirichlet(labels, sites, alpha=float(split), min_size=least, seed=self._seed)
        return [list(numbers) for numbers in found.sites]


class _Model:
    """The upper layers with adapters of one rank, in which one site after the other trains."""

    def __init__(self, lab: Lab, rank: int) -> None:
        from peft import LoraConfig, TaskType

        config = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=rank,
            lora_alpha=int(_SCALE * rank),
            target_modules=["query", "key", "value", "dense"],
            modules_to_save=[_HEAD],
        )
        self.model: Any = lab.encoder.adapted(config, len(lab.pool.labels), lab.seed)
        self._modules = {
            name: module for name, module in self.model.named_modules() if hasattr(module, "lora_A")
        }
        self._bases = {n: m.base_layer.weight.detach().clone() for n, m in self._modules.items()}
        self._heads = [
            p for n, p in self.model.named_parameters() if _HEAD in n and p.requires_grad
        ]
        self._start = [p.detach().clone() for p in self._heads]

    def shapes(self) -> list[tuple[int, int]]:
        """Outputs and inputs of each adapted module."""
        return [tuple(base.shape) for base in self._bases.values()]

    def first(self) -> Factors:
        """Return the factors as PEFT has drawn them, with B = 0."""
        return {
            name: (b.weight.detach() * 0, a.weight.detach().clone())
            for name, b, a in self._layers()
        }

    def first_head(self) -> list[Any]:
        """Return the head as it was at first."""
        return [tensor.clone() for tensor in self._start]

    def head(self) -> list[Any]:
        """Return copies of the head's tensors."""
        return [p.detach().clone() for p in self._heads]

    def begin(self, sent: Sent, head: Sequence[Any]) -> None:
        """Load what a site starts with."""
        import torch

        with torch.no_grad():
            for name, b, a in self._layers():
                b.weight.copy_(sent.factors[name][0] / _SCALE)
                a.weight.copy_(sent.factors[name][1])
                b.weight.requires_grad_("B" in sent.halves)
                a.weight.requires_grad_("A" in sent.halves)
                self._put(name, sent.rest.get(name))
        self._load_head(head)

    def score(self, whole: Mapping[str, Any], head: Sequence[Any]) -> None:
        """Load what is scored."""
        import torch

        with torch.no_grad():
            for name, b, _ in self._layers():
                b.weight.zero_()
                self._put(name, whole[name])
        self._load_head(head)

    def train(self, rows: Any, order: Iterator[list[int]], steps: int, rate: float) -> Factors:
        """Take some steps; return the factors."""
        import torch

        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        self.model.train()
        for _ in range(steps):
            loss = self.model(**rows.batch(next(order))).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return {
            name: (b.weight.detach() * _SCALE, a.weight.detach().clone())
            for name, b, a in self._layers()
        }

    def _layers(self) -> Iterator[tuple[str, Any, Any]]:
        for name, module in self._modules.items():
            yield name, module.lora_B["default"], module.lora_A["default"]

    def _put(self, name: str, added: Any) -> None:
        weight = self._modules[name].base_layer.weight
        weight.copy_(self._bases[name] if added is None else self._bases[name] + added)

    def _load_head(self, head: Sequence[Any]) -> None:
        import torch

        with torch.no_grad():
            for parameter, value in zip(self._heads, head, strict=True):
                parameter.copy_(value)


def _order(rows: Sequence[int], settings: LoraSettings, key: str) -> Iterator[list[int]]:
    from fedcore.demo.tasks import batch_order

    return (
        [rows[number] for number in batch]
        for batch in batch_order(len(rows), settings.batch_size, key)
    )


def _mean_head(heads: Sequence[Sequence[Any]], weights: Sequence[int]) -> list[Any]:
    from .federation import mean

    states = [{str(n): tensor for n, tensor in enumerate(head)} for head in heads]
    return list(mean(states, weights).values())


def quick(settings: LoraSettings) -> LoraSettings:
    """Return settings in which nothing is learnt, to see that it runs."""
    return replace(
        settings,
        train_rows=120,
        test_rows=20,
        rounds=2,
        steps=2,
        batch_size=4,
        sites=5,
        rates=(2e-3,),
    )


def _fingerprint(settings: LoraSettings, source: Source, seed: int) -> str:
    plain = {
        "settings": {k: v for k, v in asdict(settings).items() if k not in ("rates", "tuned_on")},
        "seed": seed,
        "model": Path(str(source.model)).name,
        "texts": [asdict(text) for text in source.texts],
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
