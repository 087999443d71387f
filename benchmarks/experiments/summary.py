"""What came of the experiments, in numbers: means and spreads over seeds, leads, swings."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["peft_rows", "spread", "steady_cells", "steady_rows", "swing"]


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


def peft_rows(cells: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for every method and split: last-round accuracies, and the lead over the best site alone.

    The best site is another one in every seed: the one with the highest accuracy on the same test rows, chosen
    after the fact, so that the federated model has to beat them all. The standard error of the lead is that of
    the mean of paired differences, row by row over all seeds.
    """
    groups = _groups(cells)
    rows = []
    for (method, split, steady), results in groups.items():
        if split == "pooled" or steady != "plain":
            continue
        pooled = groups.get((method, "pooled", "plain"), [])
        best, alone, differences, beaten = [], [], [], 0
        for result in results:
            sites = [name for name in result["curves"] if name != "federated"]
            top = max(sites, key=lambda name: _last(result, name))
            best.append(_last(result, top))
            alone.append(statistics.fmean(_last(result, name) for name in sites))
            pairs = zip(result["right"]["federated"], result["right"][top], strict=True)
            differences += [a - b for a, b in pairs]
            beaten += _last(result, "federated") > best[-1]
        lead = statistics.fmean(differences)
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
                "lead": lead,
                "lead_error": statistics.stdev(differences) / math.sqrt(len(differences)),
                "seeds_beaten": beaten,
            }
        )
    return rows


def steady_cells(cells: Mapping[str, Any], split: str) -> dict[str, list[Any]]:
    """Return the cells of plain averaging and of all that was tried, from the seeds that all of them have."""
    groups = {key[2]: results for key, results in _groups(cells).items() if key[1] == split}
    seeds = [{result["cell"]["seed"] for result in results} for results in groups.values()]
    common = set.intersection(*seeds) if seeds else set()
    return {
        steady: [result for result in results if result["cell"]["seed"] in common]
        for steady, results in groups.items()
        if common
    }


def steady_rows(cells: Mapping[str, Any], split: str) -> list[dict[str, Any]]:
    """Return a row for plain averaging and for all that was tried against its swings."""
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
        }
        for steady, results in steady_cells(cells, split).items()
    ]
