"""Rows of many messages reach the disk together, and nothing that follows from them leaves before."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedcore import protocol
from fedcore.config import parse_run
from fedcore.errors import StorageError
from fedcore.outlet import Outlet
from fedcore.server.outcome import Outcome
from fedcore.server.service import Server
from fedcore.server.storage.store import Store

from ..support.arriving import Arriving, says
from ..support.failing import Failing
from ..support.runs import run, run_config, site


class Way:
    """An outlet of a store: what has left, and the sites that the disk knew of then."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.sqlite"
        self.left: list[tuple[str, list[str]]] = []
        self.outlet = Outlet(lambda item: self.left.append((item, self.on_disk())))

    def on_disk(self) -> list[str]:
        db = sqlite3.connect(self.path)
        try:
            return [row[0] for row in db.execute("SELECT site FROM members ORDER BY site")]
        finally:
            db.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "run", {"run": {"task": "train"}})
    yield made
    made.close()


@pytest.fixture
def way(store: Store) -> Way:
    made = Way(store.folder)
    store.hold_back(made.outlet)
    return made


def test_what_follows_from_rows_of_a_group_leaves_after_they_are_on_disk(
    store: Store, way: Way
) -> None:
    with store.group():
        way.outlet.put("first")
        store.add_member("a")
        way.outlet.put("joined a")
        store.add_member("b")
        way.outlet.put("joined b")
        assert way.on_disk() == []
        assert store.members() == ["a", "b"], "the run itself goes on with them"
    assert way.left == [("first", []), ("joined a", ["a", "b"]), ("joined b", ["a", "b"])]


def test_a_transaction_within_a_group_takes_the_rows_before_it_along(
    store: Store, way: Way
) -> None:
    with store.group():
        store.add_member("a")
        way.outlet.put("joined a")
        store.allow_round(1)
        assert way.left == [("joined a", ["a"])]
        way.outlet.put("round 1")
        assert way.left[1:] == [("round 1", ["a"])]


def test_rows_outside_a_group_are_on_disk_at_once(store: Store, way: Way) -> None:
    store.add_member("a")
    assert way.on_disk() == ["a"]


def test_a_row_that_fails_takes_none_of_its_group_with_it(store: Store, way: Way) -> None:
    with pytest.raises(ZeroDivisionError), store.group():  # noqa: PT012
        store.add_member("a")
        with store.journal.grouped():
            store.journal.db.execute("INSERT INTO members VALUES ('half')")
            raise ZeroDivisionError
    assert way.on_disk() == ["a"]


def test_nothing_follows_from_rows_that_cannot_be_written(store: Store, way: Way) -> None:
    db = store.journal.db
    store.journal.db = Failing(db)  # type: ignore[assignment]
    with pytest.raises(StorageError, match="disk I/O error"), store.group():  # noqa: PT012
        store.add_member("a")
        way.outlet.put("joined a")
    store.journal.db = db
    assert (way.left, way.on_disk()) == ([], [])
    with pytest.raises(StorageError, match="disk I/O error; .*start the server again"):
        store.allow_round(1)
    way.outlet.put("stopped")
    assert way.left == [("stopped", [])]


def test_what_leaves_by_one_way_leaves_also_where_another_fails(store: Store, way: Way) -> None:
    def fail(_: str) -> None:
        raise OverflowError

    failing = Outlet(fail)
    store.hold_back(failing, way.outlet)
    with pytest.raises(OverflowError), store.group():  # noqa: PT012
        store.add_member("a")
        failing.put("a message that is too large")
        way.outlet.put("an event")
    assert way.left == [("an event", ["a"])]


def test_a_server_whose_disk_is_full_within_a_group_says_that_it_is(tmp_path: Path) -> None:
    link, sites = Arriving(), [f"s{number}".ljust(60, "x") for number in range(100)]
    config = {
        "run": {"name": "t", "rounds": 1},
        "participants": {"sites": sites},
        "server": {"insecure": True},
    }
    server = Server(parse_run(config, folder=tmp_path), link=link)  # type: ignore[arg-type]
    try:
        server.start()
        db = server.runs[0].store.journal.db
        pages = db.execute("PRAGMA page_count").fetchone()[0]
        db.execute(f"PRAGMA max_page_count = {pages + 1}")
        link.waiting = [
            says(site, protocol.Join(version="0", site=site, instance=uuid.uuid4().hex))
            for site in sites
        ]
        with pytest.raises(StorageError, match="full"):
            server.step()
        assert link.sent == []
    finally:
        server.close()


def test_the_answers_to_many_messages_wait_for_one_transaction(tmp_path: Path) -> None:
    sites = [f"s{number:02}" for number in range(50)]
    config = {
        "run": {"name": "t", "rounds": 1},
        "participants": {"sites": sites},
        "server": {"insecure": True},
    }
    link = Arriving()
    server = Server(parse_run(config, folder=tmp_path), link=link)  # type: ignore[arg-type]
    server.start()
    link.waiting = [
        says(site, protocol.Join(version="0", site=site, instance=uuid.uuid4().hex))
        for site in sites
    ]
    commits: list[int] = []
    store = server.runs[0].store
    store.journal.db.set_trace_callback(
        lambda statement: commits.append(len(link.sent)) if statement == "COMMIT" else None
    )
    server.step()
    store.journal.db.set_trace_callback(None)
    assert commits == [0], "one transaction, before any answer"
    assert [type(message) for _, message in link.sent] == [protocol.Welcome] * len(sites)
    assert store.members() == sites
    server.close()


def test_a_run_ends_after_all_scores_are_on_disk_and_tasks_leave_before_the_best_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path, sites=["a", "b"], sample=2)
    server = Server(config)
    held: list[bool] = []
    on_disk: list[tuple[str]] = []
    sent = server.runs[0].link.outlet
    export, conclude = Outcome.export_best, Outcome.conclude

    def watched_export(outcome: Outcome) -> int | None:
        held.append(sent.held)
        return export(outcome)

    def watched_conclude(outcome: Outcome, *how: Any) -> Any:
        with closing(sqlite3.connect(config.run_folder / "run.sqlite")) as db:
            rows = db.execute("SELECT site FROM scores WHERE version = 3 ORDER BY site")
            on_disk.extend(rows.fetchall())
        return conclude(outcome, *how)

    monkeypatch.setattr(Outcome, "export_best", watched_export)
    monkeypatch.setattr(Outcome, "conclude", watched_conclude)
    at = server.endpoint
    result, _ = run(server, lambda: site(at, "a", 1), lambda: site(at, "b", 3))
    assert result.ok
    assert held == [False] * 4
    assert on_disk == [("a",), ("b",)]
