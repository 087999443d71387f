"""The commands of the page on backup and restore, run in its order on a run folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedcore.config import load_run_file
from fedcore.server.storage.store import Store

from ..support.run_folders import commit, contents

PAGE = Path(__file__).parents[2] / "docs/backup.md"
RUN_FILE = """
[run]
name = "sentiment"
rounds = 9
[participants]
sites = ["a"]
[server]
listen = "tcp://127.0.0.1:0"
insecure = true
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with a run of three models that a server is working on, as far as the commands can tell."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, start in (
        ("python", "-P"),
        ("fedcore", "-P -m fedcore"),
        ("fedcore-server", "-P -m fedcore server"),
    ):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {start} "$@"\n')
        (programs / name).chmod(0o755)
    (tmp_path / "run.toml").write_text(RUN_FILE)
    store = opened(tmp_path)
    for version in range(3):
        commit(store, version)
    store.close()
    return tmp_path


def opened(folder: Path) -> Store:
    config = load_run_file(folder / "run.toml")
    return Store(config.run_folder, config.model_dump(mode="json", exclude={"folder", "simulate"}))


def last_version(folder: Path) -> int | None:
    store = opened(folder)
    try:
        return store.last_version
    finally:
        store.close()


def do(folder: Path, line: str) -> None:
    """Run a line of the page; a server is ended once it listens."""
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    if not line.startswith("fedcore-server"):
        subprocess.run(["sh", "-c", line], cwd=folder, env=env, check=True)
        return
    with subprocess.Popen(
        line.split(), cwd=folder, env=env, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        said = ""
        for text in server.stderr:
            said += text
            if "listening on" in text:
                server.terminate()
        assert "listening on" in said, said


def test_a_run_is_saved_restored_and_brought_back_as_the_page_says(here: Path) -> None:
    run = here / "runs" / "sentiment"
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    stopped, working, restore, one, back, undo = blocks
    for line in (stopped + working).splitlines():
        do(here, line)
    store = opened(here)
    commit(store, 3)  # between the copy of the journal and that of the models
    store.close()
    (here / "backup/working/models/round-0003.safetensors").write_bytes(
        (run / "models/round-0003.safetensors").read_bytes()
    )
    (run / "run.sqlite").write_bytes(b"")
    lost = contents(run)
    for line in restore.splitlines():
        do(here, line)
    assert last_version(here) == 2
    assert contents(here / "runs" / "damaged") == lost
    assert "discarded-1/models/round-0003.safetensors" in contents(run)

    (run / "models/round-0002.safetensors").write_bytes(b"damaged")
    for line in one.splitlines():
        do(here, line)
    (run / "discarded-1").rename(here / "old")
    for line in back.splitlines():
        do(here, line)
    assert last_version(here) == 1
    for line in undo.splitlines():
        do(here, line)
    assert last_version(here) == 2
