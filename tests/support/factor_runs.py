"""Runs of two sites that train two adapters of rank 4 without torch, and what comes out of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from fedcore.config import RunConfig, parse_run
from fedcore.server.service import Server
from fedcore.site.session import GlobalModel, Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.local import LocalNetwork

PAIRS = tuple((f"m{i}.lora_A.weight", f"m{i}.lora_B.weight") for i in range(2))
SHAPES = {
    **{a: (4, 300) for a, _ in PAIRS},
    **{b: (200, 4) for _, b in PAIRS},
    "head": (7,),
    "seen": (1,),
}
SPECS = [(name, "I64" if name == "seen" else "F32", list(shape)) for name, shape in SHAPES.items()]
NUMPY = {"F32": np.float32, "I64": np.int64}
WEIGHTS = {"a": 3, "b": 8}
Values = dict[str, np.ndarray]


def first() -> Values:
    dice = np.random.default_rng(0)
    found = {name: dice.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    return {**found, "seen": np.array([5])}


def trained(model: Values, site: str, round_: int, fixed: frozenset[str]) -> Values:
    found = {}
    for name, value in model.items():
        dice = np.random.default_rng([round_, *site.encode(), *name.encode()])
        step = dice.standard_normal(value.shape).astype(np.float32) / 8
        found[name] = value if name in fixed or name == "seen" else value + step
    return found


def fixed_in(method: str, round_: int) -> frozenset[str]:
    of_a = method == "freeze-a" or round_ in (1, 3)
    return frozenset(pair[0 if of_a else 1] for pair in PAIRS)


def expected(method: str, rounds: int) -> list[Values]:
    """The versions: one factor is the weighted mean in binary64, rounded once, and the other as it was."""
    found = [first()]
    for round_ in range(1, rounds + 1):
        fixed = fixed_in(method, round_)
        updates = [
            (w, trained(found[-1], site, round_, fixed)) for site, w in sorted(WEIGHTS.items())
        ]
        mean = {}
        for name, before in found[-1].items():
            total = sum(w * values[name].astype(np.float64) for w, values in updates)
            whole = name in fixed or name == "seen"
            mean[name] = before if whole else (total / sum(WEIGHTS.values())).astype(np.float32)
        found.append(mean)
    return found


def config(folder: Path, method: str | None, rounds: int = 3, **sections: Any) -> RunConfig:
    aggregation = {"lora": method} if method is not None else {}
    aggregation |= sections.pop("aggregation", {})
    values = {
        "run": {"name": "t", "rounds": rounds},
        "participants": {"sites": list(WEIGHTS), "round_deadline": "1h"},
        "server": {"insecure": True},
        "aggregation": aggregation,
    }
    return parse_run(values | sections, folder=folder)


def values_of(model: GlobalModel) -> Values:
    return {
        name: np.frombuffer(model.tensors[name], NUMPY[dtype]).reshape(shape)
        for name, dtype, shape in model.specs
    }


def reader(values: Values) -> Callable[[str], bytes]:
    return lambda name: values[name].tobytes()


def take_part(
    network: LocalNetwork,
    name: str,
    *,
    waits: threading.Event | None = None,
    leaves: bool = False,
    **options: Any,
) -> list[int]:
    """Return the rounds trained. Round 2 is sent after ``waits`` is set, or the last thing before the end."""
    session = Session(SiteSettings("local", name, idle_timeout=200, **options), network.dial)
    rounds = []
    try:
        while session.is_running():
            model = session.begin(SPECS, {}, reader(first()), roles={}, pairs=PAIRS)
            session.score({"loss": 1.0}, 1)
            if model.kind == "evaluate":
                session.end_task()
                continue
            update = trained(values_of(model), name, model.round, session.fixed)
            if model.round == 2 and waits is not None:
                assert waits.wait(200)
            session.submit(reader(update), WEIGHTS[name])
            rounds.append(model.round)
            if model.round == 2 and leaves:
                return rounds
    finally:
        session.close()
    return rounds


@contextmanager
def joined() -> Iterator[tuple[LocalNetwork, ThreadPoolExecutor]]:
    with closing(LocalNetwork()) as network, ThreadPoolExecutor(5) as pool:
        yield network, pool


def run_through(run: RunConfig, **options: Any) -> Path:
    with joined() as (network, pool):
        server = Server(run, link=network.server())
        with ExitStack() as stack:
            stack.callback(server.stop)
            result = pool.submit(server.run)
            sites = [pool.submit(take_part, network, name, **options) for name in WEIGHTS]
            assert result.result(200).ok
            for done in sites:
                done.result(200)
    return run.run_folder


def models(folder: Path) -> list[Values]:
    return [load_file(path) for path in sorted((folder / "models").glob("round-*"))]


def same(found: list[Values], wanted: list[Values]) -> bool:
    assert len(found) == len(wanted)
    return all(
        one.keys() == other.keys() and all(one[n].tobytes() == other[n].tobytes() for n in one)
        for one, other in zip(found, wanted, strict=True)
    )
