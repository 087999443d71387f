"""Days of a federation in virtual time, with sites and a server that crash, leave and come back."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from fedcore.config import parse_run
from fedcore.model_file import create_model

from ..support.world import LAYOUT, World

SITES = ["a", "b", "c", "d", "e", "f"]
MINUTE = 60.0


def lived(
    folder: Path, seed: int, rounds: int, deadline: str = "30min", **sections: Any
) -> tuple[World, str]:
    """Live through a run; return its world, and a hash of what it came to."""
    folder.mkdir()
    create_model(folder / "start.safetensors", LAYOUT).file.sync()
    config = parse_run(
        {
            "run": {"name": "t", "rounds": rounds, "seed": 5},
            "model": {"initial": "start.safetensors"},
            "participants": {
                "sites": SITES,
                "sample": 5,
                "min_results": 3,
                "idle_timeout": "1min",
                "round_deadline": deadline,
            },
            "selection": {"metric": "loss", "mode": "min"},
            "server": {"insecure": True},
            **sections,
        },
        folder=folder,
    )
    world = World(config, seed, 20 * MINUTE)
    result = world.run()
    assert result.ok
    run = folder / "runs" / "t"
    digest = hashlib.sha256()
    for path in (run / "final/model.safetensors", run / "best/model.safetensors"):
        digest.update(path.read_bytes())
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rounds"] == rounds
    return world, digest.hexdigest()


HOUR = 3600.0
PLANS: dict[str, dict[str, Any]] = {
    "mean": {},
    "median of int8": {"aggregation": {"rule": "median"}, "transfer": {"update": "int8"}},
    "trimmed mean, Adam": {
        "aggregation": {
            "rule": "trimmed-mean",
            "options": {"trim": 1},
            "optimizer": {"name": "adam"},
        }
    },
    "Krum of int8": {
        "aggregation": {"rule": "krum", "options": {"f": 0}},
        "transfer": {"update": "int8"},
    },
}


HOURS = PLANS | {
    "norm clipping, Nesterov": {
        "aggregation": {"rule": "norm-clipping", "optimizer": {"name": "nesterov"}}
    },
    "centred clipping of nf4": {
        "aggregation": {"rule": "centred-clipping", "weights": "examples"},
        "transfer": {"update": "nf4"},
    },
    "RFA with mixing": {"aggregation": {"rule": "rfa", "options": {"mix": 1}}},
}


@pytest.mark.parametrize("plan", HOURS)
def test_hours_of_troubles_end_twice_with_the_same_bytes(tmp_path: Path, plan: str) -> None:
    first, again = (lived(tmp_path / name, 3, 4, **HOURS[plan]) for name in ("first", "again"))
    assert {"crash", "leave", "server"} <= first[0].troubles.keys()
    assert first[0].troubles == again[0].troubles
    assert first[1] == again[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("plan", PLANS)
def test_a_week_of_troubles_ends_twice_with_the_same_bytes(tmp_path: Path, plan: str) -> None:
    seeds = {"first": 1, "again": 1, "other": 2}
    # In so many rounds more than half of the sites are away for 30 minutes at some time.
    lives = {
        name: lived(tmp_path / name, seed, 500, "4h", **PLANS[plan]) for name, seed in seeds.items()
    }
    print({name: (world.troubles, digest) for name, (world, digest) in lives.items()})
    assert min(world.clock.monotonic() for world, _ in lives.values()) > 7 * 24 * HOUR
    assert lives["first"][1] == lives["again"][1] != lives["other"][1]
