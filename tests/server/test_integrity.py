"""Nothing that was committed is lost, and nothing that was changed since is used."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from fedcore._core import SetDamaged
from fedcore.config import parse_run
from fedcore.errors import BusyError, ConfigError, IntegrityError, StorageError
from fedcore.model_file import open_model
from fedcore.server.collection import Collection
from fedcore.server.outcome import Ending, Outcome
from fedcore.server.rounds.actions import Commit
from fedcore.server.rounds.participation import Roster
from fedcore.server.service import Server
from fedcore.server.storage.files import Files
from fedcore.server.storage.journal import Journal
from fedcore.server.storage.store import Store

from ..support.run_folders import SETTINGS, commit, contents, flip, run_of, values

JOURNAL = "run.sqlite"


def removed(folder: Path) -> None:
    for path in folder.glob("run.sqlite*"):
        path.unlink()


def emptied(folder: Path) -> None:
    (folder / JOURNAL).write_bytes(b"")


def older(folder: Path) -> None:
    """A copy of the journal from before the last two versions."""
    before = run_of(folder.parent / "before", 3.0)
    with sqlite3.connect(before / JOURNAL) as db:
        db.execute("ATTACH ? AS now", (str(folder / JOURNAL),))
        db.execute("INSERT OR REPLACE INTO meta SELECT * FROM now.meta WHERE key = 'run_id'")
    db.close()
    shutil.copyfile(before / JOURNAL, folder / JOURNAL)
    shutil.rmtree(before)


@pytest.mark.parametrize("lose", [removed, emptied, older])
def test_models_that_the_journal_does_not_know_stop_the_start_and_stay(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    folder = run_of(tmp_path / "run", 3.0, 2.0, 1.0)
    lose(folder)
    before = contents(folder)
    with pytest.raises(IntegrityError, match=r"round-0002\.safetensors.*--discard") as refused:
        Store(folder, SETTINGS)
    assert "Put back the run.sqlite" in str(refused.value)
    assert contents(folder) == before


@pytest.mark.parametrize("lose", [removed, emptied, older])
def test_what_is_discarded_is_moved_and_the_run_has_another_id(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    folder = run_of(tmp_path / "run", 3.0, 2.0, 1.0)
    run_id = json.loads((folder / "best" / "fedcore.json").read_text())["run_id"]
    models = {name: data for name, data in contents(folder).items() if "round-" in name}
    lose(folder)
    store = Store(folder, SETTINGS, discard=True)
    try:
        assert store.last_version == (0 if lose is older else None)
        assert store.run_id != run_id, "what sites kept of the lost versions would count"
        commit(store, (store.last_version or 0) + 1 if lose is older else 0)
    finally:
        store.close()
    after = contents(folder)
    for name, data in models.items():
        kept = lose is older and name.endswith("round-0000.safetensors")
        assert after[name if kept else f"discarded-1/{name}"] == data
    assert not (folder / "best").exists()
    assert after["discarded-1/best/model.safetensors"] == models["models/round-0002.safetensors"]
    Store(folder, SETTINGS).close()


def test_a_model_that_was_committed_after_the_journal_was_copied_is_not_lost(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    store = Store(folder, SETTINGS)
    commit(store, 0)
    store.announce(1, 2400)
    shutil.copyfile(folder / JOURNAL, tmp_path / JOURNAL)
    commit(store, 1)
    store.close()
    shutil.copyfile(tmp_path / JOURNAL, folder / JOURNAL)
    before = contents(folder)
    with pytest.raises(IntegrityError, match=r"holds models/round-0001\.safetensors,"):
        Store(folder, SETTINGS)
    assert contents(folder) == before
    store = Store(folder, SETTINGS, discard=True)
    try:
        commit(store, 1)
    finally:
        store.close()


def test_half_a_model_that_was_not_committed_is_moved_away_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_of(tmp_path / "run", 3.0)
    (folder / "models" / "round-0001.safetensors").write_bytes(b"half a commit")
    store = Store(folder, SETTINGS)
    try:
        commit(store, 1)
    finally:
        store.close()
    assert (folder / "discarded-1/models/round-0001.safetensors").read_bytes() == b"half a commit"
    assert any("round-0001.safetensors, which was not committed" in m for m in caplog.messages)


@pytest.mark.parametrize("version", [0, 1])
def test_a_crash_in_a_commit_without_a_record_costs_a_round_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    folder = tmp_path / "run"
    store = Store(folder, SETTINGS)
    if version:
        commit(store, 0)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Files, "mark", crash)
        with pytest.raises(KeyboardInterrupt):
            commit(store, version)
    store.close()
    store = Store(folder, SETTINGS)
    try:
        store.clear(version)
        commit(store, version)
        assert store.last_version == version
    finally:
        store.close()
    assert not list(folder.glob("discarded-*"))


@pytest.mark.parametrize(
    "name", ["best", "final", ".best-new", ".final-old", "models/.round-0004.partial"]
)
def test_what_no_row_lists_is_named_and_never_touched(tmp_path: Path, name: str) -> None:
    folder = run_of(tmp_path / "run", 3.0, 2.0)
    shutil.rmtree(folder / "best")
    (folder / name).mkdir()
    (folder / name / "thesis.txt").write_text("years of work")
    with pytest.raises(IntegrityError, match=name.replace(".", r"\.")):
        Store(folder, SETTINGS)
    assert (folder / name / "thesis.txt").read_text() == "years of work"


def test_a_folder_of_another_run_is_never_replaced(tmp_path: Path) -> None:
    other = run_of(tmp_path / "other", 3.0)
    folder = run_of(tmp_path / "run", 3.0)
    store = Store(folder, SETTINGS)
    try:
        shutil.copytree(other / "best", folder / "final")
        with pytest.raises(IntegrityError, match="final is not of this run"):
            store.export("final", 0)
        assert contents(folder / "final") == contents(other / "best")
    finally:
        store.close()
    with pytest.raises(IntegrityError, match="holds final,"):
        Store(folder, SETTINGS)


def test_what_somebody_adds_to_an_exported_folder_stays_in_it(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", 3.0)
    (folder / "best" / "tokenizer.json").write_text("{}")
    store = Store(folder, SETTINGS)
    try:
        commit(store, 1)
        store.export("best", 1)
    finally:
        store.close()
    assert json.loads((folder / "best" / "fedcore.json").read_text())["version"] == 1
    assert (folder / "best" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("links", [True, False])
def test_a_program_that_writes_into_best_cannot_change_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError))
    folder = run_of(tmp_path / "run", 3.0)
    exported, committed = (
        folder / "best/model.safetensors",
        folder / "models/round-0000.safetensors",
    )
    shared = exported.samefile(committed)
    assert shared is links
    writable = exported.stat().st_mode & 0o222
    assert bool(writable) is not links, "what it shares is read-only; a copy is the user's own"


def test_the_journals_file_is_whole_by_itself_after_each_transaction(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", SETTINGS)
    try:
        for version in range(3):
            commit(store, version, 1.0)
            copy = tmp_path / f"{version}.sqlite"
            shutil.copyfile(tmp_path / "run" / JOURNAL, copy)
            with sqlite3.connect(copy) as db:
                assert db.execute("SELECT MAX(version) FROM scores").fetchone() == (version,)
                assert db.execute("SELECT MAX(version) FROM versions").fetchone() == (version,)
            db.close()
        beside = [p.name for p in (tmp_path / "run").glob("run.sqlite-*") if p.stat().st_size]
        assert beside == []
    finally:
        store.close()


def of_format_2(folder: Path) -> sqlite3.Connection:
    """Turn a run folder into one of the format before, whose journal had a write-ahead log; it is still open."""
    db = sqlite3.connect(folder / JOURNAL, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA wal_autocheckpoint=0")
    rows = db.execute("SELECT * FROM versions").fetchall()
    for statement in (
        "DROP TABLE paths", "DELETE FROM versions", "UPDATE meta SET value = '2' WHERE key = 'schema'",
    ):  # fmt: skip
        db.execute(statement)
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.executemany("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?)", rows)
    return db


def copied(folder: Path, *, log: Callable[[bytes], bytes] | None) -> Path:
    """Copy a folder of format 2 as a killed server leaves it; ``log`` changes the write-ahead log."""
    db = of_format_2(folder)
    target = folder.with_name("copy")
    shutil.copytree(folder, target)
    db.close()
    (target / "run.sqlite-shm").unlink(missing_ok=True)
    wal = target / "run.sqlite-wal"
    if log is None:
        wal.unlink()
    else:
        wal.write_bytes(log(wal.read_bytes()))
    return target


def test_a_run_folder_of_the_format_before_is_taken_up(tmp_path: Path) -> None:
    folder = copied(run_of(tmp_path / "run", 3.0, 2.0), log=lambda data: data)
    (folder / "models" / ".round-0001.progress").write_bytes(b"left by a crash")
    before = {name: data for name, data in contents(folder).items() if name.endswith("safetensors")}
    store = Store(folder, SETTINGS)
    try:
        assert store.last_version == 1
        store.export("best", 1)
        commit(store, 2)
    finally:
        store.close()
    after = contents(folder)
    assert before.items() <= after.items()
    assert not list(folder.glob("*-wal"))
    assert not (folder / "models" / ".round-0001.progress").exists()


@pytest.mark.parametrize(
    "log",
    [None, lambda data: data[: len(data) // 2], lambda data: data[:40] + b"\xff" * 8 + data[48:]],
    ids=["missing", "cut", "overwritten"],
)
def test_a_write_ahead_log_of_that_format_that_is_damaged_costs_no_model(
    tmp_path: Path, log: Callable[[bytes], bytes] | None
) -> None:
    folder = copied(run_of(tmp_path / "run", 3.0, 2.0, 1.0), log=log)
    before = {name: data for name, data in contents(folder).items() if "round-" in name}
    with pytest.raises(IntegrityError, match=r"round-000\d\.safetensors"):
        Store(folder, SETTINGS)
    assert before.items() <= contents(folder).items()


def test_a_run_folder_of_a_later_format_names_both_versions(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", 3.0)
    with sqlite3.connect(folder / JOURNAL) as db:
        db.execute("UPDATE meta SET value = '9' WHERE key = 'schema'")
        db.execute("UPDATE meta SET value = '7.1' WHERE key = 'fedcore'")
    db.close()
    before = contents(folder)
    with pytest.raises(
        ConfigError, match=r"format 9, written by fedcore 7\.1.*reads formats 2 and 3"
    ):
        Store(folder, SETTINGS)
    assert contents(folder) == before


def test_a_journal_without_the_runs_id_is_named_with_what_to_do(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", 3.0)
    with sqlite3.connect(folder / JOURNAL) as db:
        db.execute("DELETE FROM meta WHERE key = 'run_id'")
    db.close()
    before = contents(folder)
    with pytest.raises(IntegrityError, match=r"run\.sqlite.* no row run_id.*from a backup"):
        Store(folder, SETTINGS)
    assert contents(folder) == before


def test_a_lock_file_that_was_removed_lets_no_second_server_in(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", SETTINGS)
    try:
        (tmp_path / "run" / ".lock").unlink()
        with pytest.raises(BusyError, match="in use by another server"):
            Store(tmp_path / "run", SETTINGS)
    finally:
        store.close()
    Store(tmp_path / "run", SETTINGS).close()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_named_with_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fails(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fails)
    name = errno.errorcode[code]
    with pytest.raises(StorageError, match=rf"{name}.*file system of type (?!unknown)\w+"):
        Store(tmp_path / "run", SETTINGS)


def test_a_journal_that_another_process_has_locked_is_waited_for_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(tmp_path / JOURNAL, busy_seconds=0.01)
    other = sqlite3.connect(tmp_path / JOURNAL, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    class LetGo(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "locked" in record.getMessage():
                other.execute("ROLLBACK")

    handler = LetGo()
    logging.getLogger("fedcore.server").addHandler(handler)
    try:
        with journal.transaction():
            journal.set_meta("key", "value")
        assert journal.meta("key") == "value"
    finally:
        logging.getLogger("fedcore.server").removeHandler(handler)
        other.close()
        journal.close()
    assert [str(tmp_path / JOURNAL) in line for line in caplog.messages].count(True) >= 1


def test_a_journal_that_is_removed_under_a_server_is_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "run", SETTINGS)
    try:
        commit(store, 0)
        (tmp_path / "run" / JOURNAL).unlink()
        commit(store, 1)
    finally:
        store.close()
    assert any("was removed while the server works on it" in line for line in caplog.messages)
    again = Store(tmp_path / "run", SETTINGS)
    assert again.last_version == 1
    again.close()


def test_a_journal_that_is_replaced_under_a_server_is_not_written_to(tmp_path: Path) -> None:
    other = run_of(tmp_path / "other", 3.0)
    store = Store(tmp_path / "run", SETTINGS)
    try:
        commit(store, 0)
        (other / JOURNAL).rename(tmp_path / "run" / JOURNAL)
        with pytest.raises(IntegrityError, match="was replaced"):
            commit(store, 1)
    finally:
        store.close()


# --- what is used is what was committed ---


def outcome_of(folder: Path) -> tuple[Store, Outcome]:
    config = parse_run(
        {
            "run": {"name": "t", "rounds": 9},
            "participants": {"sites": ["a"]},
            "selection": {"metric": "loss", "mode": "min"},
            "server": {"insecure": True},
        },
        folder=folder,
    )
    store = Store(folder, SETTINGS)
    return store, Outcome(config, store, Roster(["a"], None))


def test_a_best_model_that_was_changed_is_not_exported_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_of(tmp_path / "run", 3.0, 1.0, 2.0)
    flip(folder / "models" / "round-0001.safetensors")
    store, outcome = outcome_of(folder)
    try:
        assert outcome.export_best() is None
        assert any("round-0001.safetensors is not the file" in line for line in caplog.messages)
        with pytest.raises(
            IntegrityError, match=r"round-0001\.safetensors is not the file.*remove it"
        ):
            outcome.conclude("complete", "")
        assert (folder / "best" / "model.safetensors").read_bytes()[-2400:] == values(2)
        store.path(1).unlink()
        result = outcome.conclude("complete", "")
        assert (result.best_version, result.version) == (2, 2)
    finally:
        store.close()


def test_a_best_model_that_changes_after_its_export_is_found_at_the_end(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", 3.0, 1.0, 2.0)
    store, outcome = outcome_of(folder)
    try:
        assert outcome.export_best() == 1
        flip(store.path(1))
        with pytest.raises(IntegrityError, match=r"round-0001\.safetensors is not the file"):
            outcome.conclude("complete", "")
    finally:
        store.close()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ending", ["stopped", "failed"])
def test_a_run_that_is_stopped_or_failed_ends_in_order_with_a_damaged_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, version: int, ending: Ending
) -> None:
    folder = run_of(tmp_path / "run", 3.0, 1.0, 2.0)
    flip(folder / "models" / f"round-{version:04d}.safetensors")
    store, outcome = outcome_of(folder)
    try:
        result = outcome.conclude(ending, "")
        assert (result.best_version, result.version) == (1, 2)
        assert (result.best is None, result.final is None) == (version == 1, version == 2)
        assert any(f"round-000{version}.safetensors is not the file" in m for m in caplog.messages)
    finally:
        store.close()


def run_file(folder: Path, **run: Any) -> Any:
    return parse_run(
        {
            "run": {"name": "t", **run},
            "participants": {"sites": ["a"]},
            "server": {"listen": "tcp://127.0.0.1:0", "insecure": True},
        },
        folder=folder,
    )


def test_a_last_model_that_is_missing_is_named_with_the_way_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = run_file(tmp_path, rounds=9)
    store = Store(config.run_folder, config.model_dump(mode="json", exclude={"folder", "simulate"}))
    for version in range(3):
        commit(store, version)
    store.path(2).unlink()
    store.close()
    with pytest.raises(
        IntegrityError, match=r"round-0002\.safetensors is missing.*backup.*rollback \S+ 1"
    ):
        Server(config).run()
    assert not any("goes on once" in line for line in caplog.messages)


# --- going back ---


def test_a_run_goes_back_to_a_round_and_forward_again(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", 3.0, 2.0, 1.0)
    before = contents(folder)
    store = Store(folder, None)
    run_id = store.run_id
    aside = store.roll_back(1)
    assert (store.last_version, sorted(store.scores()), store.run_id == run_id) == (
        1,
        [0, 1],
        False,
    )
    store.close()
    moved = contents(aside)
    assert not (folder / "best").exists()
    kept = {name for name in before if "round-0002" not in name and not name.startswith("best/")}
    assert {name for name in contents(folder) if not name.startswith(aside.name)} == kept
    assert moved == {
        name: data for name, data in before.items() if name not in kept or name == JOURNAL
    }

    store = Store(folder, SETTINGS)
    commit(store, 2)
    store.export("best", 0)
    store.close()
    shutil.copytree(aside, folder, dirs_exist_ok=True)
    store = Store(folder, SETTINGS)
    assert (store.last_version, store.run_id) == (2, run_id)
    store.close()


@pytest.mark.parametrize(
    ("version", "text"), [(3, "no model of round 3"), (2, "at round 2 already")]
)
def test_a_round_that_cannot_be_gone_back_to_is_named(
    tmp_path: Path, version: int, text: str
) -> None:
    store = Store(run_of(tmp_path / "run", 3.0, 2.0, 1.0), None)
    try:
        with pytest.raises(ConfigError, match=text):
            store.roll_back(version)
        flip(store.path(0))
        with pytest.raises(IntegrityError, match=r"round-0000\.safetensors is not the file"):
            store.roll_back(0)
        assert store.last_version == 2
    finally:
        store.close()


def test_a_server_killed_while_it_goes_back_has_gone_back_once_it_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_of(tmp_path / "run", 3.0, 2.0, 1.0)
    store = Store(folder, None)
    with monkeypatch.context() as patch:
        patch.setattr(Files, "finish_leaving", lambda _: None)
        aside = store.roll_back(0)
    store.close()
    store = Store(folder, SETTINGS)
    assert store.last_version == 0
    store.close()
    assert {
        "models/round-0001.safetensors",
        "models/round-0002.safetensors",
        "best/fedcore.json",
    } <= set(contents(aside))


def test_a_model_that_changes_while_it_is_served_ends_the_server_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_file(tmp_path, rounds=9)
    store = Store(config.run_folder, config.model_dump(mode="json", exclude={"folder", "simulate"}))
    for version in range(2):
        commit(store, version)
    store.close()
    server = Server(config)
    changed = "round-0001.safetensors has changed while it was served"
    events = iter([SetDamaged(b"s" * 16, changed)])
    monkeypatch.setattr(server.link, "recv", lambda _: next(events))
    with pytest.raises(IntegrityError, match=r"has changed while it was served.*rollback \S+ 0"):
        server.run()


def test_a_model_that_shrank_under_a_collection_is_named_as_it_was_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_file(tmp_path, rounds=9)
    store = Store(config.run_folder, config.model_dump(mode="json", exclude={"folder", "simulate"}))
    for version in range(2):
        commit(store, version)
    store.close()
    server = Server(config)

    def shrinks() -> None:
        # The model that a server has committed itself is known to the core by its scratch name.
        path, scratch = server.runs[0].store.path(1), server.runs[0].store.scratch(1)
        path.rename(scratch)
        base = open_model(scratch)
        scratch.rename(path)
        os.truncate(path, 0)
        bytes(base.file.view())
        running = Mock(check_base=lambda: Collection.check_base(Mock(_base=base)))
        server.runs[0].collecting.running = running
        server.runs[0].acting.commit(Commit(2, ()))

    monkeypatch.setattr(server, "step", shrinks)
    with pytest.raises(IntegrityError, match=r"models/round-0001\.safetensors became.*rollback"):
        server.run()
