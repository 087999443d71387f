"""Many virtual sites in one thread take part in a run as so many processes would."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedcore import protocol
from fedcore._core import Layout
from fedcore.encoding import EncodedUpdate, UpdateEncoder
from fedcore.errors import ConfigError, ProtocolError, RefusedError
from fedcore.model_file import ModelFile, create_model
from fedcore.security.keys import Credentials, KeyPair, Role, load_kit
from fedcore.security.provision import Project, Provisioned, provision
from fedcore.server.service import Server
from fedcore.site import outputs as out
from fedcore.site.fleet import Fleet, Trained
from fedcore.transport.link import ServerLink

from ..support import stage
from ..support.runs import run_config
from ..support.secured_runs import server_of
from ..support.stage import Stage

LAYOUT = Layout([("w", "F32", [16_384])])
SECONDS = 200


class Adding:
    """Adds its number to each value, and scores how far a model is from zero."""

    def __init__(self, number: int) -> None:
        self.number = number

    def train(self, task: protocol.Task, model: ModelFile | None) -> Trained:
        before = 0.0 if model is None else value(model)
        file = create_model(None, LAYOUT)
        step = 0 if task.kind == "initial" else self.number
        file.fill(lambda _: np.full(16_384, before + step, np.float32).tobytes())
        return Trained(EncodedUpdate.raw(file), weight=self.number)

    def score(self, task: protocol.Task, model: ModelFile) -> protocol.Score | None:
        return protocol.Score(version=task.version, metrics={"loss": value(model)}, examples=1)


class Silent(Adding):
    """Scores nothing."""

    def score(self, *_: object) -> None:
        return None


class Encoding(Silent):
    """Encodes its updates, with a bound on their norm unless that is 0."""

    def __init__(self, number: int, encoding: str, norm: float, layout: Layout = LAYOUT) -> None:
        super().__init__(number)
        stages = [("clip", {"norm": norm})] if norm else []
        self._layout = layout
        self._encoder = UpdateEncoder(layout, encoding, stages=stages)

    def train(self, task: protocol.Task, model: ModelFile | None) -> Trained:
        if model is None:
            return super().train(task, model)
        file = create_model(None, self._layout)
        sizes = {name: nbytes // 4 for name, _, _, _, nbytes in self._layout.tensors}
        values = value(model) + self.number
        file.fill(lambda name: np.full(sizes[name], values, np.float32).tobytes())
        update = self._encoder.encode(
            task.round, file.file, file.data_offset, model.file, model.data_offset
        )
        return Trained(update, weight=self.number)


def value(model: ModelFile) -> float:
    values = np.frombuffer(model.view(model.layout.tensors[0][0]), np.float32)
    assert (values == values[0]).all()
    return float(values[0])


@contextmanager
def serving(server: Server) -> Iterator[None]:
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(server.run)
        try:
            yield
            assert result.result(SECONDS).ok
        finally:
            server.stop()


def drive(fleet: Fleet) -> None:
    until = time.monotonic() + SECONDS
    while fleet.running:
        fleet.step()
        assert time.monotonic() < until, "the run does not end"
    fleet.close()


def test_fifty_machines_in_one_thread_give_the_exact_mean(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(1, 51)]
    start = create_model(tmp_path / "start.safetensors", LAYOUT)
    start.file.sync()
    config = run_config(tmp_path, sites=names, rounds=1)
    model = config.model.model_copy(update={"initial": "start.safetensors"})
    server = Server(config.model_copy(update={"model": model}))
    events: Counter[str] = Counter()
    trainers = {name: Silent(number) for number, name in enumerate(names, 1)}
    with serving(server):
        fleet = Fleet(
            server.endpoint,
            LAYOUT,
            trainers,
            lambda _, event: events.update([type(event).__name__]),
        )
        drive(fleet)
    steps = sum(n * n for n in range(1, 51)) / sum(range(1, 51))
    final = load_file(tmp_path / "runs/t/final/model.safetensors")["w"]
    assert (final == np.float32(steps)).all()
    assert events["Joined"] == events["Finished"] == 50
    assert events["Committed"] >= 50


def test_virtual_sites_go_on_with_a_server_that_is_started_again(tmp_path: Path) -> None:
    config = run_config(tmp_path, sites=["s1", "s2"], rounds=3, idle_timeout="20s")
    server = Server(config)
    committed: Counter[int] = Counter()

    def listen(_: str, event: out.Event) -> None:
        if isinstance(event, out.Committed):
            committed[event.commit.version] += 1

    fleet = Fleet(server.endpoint, LAYOUT, {"s1": Adding(1), "s2": Adding(2)}, listen)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.run)
        until = time.monotonic() + SECONDS
        while not committed[1]:
            fleet.step()
            assert time.monotonic() < until
        server.interrupt("a test")
        first.result(SECONDS)
    there = config.server.model_copy(update={"listen": server.endpoint})
    with serving(Server(config.model_copy(update={"server": there}))):
        drive(fleet)
    final = load_file(tmp_path / "runs/t/final/model.safetensors")["w"]
    assert np.allclose(final, 3 * 5 / 3)


def encoded_run(tmp_path: Path, encoding: str) -> Server:
    config = run_config(tmp_path, sites=["s1", "s2"], rounds=2)
    transfer = config.transfer.model_copy(update={"update": encoding})
    return Server(config.model_copy(update={"transfer": transfer}))


@pytest.mark.parametrize("encoding", ["raw", "int8", "nf4"])
def test_encoded_updates_of_virtual_sites_are_within_the_sites_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setenv("FEDCORE_CLIP", "0.5")
    server = encoded_run(tmp_path, encoding)
    trainers = {"s1": Encoding(1, encoding, 0.5), "s2": Encoding(2, encoding, 0.5)}
    with serving(server):
        drive(Fleet(server.endpoint, LAYOUT, trainers))
    final = load_file(tmp_path / "runs/t/final/model.safetensors")["w"]
    norm = float(np.linalg.norm(final.astype(np.float64)))
    assert 0.9 < norm <= 1.0 + 1e-6  # two rounds of at most 0.5


@pytest.mark.parametrize("norm", [0.0, 0.75])
def test_an_update_beyond_the_bound_of_virtual_sites_does_not_leave(
    tmp_path: Path, norm: float
) -> None:
    server = encoded_run(tmp_path, "int8")
    trainers = {name: Encoding(1, "int8", norm) for name in ("s1", "s2")}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.run)
        fleet = Fleet(server.endpoint, LAYOUT, trainers, clip=0.5)
        with pytest.raises(ConfigError, match="does not leave"):
            drive(fleet)
        fleet.close()
        server.stop()
        running.result(SECONDS)
    assert not list((tmp_path / "runs/t").glob("**/model-00001*"))


@pytest.mark.parametrize("kind", ["initial", "train", "submit"])
def test_no_server_gets_a_trained_model_of_a_virtual_site_without_its_bound(kind: Any) -> None:
    link = ServerLink("tcp://127.0.0.1:0")
    server, layout = Stage(link), stage.LAYOUT
    fleet = Fleet(link.endpoint, layout, {"s": Encoding(1, "raw", 0.5, layout)}, clip=0.5)
    with ThreadPoolExecutor(1) as pool:
        try:
            running = pool.submit(fleet.run)
            server.expect(protocol.Join)
            server.welcome()
            server.accept()
            if kind == "initial":
                server.task("train", 1, server.publish(1))
                server.expect(protocol.Ready)
            server.say(protocol.Task(kind=kind, round=0, rounds=2, version=0))
            with pytest.raises(ProtocolError, match="initial model after training|names no model"):
                running.result(SECONDS)
            assert not [m for m in server.heard if isinstance(m, protocol.Ready)]
        finally:
            fleet.close()
            link.close()


@pytest.fixture
def kits(tmp_path: Path) -> Provisioned:
    parties = {"a": Role.SITE, "b": Role.SITE, "c": Role.SITE}
    return provision(Project("tcp://127.0.0.1:7733", parties), tmp_path / "kits")


def test_virtual_sites_with_keys_of_their_own_take_part_in_a_secured_run(
    tmp_path: Path, kits: Provisioned
) -> None:
    server = server_of(tmp_path)
    keys = {name: load_kit(kits.kits[name]).credentials for name in ("a", "b")}
    with serving(server):
        drive(Fleet(server.endpoint, LAYOUT, {"a": Adding(1), "b": Adding(2)}, keys=keys))
    final = load_file(tmp_path / "runs/t/final/model.safetensors")["w"]
    assert np.allclose(final, 2 * 5 / 3)


def test_a_key_that_the_server_does_not_admit_ends_the_step_with_an_error(
    tmp_path: Path, kits: Provisioned
) -> None:
    server = server_of(tmp_path)
    admitted = load_kit(kits.kits["a"]).credentials
    keys = {"a": Credentials(admitted.server_key, KeyPair.generate())}
    fleet = Fleet(server.endpoint, LAYOUT, {"a": Adding(1)}, keys=keys)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(server.run)
        try:
            with pytest.raises(RefusedError, match="does not admit the key of a"):
                drive(fleet)
        finally:
            server.stop()
    fleet.close()


def test_a_refused_site_of_many_ends_the_step_with_its_error(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["s1"], rounds=1))
    with serving(server):
        fleet = Fleet(server.endpoint, LAYOUT, {"nobody": Adding(1)})
        with pytest.raises(RefusedError, match="nobody"):
            drive(fleet)
        fleet.close()
        drive(Fleet(server.endpoint, LAYOUT, {"s1": Adding(1)}))
