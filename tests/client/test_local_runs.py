"""A script is tested against a server in its own process: the same bytes as over TCP, and no socket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import zmq
from safetensors.numpy import load_file

import fedcore.client as fl
from fedcore.client.testing import local_run
from fedcore.errors import ConfigError, StorageError, TransferTimeout
from fedcore.server.service import Server
from fedcore.server.storage.store import Store
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.local import LocalNetwork

from ..support.runs import run, run_config, site, writer


def script() -> int:
    """Add 1 in each round, as a user's training script would."""
    fl.init({"w": np.zeros(300_000, np.float32)})
    rounds = 0
    while fl.is_running():
        model = fl.receive()
        if fl.is_train():
            model = {name: value + np.float32(1) for name, value in model.items()}
            rounds += 1
        fl.send(model, weight=5, metrics={"loss": 1.0})
    return rounds


def test_a_script_is_tested_against_a_server_without_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zmq.Context, "socket", lambda *_: pytest.fail("a socket"))
    with local_run(tmp_path) as local:
        assert script() == 2
        assert local.result().ok
    final = load_file(local.folder / "final/model.safetensors")
    assert final["w"].tolist() == [2.0] * 300_000


def test_a_script_that_fails_leaves_no_session_behind(tmp_path: Path) -> None:
    def fails() -> None:
        fl.init({"w": np.zeros(4, np.float32)})
        assert fl.is_running()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), local_run(tmp_path):
        fails()
    with local_run(tmp_path / "next") as local:
        with pytest.raises(ConfigError, match="has a session already"), local_run(tmp_path / "two"):
            pass
        fl.init({"w": np.zeros(4, np.float32)})
        while fl.is_running():
            fl.send(fl.receive(), weight=1)
        assert local.result().ok


def test_a_server_that_fails_ends_the_script_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcore.client.testing.SILENCE", 0.5)

    def full(*_: object, **__: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(Store, "commit", full)
    with local_run(tmp_path) as local:
        with pytest.raises(TransferTimeout):
            script()
        with pytest.raises(StorageError, match="the disk is full"):
            local.result()


def take_part(network: LocalNetwork, name: str, step: float, weight: int) -> None:
    settings = SiteSettings("local", name)
    with closing(Session(settings, network.dial)) as session:
        while session.is_running():
            specs = [("w", "F32", [5000]), ("n", "I64", [2])]
            model = session.begin(specs, {"config.json": "{}"}, writer(0))
            value = float(np.frombuffer(model.tensors["w"], np.float32)[0])
            session.score({"loss": abs(value - 4)}, weight)
            if model.kind == "evaluate":
                session.end_task()
            else:
                session.submit(writer(value + step), weight)


@pytest.mark.parametrize("restarts", [False, True])
def test_a_run_in_memory_ends_with_the_bytes_of_one_over_tcp(
    tmp_path: Path, restarts: bool
) -> None:
    server = Server(run_config(tmp_path / "tcp", sites=["a", "b"]))
    at = server.endpoint
    run(server, lambda: site(at, "a", 1, 1), lambda: site(at, "b", 3, 3))
    config = run_config(tmp_path / "memory", sites=["a", "b"])
    with closing(LocalNetwork()) as network, ThreadPoolExecutor(3) as pool:
        server = Server(config, link=network.server())
        result = pool.submit(server.run)
        sites = [pool.submit(take_part, network, *s) for s in (("a", 1, 1), ("b", 3, 3))]
        if restarts:
            server.interrupt("a test")
            assert result.result(200).ending == "interrupted"
            result = pool.submit(Server(config, link=network.server()).run)
        assert result.result(200).ok
        for done in sites:
            done.result(200)
    for name in ("best", "final"):
        file = f"runs/t/{name}/model.safetensors"
        assert (tmp_path / "memory" / file).read_bytes() == (tmp_path / "tcp" / file).read_bytes()


def test_the_next_run_of_a_process_has_a_trainer_of_its_own(tmp_path: Path) -> None:
    from fedcore.client.torch import current_site

    sites = []
    for name in ("one", "two"):
        with local_run(tmp_path / name):
            sites.append(current_site())
            sites[-1].claim(object())
    assert sites[0] is not sites[1]
