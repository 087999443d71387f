"""A version's states are committed, compared, kept, removed and moved away with its model."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcore.errors import IntegrityError
from fedcore.server.storage.store import Store

from ..support.run_folders import LAYOUT, SETTINGS, commit, contents, flip

STATES = ("master", "momentum")


def run_with_states(folder: Path, last: int) -> Store:
    """A run folder whose versions after the first have states."""
    store = Store(folder, SETTINGS)
    commit(store, 0)
    for version in range(1, last + 1):
        commit(store, version, states=STATES)
    return store


def state_files(store: Store) -> list[str]:
    return sorted(path.name for path in store.models.iterdir() if path.name.count(".") == 2)


def test_states_are_kept_for_the_last_version_alone(tmp_path: Path) -> None:
    store = run_with_states(tmp_path, 3)
    assert state_files(store) == [f"round-0003.{state}.safetensors" for state in STATES]
    assert [sorted(store.states(version)) for version in range(4)] == [[], [], [], list(STATES)]
    assert store.missing() == []
    store.verify_states(3)
    commit(store, 4)  # without any: those of the version before go, too
    assert state_files(store) == []
    store.close()


def test_a_state_that_was_changed_or_is_missing_is_named(tmp_path: Path) -> None:
    store = run_with_states(tmp_path, 1)
    flip(store.state_path(1, "master"))
    with pytest.raises(IntegrityError, match=r"round-0001\.master\.safetensors is not the file"):
        store.verify_states(1)
    store.state_path(1, "master").unlink()
    with pytest.raises(IntegrityError, match=r"round-0001\.master\.safetensors is missing"):
        store.verify_states(1)
    store.close()


def test_a_start_removes_outdated_states_that_a_killed_server_left(tmp_path: Path) -> None:
    store = run_with_states(tmp_path, 1)
    outdated = store.state_path(1, "momentum")
    data = outdated.read_bytes()
    commit(store, 2, states=STATES)
    store.close()
    outdated.write_bytes(data)
    store = Store(tmp_path, SETTINGS)
    assert state_files(store) == [f"round-0002.{state}.safetensors" for state in STATES]
    store.close()


def test_a_state_that_no_row_lists_is_named_and_never_touched(tmp_path: Path) -> None:
    store = run_with_states(tmp_path, 1)
    foreign = store.state_path(7, "momentum")
    foreign.write_bytes(b"x")
    store.close()
    with pytest.raises(IntegrityError, match=r"round-0007\.momentum\.safetensors"):
        Store(tmp_path, SETTINGS)
    assert foreign.read_bytes() == b"x"


def test_a_run_that_goes_back_leaves_its_states_and_the_journal_says_so(tmp_path: Path) -> None:
    store = run_with_states(tmp_path, 3)
    before = contents(tmp_path)
    aside = store.roll_back(2)
    assert (store.states(2), store.left_states, state_files(store)) == ({}, [2], [])
    moved = contents(aside)
    assert {name for name in moved if name.startswith("models/")} == {
        name for name in before if "round-0003" in name
    }
    assert store.roll_back(1) != aside
    assert store.left_states == [1]
    commit(store, 2, states=STATES)
    assert sorted(store.states(2)) == list(STATES)
    store.close()


def test_states_that_are_no_longer_written_are_no_longer_expected(tmp_path: Path) -> None:
    store = run_with_states(tmp_path, 1)  # its commit lists the next version with states
    store.announce(2, LAYOUT.total_bytes)
    commit(store, 2)
    assert state_files(store) == []
    store.close()
    Store(tmp_path, SETTINGS).close()
