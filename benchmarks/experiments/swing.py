"""The swing experiment: many topics, and few of many unlike sites in a round, where plain averaging swings.

Ways to steady it are tried with as many steps at a site that takes part, scored at the same places.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from fedcore.files.partition import dirichlet

from .peft import Lab, Settings, Source, Steadier, Trainee, keep, read_kept

if TYPE_CHECKING:
    from .federation import State
    from .sentiment import Text

__all__ = ["WAYS", "SwingSettings", "Way", "load_topics", "run_ways"]

_METHOD: Final = "lora"


@dataclass(frozen=True)
class SwingSettings(Settings):
    """What all ways share; ``rounds`` and ``steps`` are those of plain averaging.

    Attributes:
        sites: how many hold a part of the texts, dealt out by label with the skew ``alpha``.
        sampled: how many of them train in a round.
    """

    max_tokens: int = 48
    train_rows: int = 1600
    test_rows: int = 400
    rounds: int = 20
    sites: int = 10
    sampled: int = 2
    alpha: float = 0.3


@dataclass(frozen=True)
class Way(Steadier):
    """What is done against swings.

    Attributes:
        sampled: sites in a round; the settings' number if 0.
        average: the mean of so many last global models is scored; training goes on from the last one.
    """

    sampled: int = 0
    average: int = 1


WAYS: Final[Mapping[str, Way]] = MappingProxyType(
    {
        "plain": Way(),
        "more sites": Way(sampled=5),
        "short rounds": Way(steps=0.2),
        "mean of 5 models": Way(average=5),
        "momentum": Way(momentum=0.7),
        "proximal": Way(prox=1.0),
    }
)


def load_topics(folder: Path) -> list[Text]:
    """Read 20 Newsgroups, as the demo has it; the class of a message is its topic."""
    from fedcore.demo.encoder import read_tab

    from .sentiment import Text

    return [
        Text(row.text, row.label, "newsgroups", f"{side}/{number}")
        for side in ("train", "test")
        for number, row in enumerate(read_tab(folder / f"20newsgroups-{side}.tab"))
    ]


def run_ways(
    folder: Path,
    settings: SwingSettings,
    source: Source,
    seeds: Sequence[int],
    notice: Callable[[str], None],
) -> dict[str, list[Any]]:
    """Train what is not in the folder yet; return the results of each way, one for each seed."""
    kept = folder / "runs"
    kept.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Any]] = {name: [] for name in WAYS}
    for seed in seeds:
        lab: Lab | None = None
        for name, way in WAYS.items():
            path = kept / f"{name.replace(' ', '_')}-{seed}.json"
            mark = _fingerprint(settings, source, way, seed)
            result = read_kept(path, mark)
            if result is None:
                lab = lab or Lab(settings, source, seed)
                begun, cpu = time.monotonic(), time.process_time()
                result = run_way(lab, settings, way) | {
                    "way": name,
                    "seed": seed,
                    "settings": mark,
                    "seconds": time.monotonic() - begun,
                    "cpu_seconds": time.process_time() - cpu,
                }
                keep(path, result)
                notice(f"seed {seed}, {name}: {result['accuracy'][-1]:.3f}")
            found[name].append(result)
    return found


def run_way(lab: Lab, settings: SwingSettings, way: Way) -> dict[str, Any]:
    """Return the accuracy of what is handed out, after each of plain averaging's rounds or as many steps."""
    from .classifier import accuracy
    from .federation import Stride, load_state, mean, state_of

    model, stride = lab.model(_METHOD), Stride(way.momentum)
    sites = _sites(lab, settings, way, model)
    steps = max(1, round(settings.steps * way.steps))
    every = round(settings.steps / steps)
    sampled = min(way.sampled or settings.sampled, len(sites))
    draw = random.Random(f"{lab.seed}/sites")
    last, models = state_of(model), [state_of(model)]

    def scored(model_state: State) -> float:
        load_state(model, model_state)
        return float(accuracy(model, lab.rows("test"))[1].double().mean())

    curve = [scored(last)]
    for round_ in range(1, settings.rounds * every + 1):
        states = []
        taken = sorted(draw.sample(range(len(sites)), sampled))
        for number in taken:
            load_state(model, last)
            sites[number].train(steps)
            states.append(state_of(model))
        last = stride.take(last, mean(states, [sites[number].weight for number in taken]))
        models = [*models, last][-way.average :]
        if round_ % every == 0:
            curve.append(scored(mean(models, [1] * len(models)) if len(models) > 1 else last))
    return {
        "accuracy": curve,
        "steps_per_round": steps,
        "rounds": settings.rounds * every,
        "sampled": sampled,
        "rows": [site.weight for site in sites],
    }


def _sites(lab: Lab, settings: SwingSettings, way: Way, model: Any) -> list[Trainee]:
    held = dirichlet(
        [text.label for text in lab.pool.train],
        settings.sites,
        alpha=settings.alpha,
        min_size=settings.batch_size,
        seed=lab.seed,
    ).sites
    rows = lab.rows("train")
    return [
        Trainee(
            model,
            rows.pick(numbers),
            rate=dict(settings.learning_rate)[_METHOD] * way.rate,
            prox=way.prox,
            size=settings.batch_size,
            key=f"{lab.seed}/site-{number}",
        )
        for number, numbers in enumerate(held)
    ]


def _fingerprint(settings: SwingSettings, source: Source, way: Way, seed: int) -> str:
    plain = {
        "settings": asdict(settings),
        "way": asdict(way),
        "seed": seed,
        "model": Path(str(source.model)).name,
        "texts": [asdict(text) for text in source.texts],
    }
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
