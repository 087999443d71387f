"""What came of the experiments, in numbers: means and spreads over seeds, leads, swings."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

__all__ = [
    "liar_rows",
    "lora_rows",
    "optimizer_rows",
    "peft_rows",
    "second_half",
    "spread",
    "steady_cells",
    "steady_rows",
    "swing",
    "swing_rows",
]

_STUDENT: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""The 97.5 % quantile of Student's distribution with 1 to 9 degrees of freedom."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return mean, standard deviation over the seeds (None for one) and the values."""
    return {
        "mean": statistics.fmean(values),
        "stdev": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def swing(curve: Sequence[float]) -> float:
    """Return how much accuracy a curve lost on its way: the sum of its steps down, after the first round."""
    return sum(max(0.0, a - b) for a, b in itertools.pairwise(curve[1:]))


def _groups(cells: Mapping[str, Any]) -> dict[tuple[str, str, str], list[Any]]:
    found: dict[tuple[str, str, str], list[Any]] = {}
    for result in cells.values():
        cell = result["cell"]
        found.setdefault((cell["method"], cell["split"], cell["steady"]), []).append(result)
    return found


def _last(result: Any, name: str) -> float:
    return float(result["curves"][name]["accuracy"][-1])


def _best_alone(result: Any) -> str:
    """Return the site whose own model is the best on the test rows, chosen after the fact."""
    sites: list[str] = [name for name in result["curves"] if name != "federated"]
    return max(sites, key=lambda name: _last(result, name))


def _lead(federated: Sequence[Any], alone: Sequence[Any]) -> dict[str, Any]:
    """Return the lead of federated models over the best site alone of the same seed, and how many of them lead.

    The standard error is that of the mean of paired differences, row by row over all seeds.
    """
    differences, beaten = [], 0
    for result, rivals in zip(federated, alone, strict=True):
        best = _best_alone(rivals)
        pairs = zip(result["right"]["federated"], rivals["right"][best], strict=True)
        differences += [a - b for a, b in pairs]
        beaten += _last(result, "federated") > _last(rivals, best)
    return {
        "lead": statistics.fmean(differences),
        "lead_error": statistics.stdev(differences) / math.sqrt(len(differences)),
        "seeds_beaten": beaten,
    }


def peft_rows(cells: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for every method and split: last-round accuracies, and the lead over the best site alone.

    The best site may be another one in every seed: the one with the highest accuracy on the same test rows,
    chosen after the fact, so that the federated model has to beat them all.
    """
    groups = _groups(cells)
    rows = []
    for (method, split, steady), results in groups.items():
        if split == "pooled" or steady != "plain":
            continue
        pooled = groups.get((method, "pooled", "plain"), [])
        alone = [
            statistics.fmean(_last(r, name) for name in r["curves"] if name != "federated")
            for r in results
        ]
        best = [_last(result, _best_alone(result)) for result in results]
        rows.append(
            {
                "method": method,
                "split": split,
                "seeds": [result["cell"]["seed"] for result in results],
                "test_rows": len(results[0]["right"]["federated"]),
                "alone": spread(alone),
                "best_alone": spread(best),
                "federated": spread([_last(result, "federated") for result in results]),
                "centralised": spread([_last(r, "centralised") for r in pooled])
                if pooled
                else None,
                **_lead(results, results),
            }
        )
    return rows


def steady_cells(cells: Mapping[str, Any], split: str) -> dict[str, list[Any]]:
    """Return the cells of plain averaging and of all that was tried with the same method, from common seeds."""
    everything = _groups(cells)
    tried = [method for method, at, steady in everything if at == split and steady != "plain"]
    groups = {
        steady: results
        for (method, at, steady), results in everything.items()
        if at == split and method in tried
    }
    seeds = [{result["cell"]["seed"] for result in results} for results in groups.values()]
    common = set.intersection(*seeds) if "plain" in groups else set()
    return {
        steady: [result for result in results if result["cell"]["seed"] in common]
        for steady, results in groups.items()
        if common
    }


def steady_rows(cells: Mapping[str, Any], split: str) -> list[dict[str, Any]]:
    """Return a row for plain averaging and for all that was tried against its swings.

    The lead is over the sites alone of the plain cells: what steadies changes the federation alone.
    """
    found = steady_cells(cells, split)
    plain = found.get("plain", [])
    return [
        {
            "steady": steady,
            "seeds": [result["cell"]["seed"] for result in results],
            "rounds": len(results[0]["curves"]["federated"]["accuracy"]) - 1,
            "steps_per_round": results[0]["steps_per_round"],
            "federated": spread([_last(result, "federated") for result in results]),
            "lowest": spread(
                [min(result["curves"]["federated"]["accuracy"][2:]) for result in results]
            ),
            "swing": spread(
                [swing(result["curves"]["federated"]["accuracy"]) for result in results]
            ),
            **_lead(results, plain),
        }
        for steady, results in found.items()
    ]


def swing_rows(found: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return a row for every way of averaging: how far accuracy moves from place to place in the second half.

    A curve's first half is left out: there accuracy moves because the model learns.
    """
    rows = []
    for way, results in found.items():
        halves = [result["accuracy"][len(result["accuracy"]) // 2 :] for result in results]
        moves = [[b - a for a, b in itertools.pairwise(half)] for half in halves]
        rows.append(
            {
                "way": way,
                "seeds": [result["seed"] for result in results],
                **{key: results[0][key] for key in ("rounds", "steps_per_round", "sampled")},
                "last": spread([half[-1] for half in halves]),
                "mean": spread([statistics.fmean(half) for half in halves]),
                "move": spread([statistics.fmean(map(abs, move)) for move in moves]),
                "drop": spread([max(0.0, -min(move)) for move in moves]),
            }
        )
    return rows


def liar_rows(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each rule and attack the last accuracy of every seed, its mean, and half its 95 % interval.

    The interval is Student's over the seeds. ``lead``: the same of the difference to the mean's, seed by seed.
    """
    last = {(r["rule"], r["attack"], r["seed"]): r["accuracy"][-1] for r in found}
    seeds = list(dict.fromkeys(r["seed"] for r in found))
    rows = []
    for rule, attack in dict.fromkeys((r["rule"], r["attack"]) for r in found):
        values = [last[rule, attack, seed] for seed in seeds]
        lead = [last[rule, attack, seed] - last["mean", attack, seed] for seed in seeds]
        rows.append(
            {
                "rule": rule,
                "attack": attack,
                "seeds": seeds,
                "accuracy": _interval(values),
                "lead": _interval(lead),
            }
        )
    return rows


def lora_rows(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each split, ranks and way the last accuracies, with half their 95 % interval, and what it costs.

    ``lead``: the difference to the mean of the factors, seed by seed. ``averaging_error``: what that mean would
    lose of the products' mean, over the rounds of all seeds.
    """
    cells: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = {}
    for result in found:
        key = result["split"], result["ranks"], result["way"]
        cells.setdefault(key, {})[result["seed"]] = result
    rows = []
    for (split, ranks, way), results in cells.items():
        plain = cells[split, ranks, "factors"]
        values = [result["accuracy"][-1] for result in results.values()]
        errors = [error for result in results.values() for error in result["averaging_error"]]
        one = next(iter(results.values()))
        rows.append(
            {
                "split": split,
                "ranks": ranks,
                "way": way,
                "seeds": list(results),
                **{key: one[key] for key in ("rate", "bytes_up", "bytes_down")},
                "accuracy": _interval(values),
                "lead": _interval(
                    [
                        value - plain[seed]["accuracy"][-1]
                        for seed, value in zip(results, values, strict=True)
                    ]
                ),
                "averaging_error": {"median": statistics.median(errors), "largest": max(errors)},
            }
        )
    return rows


def optimizer_rows(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each optimizer: accuracy in the second half of a run and after its last round, and swings.

    Each figure has its values, one for each seed, their mean, and half its 95 % interval (Student's over seeds).
    ``lead``: the accuracy in the second half less the mean's, seed by seed.
    """
    rows: list[dict[str, Any]] = []
    plain = [second_half(result) for result in found["mean"]]
    for name, results in found.items():
        halves = [second_half(result) for result in results]
        moves = [[b - a for a, b in itertools.pairwise(half)] for half in halves]
        leads = [
            statistics.fmean(half) - statistics.fmean(other)
            for half, other in zip(halves, plain, strict=True)
        ]
        rows.append(
            {
                "optimizer": name,
                "try": results[0]["try"],
                "seeds": [result["seed"] for result in results],
                "mean": _interval([statistics.fmean(half) for half in halves]),
                "lead": _interval(leads),
                "last": _interval([half[-1] for half in halves]),
                "move": _interval([statistics.fmean(map(abs, move)) for move in moves]),
                "drop": _interval([max(0.0, -min(move)) for move in moves]),
            }
        )
    return rows


def second_half(result: Mapping[str, Any]) -> list[float]:
    """Return the accuracies in the second half of a run."""
    curve: list[float] = result["accuracy"]
    return curve[len(curve) // 2 :]


def _interval(values: Sequence[float]) -> dict[str, Any]:
    half = None
    if len(values) > 1:
        t = _STUDENT[min(len(values) - 1, len(_STUDENT)) - 1]
        half = t * statistics.stdev(values) / math.sqrt(len(values))
    return {"values": list(values), "mean": statistics.fmean(values), "half_interval": half}
