"""The optimizers experiment: server optimizers where plain averaging swings.

Ten unlike sites train a linear head on what a frozen encoder makes of messages of 20 topics, two of them in a
round. What they send is averaged, and the core's own optimizers make the next model of it. How far a step goes is
chosen for each optimizer on a seed of its own.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from fedcore.rules.finishers import FINISHERS

from .heads import Heads, HeadSettings, mark_of
from .peft import Source, keep, read_kept
from .summary import second_half

__all__ = ["GRID", "TUNED_ON", "OptimizerSettings", "Try", "choose", "run_optimizers", "run_try"]

TUNED_ON: Final = 1000
"""The seed on which tries are compared; its results are in no table of results."""


@dataclass(frozen=True)
class OptimizerSettings(HeadSettings):
    """What all runs share.

    Attributes:
        sampled: how many of the sites train in a round, drawn from the seed; the same for every try.
    """

    rounds: int = 40
    alpha: float = 0.3
    sampled: int = 2


@dataclass(frozen=True)
class Try:
    """What makes the next model of the sites' mean.

    Attributes:
        optimizer: a server optimizer of the core, with all of its ``options``, or ``none``: the mean itself.
        ema: the part of an average of the models that stays from round to round; it is scored then, and training
            goes on from the last model. None: no average.
    """

    optimizer: str = "none"
    options: tuple[tuple[str, float], ...] = ()
    ema: float | None = None


def _tries(name: str, values: Sequence[float], **fixed: float) -> dict[str, Try]:
    defaults = {option: about.default for option, about in FINISHERS[name].options.items()}
    noted = "".join(f", {option} {value:g}" for option, value in fixed.items())
    return {
        f"{name}, rate {value:g}{noted}": Try(
            name, tuple({**defaults, **fixed, "learning_rate": value}.items())
        )
        for value in values
    }


_SHORTER: Final = (0.1, 0.2, 0.3, 0.5)
_MOMENTUM: Final = {0.9: (0.03, 0.1, 0.3, 1.0), 0.5: (0.2, 0.5, 1.0)}
_ADAPTIVE: Final = (0.003, 0.01, 0.03, 0.1, 0.3)

GRID: Final[Mapping[str, Mapping[str, Try]]] = MappingProxyType(
    {
        "mean": {"mean": Try()},
        "mean, shorter steps": _tries("momentum", _SHORTER, momentum=0.0),
        **{
            name: {
                text: tried
                for momentum, rates in _MOMENTUM.items()
                for text, tried in _tries(name, rates, momentum=momentum).items()
            }
            for name in ("momentum", "nesterov")
        },
        **{name: _tries(name, _ADAPTIVE) for name in ("adagrad", "adam", "yogi")},
        "mean, ema": {
            f"mean, ema {decay:g}": Try(ema=decay) for decay in (0.5, 0.7, 0.8, 0.9, 0.95)
        },
    }
)
"""What is tried of each optimizer, by its name in tables. Options that are not named have their defaults."""


def choose(tried: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return for each optimizer the try with the best mean accuracy in the second half of its run.

    Args:
        tried: the result of each try, by name.
    """
    return {
        optimizer: max(tries, key=lambda name: statistics.fmean(second_half(tried[name])))
        for optimizer, tries in GRID.items()
    }


def run_optimizers(
    folder: Path,
    settings: OptimizerSettings,
    source: Source,
    seeds: Sequence[int],
    notice: Callable[[str], None],
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Train what is not in the folder yet.

    Returns:
        The result of each try on the seed for choosing, by its name, and the results of each chosen one on every
        seed, by the optimizer's name.
    """
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    every = {name: tried for tries in GRID.values() for name, tried in tries.items()}
    tried = _run_seed(folder, settings, source, TUNED_ON, every)
    notice(f"seed {TUNED_ON}: {_scores(tried)}")
    chosen = choose(tried)
    found: dict[str, list[Any]] = {name: [] for name in chosen}
    some = {name: every[name] for name in chosen.values()}
    for seed in seeds:
        made = _run_seed(folder, settings, source, seed, some)
        notice(f"seed {seed}: {_scores(made)}")
        for name, how in chosen.items():
            found[name].append(made[how])
    return tried, found


def _run_seed(
    folder: Path,
    settings: OptimizerSettings,
    source: Source,
    seed: int,
    tries: Mapping[str, Try],
) -> dict[str, Any]:
    heads: Heads | None = None
    found = {}
    for name, tried in tries.items():
        path = folder / "runs" / f"{name}-{seed}.json".replace(", ", "-").replace(" ", "_")
        mark = mark_of(settings, source, seed, tried=asdict(tried))
        result = read_kept(path, mark)
        if result is None:
            heads = heads or Heads(settings, source, seed)
            begun, cpu = time.monotonic(), time.process_time()
            result = {
                "try": name,
                "seed": seed,
                "settings": mark,
                "accuracy": run_try(heads, settings, seed, tried),
                "seconds": time.monotonic() - begun,
                "cpu_seconds": time.process_time() - cpu,
            }
            keep(path, result)
        found[name] = result
    return found


def _scores(found: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {statistics.fmean(second_half(r)):.3f}" for name, r in found.items())


def run_try(heads: Heads, settings: OptimizerSettings, seed: int, tried: Try) -> list[float]:
    """Return the accuracy on all test rows before the first round and after each."""
    from .federation import Optimizer

    draw = random.Random(f"{seed}/sites")
    server = Optimizer(tried.optimizer, dict(tried.options), tried.ema)
    model = {"head": heads.start()}
    curve = [heads.score(model["head"])]
    for round_ in range(settings.rounds):
        taken = sorted(draw.sample(range(settings.sites), settings.sampled))
        states = [
            {"head": model["head"] + heads.train(model["head"], site, round_)} for site in taken
        ]
        model = server.take(model, states, [heads.rows[site] for site in taken])
        curve.append(heads.score(server.served(model)["head"]))
    return curve
