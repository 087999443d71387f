"""A server that can't write ends, and the sites wait for its restart with what they have trained."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fedcore import protocol
from fedcore._core import CollectorDone, OutputBroken
from fedcore.errors import StorageError
from fedcore.replacing import sync_folder
from fedcore.server.run import Run
from fedcore.server.service import Server
from fedcore.server.storage import files
from fedcore.transport.link import DataEvent

from ..support.runs import run, run_config, site

STEPS = {"a": (1.25, 1), "b": (3.1, 3)}


def models(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "runs/t/models").iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    server = Server(run_config(folder, sites=["a", "b"]))
    sites = [lambda n=n, s=s: site(server.endpoint, n, *s) for n, s in STEPS.items()]
    assert run(server, *sites)[0].ok
    return models(folder)


def full_once_renamed(patch: pytest.MonkeyPatch) -> None:
    """No room for the folder's entry of round 2's model, between its rename and the journal."""
    left = [3]

    def sync(folder: Path) -> None:
        if folder.name == "models":
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        sync_folder(folder)

    patch.setattr(files, "sync_folder", sync)


def full_while_reduced(patch: pytest.MonkeyPatch) -> None:
    """The core says so in place of the last chunk of round 2."""
    handle, left = Run.on_event, [3]

    def hear(taken: Run, event: DataEvent) -> None:
        if isinstance(event, CollectorDone):
            left[0] -= 1
            if left[0] == 0:
                event = OutputBroken(event.collector, "/srv/run: No space left on device")
        handle(taken, event)

    patch.setattr(Run, "on_event", hear)


@pytest.mark.parametrize("fill", [full_once_renamed, full_while_reduced])
def test_sites_are_told_of_a_full_disk_and_the_round_goes_on_once_there_is_room(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    undisturbed: dict[str, bytes],
    fill: Any,
) -> None:
    caplog.set_level(logging.INFO, "fedcore")
    config = run_config(tmp_path, sites=["a", "b"])
    first = Server(config)
    fixed = config.server.model_copy(update={"listen": first.endpoint})
    with ThreadPoolExecutor(3) as pool:
        sites = [pool.submit(site, first.endpoint, n, *s) for n, s in STEPS.items()]
        with monkeypatch.context() as patch:
            fill(patch)
            with pytest.raises(StorageError, match="No space left"):
                first.run()
        assert not any(trained.done() for trained in sites)
        assert "round-0001.safetensors" in models(tmp_path)
        result = Server(config.model_copy(update={"server": fixed})).run()
        assert [trained.result(200) for trained in sites] == [3, 3], "a site trained twice"
    assert (result.ok, result.version) == (True, 3)
    assert models(tmp_path) == undisturbed
    told = [r.getMessage() for r in caplog.records if "has stopped because" in r.getMessage()]
    assert sorted(line[:2] for line in told) == ["a:", "b:"]
    assert all("could not write to its disk" in line for line in told)
    assert not any(str(tmp_path) in line or "/srv" in line for line in told)


def test_sites_wait_for_room_for_the_first_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    undisturbed: dict[str, bytes],
) -> None:
    caplog.set_level(logging.INFO, "fedcore")
    monkeypatch.setattr(protocol, "REPEAT_SECONDS", 0.2)
    asked: list[int] = []
    usage = shutil.disk_usage

    def full_at_first(path: Path) -> Any:
        asked.append(0)
        return usage(path) if len(asked) > 6 else usage(path)._replace(free=9)

    monkeypatch.setattr(shutil, "disk_usage", full_at_first)
    server = Server(run_config(tmp_path, sites=["a", "b"]))
    sites = [lambda n=n, s=s: site(server.endpoint, n, *s) for n, s in STEPS.items()]
    result, trained = run(server, *sites)
    assert (result.ok, trained) == (True, [3, 3])
    assert models(tmp_path) == undisturbed
    for name in STEPS:
        waits = f"the model of {name} has to wait: a model of 20,016 bytes does not fit on the server's disk"
        assert caplog.text.count(waits) == 1
        told = f"{name}: the server's disk has no room for a model of 20,016 bytes; waiting for it"
        assert caplog.text.count(told) == 1
