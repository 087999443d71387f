"""A rule in Python that takes long, in whole runs: who is served meanwhile, and how the server ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fedcore.config import parse_run
from fedcore.model_file import open_model
from fedcore.monitor.ask import ask_status
from fedcore.server.service import RunResult, Server
from fedcore.server.storage.store import Store

from ..support.python_rules import Held, named
from ..support.runs import site

SECONDS = 200


def slow_server(folder: Path) -> Server:
    return Server(
        parse_run(
            {
                "run": {"name": "t", "rounds": 1},
                "participants": {"count": 3, "round_deadline": "300s"},
                "aggregation": {"rule": named(Held)},
                "server": {"listen": "tcp://127.0.0.1:0", "insecure": True},
            },
            folder=folder,
        )
    )


@contextlib.contextmanager
def at_work(
    server: Server, steps: dict[str, float]
) -> Iterator[tuple[Future[RunResult], list[Future[int]]]]:
    """Run a server and its sites; in the ``with`` block the rule is at work, and it ends after it."""
    Held.hold()
    with ThreadPoolExecutor(4) as pool:
        result = pool.submit(server.run)
        done = [pool.submit(site, server.endpoint, name, step) for name, step in steps.items()]
        try:
            assert Held.entered.wait(SECONDS)
            yield result, done
        finally:
            Held.free.set()


def test_a_server_answers_while_its_rule_works_and_the_model_has_the_same_bytes(
    tmp_path: Path,
) -> None:
    server, steps = slow_server(tmp_path), {"a": 1.0, "b": 2.0, "c": 9.0}
    with at_work(server, steps) as (result, done):
        status = ask_status(server.endpoint, SECONDS)
        assert {found.site for found in status.sites} == set(steps)
    assert result.result(SECONDS).ok
    assert [trained.result(SECONDS) for trained in done] == [1, 1, 1]
    model = open_model(Store(tmp_path / "runs/t", None).path(1))
    assert bytes(model.view("w")) == np.full(5000, 2, np.float32).tobytes()


def test_a_server_that_is_stopped_while_its_rule_works_ends_and_commits_nothing(
    tmp_path: Path,
) -> None:
    server = slow_server(tmp_path)
    with at_work(server, dict.fromkeys("abc", 1.0)) as (result, done):
        server.stop()
        assert not result.result(SECONDS).ok  # the rule is still at work
    for trained in done:
        trained.exception(SECONDS)
    assert [row.version for row in Store(tmp_path / "runs/t", None).versions()] == [0]
