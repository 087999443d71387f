"""A commit that dies, is torn or fails at any call that changes a file leaves the old version or the new one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fedcore.server.service import Server
from fedcore.server.storage.store import Store

from ..support.runs import run, run_config, site

DIED, REFUSED = 99, 98


@pytest.fixture(scope="module")
def failing_calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C++ compiler")
    library = tmp_path_factory.mktemp("failing") / "failing_calls.so"
    source = Path(__file__).parents[1] / "cpp" / "failing_calls.cpp"
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


def every_call(
    library: Path, folder: Path, mode: str, driver: str = "journal_driver.py"
) -> list[dict[str, Any]]:
    """Do a driver's work once for each call that goes wrong; what came of it, call by call."""
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            str(Path(__file__).with_name(driver)),
            str(folder),
            mode,
        ],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def every_call_of_a_commit(library: Path, folder: Path, mode: str) -> list[dict[str, Any]]:
    found = every_call(library, folder, mode)
    assert {"rename", "fsync", "pwrite", "fallocate"} <= {attempt["call"] for attempt in found}
    return found


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("d", id="before the call"),
        pytest.param("t", id="in its middle", marks=pytest.mark.slow),
    ],
)
def test_a_server_killed_at_any_write_or_rename_leaves_the_old_version_or_the_new(
    failing_calls: Path, tmp_path: Path, mode: str
) -> None:
    found = every_call_of_a_commit(failing_calls, tmp_path, mode)
    assert {attempt["code"] for attempt in found} == {DIED}
    stages = [
        (a["version"], a["exports"]["final"], a["exports"]["best"], a["summary"]) for a in found
    ]
    assert stages[0] == (0, 0, 0, 0)
    assert stages[-1] == (1, 1, 1, 1)
    assert all(a <= b for a, b in pairwise(stages)), "what was committed went away again"


def test_a_disk_that_is_full_at_any_call_is_named_and_costs_no_committed_version(
    failing_calls: Path, tmp_path: Path
) -> None:
    found = every_call_of_a_commit(failing_calls, tmp_path, "e")
    assert {attempt["code"] for attempt in found} == {0, REFUSED}, [
        attempt for attempt in found if attempt["code"] not in (0, REFUSED)
    ]
    refused = [attempt for attempt in found if attempt["code"] == REFUSED]
    for attempt in refused:
        assert str(tmp_path / "run") in attempt["said"]
        assert "remove the folder" not in attempt["said"]
    assert any(".round-0001.partial: No space left" in attempt["said"] for attempt in refused)
    assert any("run.sqlite: database or disk is full" in attempt["said"] for attempt in refused)


@pytest.mark.slow
def test_a_short_write_is_completed(failing_calls: Path, tmp_path: Path) -> None:
    for attempt in every_call_of_a_commit(failing_calls, tmp_path, "s"):
        assert (attempt["code"], attempt["version"]) == (0, 1), attempt


@pytest.mark.parametrize(
    ("mode", "codes"),
    [("d", {DIED}), ("t", {DIED}), ("e", {0, REFUSED}), ("s", {0})],
    ids=["killed before", "killed in the middle", "no space", "short write"],
)
def test_whatever_happens_to_a_call_on_the_spill_file_the_model_has_its_bytes_in_the_end(
    failing_calls: Path, tmp_path: Path, mode: str, codes: set[int]
) -> None:
    found = every_call(failing_calls, tmp_path, mode, "spill_driver.py")
    assert {attempt["code"] for attempt in found} == codes, [
        attempt for attempt in found if attempt["code"] not in codes
    ]
    spilled = 2 * 8  # a slot's bytes and its entry, of what a is ahead with at the least
    assert [attempt["call"] for attempt in found].count("pwrite") > 2 * 12 + spilled


@pytest.mark.parametrize(
    ("mode", "codes"),
    [
        ("d", {DIED}),
        pytest.param("t", {DIED}, marks=pytest.mark.slow),
        pytest.param("e", {0, REFUSED}, marks=pytest.mark.slow),
    ],
    ids=["killed before", "killed in the middle", "no space"],
)
def test_a_server_killed_at_any_write_of_a_surveyed_round_ends_it_with_the_same_bytes(
    failing_calls: Path, tmp_path: Path, mode: str, codes: set[int]
) -> None:
    found = every_call(failing_calls, tmp_path, mode, "survey_driver.py")
    assert {attempt["code"] for attempt in found} == codes, [
        attempt for attempt in found if attempt["code"] not in codes
    ]
    decided = [attempt["decided"] for attempt in found]
    assert decided[-1]
    if codes == {DIED}:
        assert not decided[0]
        assert decided == sorted(decided), "what was decided went away again"


def test_a_run_is_finished_only_once_all_that_it_leaves_behind_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(run_config(tmp_path, sites=["a"], rounds=1))
    at_the_end: list[tuple[int, int, int, bool]] = []
    end = Store.end

    def look(store: Store, *, finished: bool) -> None:
        exports = [
            json.loads((store.folder / n / "fedcore.json").read_text()) for n in ("final", "best")
        ]
        summary = json.loads((store.folder / "summary.json").read_text())
        at_the_end.append((*(e["version"] for e in exports), summary["version"], finished))
        end(store, finished=finished)

    monkeypatch.setattr(Store, "end", look)
    assert run(server, lambda: site(server.endpoint, "a", 4))[0].ok
    assert at_the_end == [(1, 1, 1, True)]
    assert json.loads((tmp_path / "runs/t/summary.json").read_text())["versions"][1]["sha256"]
