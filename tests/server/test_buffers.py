"""Buffers keep the mean under a robust rule: a median of running variances is that of no model."""

from __future__ import annotations

import functools
import logging
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.config import parse_run
from fedcore.errors import RefusedError
from fedcore.model_file import ModelFile, open_model
from fedcore.protocol import Role
from fedcore.server.service import Server
from fedcore.server.storage.store import Store
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

from ..support.python_rules import Median, named
from ..support.runs import run

# The buffer lies between parameters of its dtype, and begins and ends within blocks and chunks.
COUNTS = {"a": 300_001, "b": 5_003, "c": 20_011}
SPECS = [(name, "F32", [count]) for name, count in COUNTS.items()]
BUFFER: dict[str, Role] = {"b": "buffer"}
Roles = dict[str, Role] | None


def site(address: str, name: str, weight: int, roles: Roles) -> None:
    session = Session(
        SiteSettings(server=address, site=name, connect_timeout=200, idle_timeout=200)
    )
    try:
        while session.is_running():
            model = session.begin(SPECS, {}, lambda key: bytes(4 * COUNTS[key]), roles=roles)
            session.score({"loss": 1.0}, 1)
            if model.kind == "evaluate":
                session.end_task()
                continue
            dice = np.random.default_rng([model.round, weight])
            update = {
                n: dice.standard_normal(c).astype(np.float32).tobytes() for n, c in COUNTS.items()
            }
            session.submit(update.__getitem__, weight)
    finally:
        session.close()


def server_of(folder: Path, rounds: int = 1, encoding: str = "raw", **aggregation: Any) -> Server:
    values = {
        "run": {"name": "t", "rounds": rounds},
        "participants": {"count": 4, "round_deadline": "300s"},
        "aggregation": aggregation,
        "transfer": {"update": encoding},
        "server": {"listen": "tcp://127.0.0.1:0", "insecure": True},
    }
    return Server(parse_run(values, folder=folder))


def model_of(folder: Path, roles: Roles, rounds: int = 1, **settings: Any) -> ModelFile:
    """Return what a run of four sites makes; its rounds are those that the folder does not have yet."""
    server = server_of(folder, rounds, **settings)
    sites = [
        functools.partial(site, server.endpoint, n, 3 + i, roles) for i, n in enumerate("wxyz")
    ]
    result, _ = run(server, *sites)
    assert result.ok
    store = Store(folder / "runs/t", None)
    store.close()
    return open_model(store.path(rounds))


@pytest.mark.parametrize("encoding", ["raw", "int8"])
@pytest.mark.parametrize("rule", ["median", "trimmed-mean", named(Median)])
def test_buffers_keep_the_mean_under_a_robust_rule(
    tmp_path: Path, rule: str, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    mean = model_of(tmp_path / "mean", None, encoding=encoding)
    middle = model_of(tmp_path / "middle", None, encoding=encoding, rule=rule)
    assert "will keep the plain mean" not in caplog.text
    found = model_of(tmp_path / "found", BUFFER, encoding=encoding, rule=rule)
    assert bytes(found.view("b")) == bytes(mean.view("b")) != bytes(middle.view("b"))
    for name in "ac":
        assert bytes(found.view(name)) == bytes(middle.view(name)) != bytes(mean.view(name))
    assert "1 buffer of the model, such as b, will keep the plain mean" in caplog.text


def test_buffers_weigh_the_same_under_a_median_where_the_run_file_says_so(tmp_path: Path) -> None:
    mean = model_of(tmp_path / "mean", None, weights="equal")
    found = model_of(tmp_path / "found", BUFFER, rule="median", weights="equal")
    assert bytes(found.view("b")) == bytes(mean.view("b"))
    by_examples = model_of(tmp_path / "examples", BUFFER, rule="median")
    assert bytes(found.view("b")) != bytes(by_examples.view("b"))
    assert bytes(found.view("a")) == bytes(by_examples.view("a"))


def test_buffers_keep_the_mean_after_a_restart_whatever_the_sites_know_then(tmp_path: Path) -> None:
    model_of(tmp_path / "run", BUFFER, rule="median")
    found = model_of(tmp_path / "run", None, 2, rule="median")
    mean = model_of(tmp_path / "mean", None, 2)
    assert bytes(found.view("b")) == bytes(mean.view("b"))
    assert bytes(found.view("a")) != bytes(mean.view("a"))


def test_a_median_that_began_without_roles_goes_on_without_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model_of(tmp_path / "run", None, rule="median")
    found = model_of(tmp_path / "run", BUFFER, 2, rule="median")
    middle = model_of(tmp_path / "middle", None, 2, rule="median")
    assert bytes(found.view("b")) == bytes(middle.view("b"))
    assert "1 buffer of the model, such as 'b', are parameters to the rule: no site" in caplog.text


def test_one_site_cant_take_tensors_from_a_robust_rule_by_naming_them_buffers(
    tmp_path: Path,
) -> None:
    server = server_of(tmp_path, rule="median")
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(server.run)
        said: list[Roles] = [BUFFER, None]
        sites = [pool.submit(site, server.endpoint, f"s{i}", 1, said[i]) for i in range(2)]
        done, left = wait(sites, 60, FIRST_COMPLETED)
        server.stop()
        running.result(200)
        wait(left, 60)
    (refused,) = done
    assert isinstance(refused.exception(), RefusedError)
    assert "all sites have to say the same" in str(refused.exception())
