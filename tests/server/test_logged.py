"""What sites log while they train is kept in the run folder, bounded, and disturbs no round."""

from __future__ import annotations

import json
import logging
import math
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore import protocol
from fedcore.server.service import Server
from fedcore.server.storage.journal import Journal
from fedcore.server.storage.logged import Logged, read_points, read_series, summarise
from fedcore.server.storage.metrics import MOST_POINTS
from fedcore.server.storage.store import Store
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

from ..support.raw_site import RawSite
from ..support.run_folders import SETTINGS, commit
from ..support.runs import SPECS, run, run_config, site, writer


def logging_site(address: str, name: str, rounds: int = 99) -> int:
    """Log a loss in each round, at steps of its own, and report one with each update."""
    session = Session(SiteSettings(server=address, site=name, connect_timeout=200))
    trained = 0
    try:
        while trained < rounds and session.is_running():
            model = session.begin(SPECS, {"config.json": "{}"}, writer(0))
            if model.kind == "evaluate":
                session.end_task()
                continue
            session.log({"loss": 1 / model.round}, step=10 * model.round)
            value = float(np.frombuffer(model.tensors["w"], np.float32)[0])
            session.submit(writer(value + 1), 1, {"train_loss": float(model.round)})
            trained += 1
    finally:
        session.close()
    return trained


def table(folder: Path) -> dict[tuple[str, str], list[tuple[Any, ...]]]:
    """Return round, step and value of each kept point, by site and name."""
    with closing(sqlite3.connect(folder / "run.sqlite")) as db:
        found: dict[tuple[str, str], list[tuple[Any, ...]]] = {}
        query = "SELECT site, name, round, step, value FROM metrics ORDER BY site, name, seq"
        for name, metric, *rest in db.execute(query):
            found.setdefault((name, metric), []).append(tuple(rest))
        return found


def test_what_sites_log_is_in_the_run_folder_with_round_and_step(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"]))
    at = server.endpoint
    result, _ = run(server, lambda: logging_site(at, "a"), lambda: logging_site(at, "b"))
    assert result.ok
    folder = tmp_path / "runs/t"
    points = table(folder)
    assert points.keys() == {(s, n) for s in "ab" for n in ("loss", "train_loss")}
    assert points["a", "loss"] == [(1, 10, 1.0), (2, 20, 0.5), (3, 30, 1 / 3)]
    assert points["b", "train_loss"] == [(1, None, 1.0), (2, None, 2.0), (3, None, 3.0)]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["training_metrics"]["a"]["loss"] == {
        "count": 3, "first": 1.0, "last": 1 / 3, "min": 1 / 3, "max": 1.0, "not_finite": None,
    }  # fmt: skip


def test_a_server_that_goes_on_keeps_what_was_logged_before(tmp_path: Path) -> None:
    first = Server(run_config(tmp_path, sites=["a"], rounds=2))
    run(first, lambda: logging_site(first.endpoint, "a"))
    longer = Server(run_config(tmp_path, sites=["a"], rounds=4))
    run(longer, lambda: logging_site(longer.endpoint, "a"))
    steps = [step for _, step, _ in table(tmp_path / "runs/t")["a", "loss"]]
    assert steps == [10, 20, 30, 40]


def test_a_flood_of_logs_is_kept_thinned_and_disturbs_no_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bool] = []
    attempt = Journal.try_transaction
    monkeypatch.setattr(
        Journal, "try_transaction", lambda *args: written.append(attempt(*args)) or written[-1]
    )
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=1, min_results=1))

    def both() -> int:
        raw = RawSite(server.endpoint, "b")
        for step in range(900):
            raw.link.send(protocol.Log(round=1, step=step, metrics={"x": float(step)}))
        raw.link.send(protocol.Join(version="test", site="b", instance="0" * 32))
        raw.await_message(protocol.Welcome)  # what was sent before it is handled
        raw.link.send(protocol.Leave(reason="done"))
        raw.link.close()
        return site(server.endpoint, "a", 1)

    result, _ = run(server, both)
    assert result.ok
    points = table(tmp_path / "runs/t")["b", "x"]
    assert len(points) <= MOST_POINTS
    assert (points[0][1], points[-1][1]) == (0, 899)
    assert len(written) < 60, "at most once a second"


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[Logged]:
    with closing(Journal(tmp_path / "run.sqlite")) as journal:
        found = Logged(journal)
        found.open(2)
        yield found


def test_points_are_written_once_a_second_and_with_each_commit(
    logged: Logged, tmp_path: Path
) -> None:
    steps = []
    for step, now in enumerate((0.0, 0.5, 1.0, 1.7, 2.1)):
        logged.add("a", 1, step, {"loss": 1.0})
        logged.write_if_due(10 + now)
        steps.append([point[1] for point in table(tmp_path).get(("a", "loss"), [])])
    assert [found[-1] for found in steps] == [0, 0, 2, 2, 4]
    logged.add("a", 1, 5, {"loss": 1.0})
    with logged.transaction():
        pass
    assert table(tmp_path)["a", "loss"][-1][1] == 5


def test_points_wait_while_another_process_has_the_journal(logged: Logged, tmp_path: Path) -> None:
    logged.add("a", 1, 0, {"loss": float("nan")})
    with closing(sqlite3.connect(tmp_path / "run.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        logged.write_if_due(10)
        other.execute("ROLLBACK")
    assert table(tmp_path) == {}
    logged.write_if_due(11)
    assert table(tmp_path) == {("a", "loss"): [(1, 0, None)]}


def test_a_disk_that_is_full_costs_a_line_and_no_point(
    logged: Logged, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = logged.journal
    pages = journal.rows("PRAGMA page_count")[0][0]
    journal.db.execute(f"PRAGMA max_page_count = {pages}")
    for step in range(1000):
        logged.add("a", 1, step, {f"loss-{step % 4}": float(step)})
        logged.write_if_due(10.0 + step // 100)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "wait in memory" in caplog.text
    assert len(table(tmp_path)["a", "loss-0"]) < 250
    journal.db.execute("PRAGMA max_page_count = 1000000")
    logged.write_if_due(30)
    assert {name: len(found) for name, found in table(tmp_path).items()} == {
        ("a", f"loss-{i}"): 250 for i in range(4)
    }


def test_a_restart_at_any_moment_changes_neither_points_nor_summary(tmp_path: Path) -> None:
    chance = random.Random(3)
    values = [chance.choice([chance.gauss(0, 1), 1.0, math.nan, -math.inf]) for _ in range(3000)]
    kept = []
    for name, restarts in (("once", set[int]()), ("often", set(chance.sample(range(3000), 40)))):
        with closing(Journal(tmp_path / name)) as journal:
            logged = Logged(journal)
            for step, value in enumerate(values):
                logged.add("a", 1, step, {"loss": value})
                if step in restarts:
                    with logged.transaction():
                        pass
                    logged = Logged(journal)
                    logged.open(1)
            summary = logged.summary()
            ((id_, _, _),) = read_series(journal.rows)
            points = read_points(journal.rows, id_)
            assert summary["a"]["loss"] == summarise(points)
            kept.append([(point.seq, repr(point.value)) for point in points])
    assert kept[0] == kept[1]
    assert len(kept[0]) <= MOST_POINTS


def test_going_back_to_a_round_drops_what_was_logged_after_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", SETTINGS)
    for version in range(3):
        store.logged.add("a", version, version, {"loss": float(version), f"of-{version}": 1.0})
        commit(store, version)
    aside = store.roll_back(1)
    store.close()
    found = table(tmp_path / "run")
    assert [point[0] for point in found["a", "loss"]] == [0, 1]
    assert ("a", "of-2") not in found
    assert ("a", "of-2") in table(aside)


def test_a_journal_of_a_fedcore_without_the_table_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with closing(Journal(path)) as journal:
        run_id = journal.run_id
        for kind, name in (("VIEW", "metrics"), ("TABLE", "points"), ("TABLE", "series")):
            journal.db.execute(f"DROP {kind} {name}")
    with closing(Journal(path)) as journal:
        logged = Logged(journal)
        logged.open(1)
        logged.add("a", 1, 0, {"loss": 2.0})
        with logged.transaction():
            pass
        ((id_, *names),) = read_series(journal.rows)
        assert (names, journal.run_id) == (["a", "loss"], run_id)
        assert [point.value for point in read_points(journal.rows, id_)] == [2.0]
