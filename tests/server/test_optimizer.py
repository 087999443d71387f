"""A server optimizer in whole runs: the bytes, over restarts, after a rollback, and what is refused by name."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from fedcore._core import Collector, CollectorOptions, Finisher, Layout, MappedFile
from fedcore.config import RunConfig, parse_run
from fedcore.errors import ConfigError, FedcoreError, IntegrityError, RefusedError
from fedcore.model_file import open_model
from fedcore.protocol import Role
from fedcore.rules import Option
from fedcore.rules.finishers import FINISHERS, factor_of
from fedcore.rules.finishers import Finisher as FinisherKind
from fedcore.server.budget import Budget
from fedcore.server.optimizer import Optimizer
from fedcore.server.roles import Roles
from fedcore.server.service import Server
from fedcore.server.storage.store import Store
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

from ..support.python_rules import Median, named
from ..support.run_folders import flip
from ..support.runs import run

COUNT = 3000
SPECS = [("h", "BF16", [COUNT]), ("w", "F32", [COUNT])]
DTYPES = {"h": ml_dtypes.bfloat16, "w": np.float32}
WEIGHTS = {"a": 3, "b": 5}
RATE = FinisherKind("rate", 1, "", (), {"rate": Option(0.5, 0, 10, "of the step", open=True)})
MOMENTUM = {"name": "momentum", "learning_rate": 0.3, "momentum": 0.8}
Model = dict[str, Any]


def config(folder: Path, rounds: int, optimizer: Any = MOMENTUM, **sections: Any) -> RunConfig:
    values = {
        "run": {"name": "t", "rounds": rounds},
        "participants": {"sites": ["a", "b"], "round_deadline": "300s"},
        "aggregation": {} if optimizer is None else {"optimizer": optimizer},
        "server": {"listen": "tcp://127.0.0.1:0", "insecure": True},
    }
    return parse_run(values | sections, folder=folder)


def change(name: str, round_: int) -> Model:
    dice = np.random.default_rng([round_, *name.encode()])
    return {key: dice.standard_normal(COUNT) / 50 for key in DTYPES}


def trained(name: str, round_: int, model: Model) -> Model:
    steps = change(name, round_)
    return {
        key: (model[key].astype(np.float64) + steps[key]).astype(dtype)
        for key, dtype in DTYPES.items()
    }


def site(
    address: str,
    name: str,
    idle_timeout: float = 600,
    *,
    roles: dict[str, Role] | None = None,
    seen: set[bytes] | None = None,
    losses: Mapping[int, float] | None = None,
    scored: dict[int, bytes] | None = None,
) -> None:
    """Take part; ``seen`` gets each model that it trains from or scores, ``scored`` each version's."""
    settings = SiteSettings(
        server=address, site=name, connect_timeout=200, idle_timeout=idle_timeout
    )
    session = Session(settings)
    try:
        while session.is_running():
            first = trained("", 0, zeros())
            task = session.begin(SPECS, {}, lambda key: first[key].tobytes(), roles=roles)  # noqa: B023 - at once
            if seen is not None:
                seen.add(bytes(task.tensors["w"]))
            if losses is not None:
                session.score({"loss": losses[task.version]}, 1)
            if scored is not None:
                scored[task.version] = bytes(task.tensors["w"])
            if task.kind == "evaluate":
                session.end_task()
                continue
            model = {k: np.frombuffer(task.tensors[k], dtype) for k, dtype in DTYPES.items()}
            update = trained(name, task.round, model)
            session.submit(lambda key: update[key].tobytes(), WEIGHTS[name])  # noqa: B023 - at once
    finally:
        session.close()


def zeros() -> Model:
    return {key: np.zeros(COUNT, dtype) for key, dtype in DTYPES.items()}


def train(config: RunConfig, losses: Mapping[int, float] | None = None, **first: Any) -> bool:
    """Run a server and two sites; ``first`` is what only the first one gets, such as its roles."""
    server = Server(config)
    sites = (
        functools.partial(site, server.endpoint, "a", losses=losses, **first),
        functools.partial(site, server.endpoint, "b", losses=losses),
    )
    return run(server, *sites)[0].ok


def reference(
    rounds: int, plain: str = "", factors: Sequence[float] = (1.0,) * 9, rule: str = "mean"
) -> Model:
    model = trained("", 0, zeros())
    master = {key: value.astype(np.float32) for key, value in model.items()}
    v = {key: np.zeros(COUNT, np.float32) for key in model}
    for round_ in range(1, rounds + 1):
        updates = {name: trained(name, round_, model) for name in WEIGHTS}
        for key, dtype in DTYPES.items():
            wide = {name: update[key].astype(np.float64) for name, update in updates.items()}
            combined = sum(weight * wide[name] for name, weight in WEIGHTS.items()) / 8
            if rule != "mean" and key != plain:
                combined = np.median(np.stack(list(wide.values())), axis=0)
            if key == plain:
                model[key] = combined.astype(dtype)
                continue
            step = combined - model[key].astype(np.float64)
            v[key] = (0.8 * v[key].astype(np.float64) + step).astype(np.float32)
            rate = 0.3 * factors[round_ - 1]
            moved = master[key].astype(np.float64) + rate * v[key].astype(np.float64)
            master[key] = moved.astype(np.float32)
            model[key] = master[key].astype(dtype)
    return model


def committed(folder: Path, version: int) -> dict[str, bytes]:
    model = open_model(folder / f"runs/t/models/round-{version:04d}.safetensors")
    return {name: bytes(view) for name, view in model.views().items()}


def as_bytes(model: Model) -> dict[str, bytes]:
    return {key: value.tobytes() for key, value in model.items()}


def test_a_run_with_momentum_is_the_reference_and_goes_on_from_its_states(tmp_path: Path) -> None:
    assert train(config(tmp_path, 2))
    models = tmp_path / "runs/t/models"
    assert sorted(path.name for path in models.iterdir() if path.name.count(".") == 2) == [
        "round-0002.master.safetensors",
        "round-0002.momentum.safetensors",
    ]
    assert train(config(tmp_path, 4))  # another server, which opens the states
    for version in range(1, 5):
        assert committed(tmp_path, version) == as_bytes(reference(version))
    for name in ("round-0004", "round-0004.momentum", "round-0004.master"):
        with safe_open(models / f"{name}.safetensors", "np") as file:
            said = file.metadata()["fedcore.optimizer"]
        assert said == f"momentum 1 learning_rate={(0.3).hex()} momentum={(0.8).hex()}"


@pytest.mark.parametrize("rule", ["median", named(Median)], ids=["core", "python"])
def test_momentum_goes_with_the_median_and_is_the_reference_over_restarts(
    tmp_path: Path, rule: str
) -> None:
    aggregation = {"rule": rule, "optimizer": {**MOMENTUM, "plain": ["h"]}}
    for rounds in (2, 4):
        assert train(config(tmp_path, rounds, aggregation=aggregation))
    for version in range(1, 5):
        expected = reference(version, "h", rule=rule)
        assert committed(tmp_path, version) == as_bytes(expected)


def test_tensors_that_plain_names_keep_the_mean_and_have_no_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = {**MOMENTUM, "plain": ["h*", "*.running_var"]}
    assert train(config(tmp_path, 2, optimizer))
    for version in (1, 2):
        assert committed(tmp_path, version) == as_bytes(reference(version, plain="h"))
    with safe_open(tmp_path / "runs/t/models/round-0002.momentum.safetensors", "np") as file:
        assert list(file.keys()) == ["w"]
    said = "aggregation.optimizer.plain: no tensor is named '*.running_var'"
    assert caplog.messages.count(said) == 1


def test_buffers_that_a_site_declared_keep_the_mean_over_restarts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    assert train(config(tmp_path, 2), roles={"h": "buffer"})
    assert caplog.messages.count("1 buffer of the model, such as h, will keep the plain mean") == 1
    assert train(config(tmp_path, 4))  # another server, and no site that knows
    for version in range(1, 5):
        assert committed(tmp_path, version) == as_bytes(reference(version, plain="h"))
    with safe_open(tmp_path / "runs/t/models/round-0004.momentum.safetensors", "np") as file:
        assert list(file.keys()) == ["w"]


def test_a_run_that_began_without_roles_goes_on_without_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(config(tmp_path, 2))
    assert train(config(tmp_path, 3), roles={"h": "buffer"})
    assert committed(tmp_path, 3) == as_bytes(reference(3))
    assert (
        "1 buffer of the model, such as 'h', are parameters to the server optimizer" in caplog.text
    )


def test_a_site_that_comes_back_to_a_run_with_its_roles_is_not_warned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(config(tmp_path, 1), roles={"h": "buffer"})
    assert train(config(tmp_path, 2), roles={"h": "buffer"})
    assert committed(tmp_path, 2) == as_bytes(reference(2, plain="h"))
    assert "are parameters to the server optimizer" not in caplog.text


def test_a_site_that_leaves_a_server_optimizer_no_parameter_is_refused(tmp_path: Path) -> None:
    server = Server(config(tmp_path, 1))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.run)
        with pytest.raises(RefusedError, match="'a' says that all tensors .* are buffers"):
            site(server.endpoint, "a", roles=dict.fromkeys(DTYPES, "buffer"))
        server.stop()
        running.result(200)


def test_a_site_whose_roles_are_not_the_runs_is_refused(tmp_path: Path) -> None:
    assert train(config(tmp_path, 1), roles={"h": "buffer"})
    store = Store(tmp_path / "runs/t", None)
    store.keep_declared("a", None)  # its key was revoked
    store.close()
    server = Server(config(tmp_path, 2))
    said = "'h' is a parameter at site 'b' and a buffer at the run"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.run)
        with pytest.raises(RefusedError, match=said):
            site(server.endpoint, "b", roles={})
        server.stop()
        running.result(200)


def test_a_state_that_was_changed_stops_the_start_and_a_rollback_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(config(tmp_path, 2))
    folder = tmp_path / "runs/t"
    flip(folder / "models/round-0002.momentum.safetensors")
    expected = r"round-0002\.momentum\.safetensors is not the file.*a state of the last.*rollback"
    with pytest.raises(IntegrityError, match=expected):
        Server(config(tmp_path, 3)).run()
    store = Store(folder, None)
    store.roll_back(1)
    store.close()
    caplog.set_level(logging.INFO, "fedcore.server")
    assert train(config(tmp_path, 2))
    assert (
        "the server optimizer is momentum (version 1): learning_rate 0.3, momentum 0.8"
        in caplog.text
    )
    assert "the server optimizer begins anew after round 1" in caplog.text
    assert committed(tmp_path, 1) == as_bytes(reference(1))
    anew = committed(tmp_path, 2)
    assert anew != as_bytes(reference(2))
    # With zero states round 2 is a first round of momentum from the model of round 1.
    model = reference(1)
    updates = {name: trained(name, 2, model)["w"] for name in WEIGHTS}
    total = sum(weight * updates[name].astype(np.float64) for name, weight in WEIGHTS.items())
    v = (total / 8 - model["w"].astype(np.float64)).astype(np.float32).astype(np.float64)
    assert anew["w"] == (model["w"].astype(np.float64) + 0.3 * v).astype(np.float32).tobytes()


def test_two_states_of_one_layout_that_changed_places_stop_the_start(tmp_path: Path) -> None:
    settings = config(tmp_path, 1, {"name": "adam"})
    assert train(settings)
    momentum, variance = (
        tmp_path / f"runs/t/models/round-0001.{name}.safetensors"
        for name in ("momentum", "variance")
    )
    kept = momentum.read_bytes()
    momentum.write_bytes(variance.read_bytes())
    variance.write_bytes(kept)
    store = Store(tmp_path / "runs/t", None)
    expected = r"round-0001\.(momentum|variance)\.safetensors is not the file"
    with pytest.raises(IntegrityError, match=expected):
        Optimizer(settings.aggregation, store, Roles(store)).open(1)
    store.close()


def test_the_best_model_is_selected_among_the_models_beside_an_average(tmp_path: Path) -> None:
    """Sites score the models, never their average: the export of the best is the model that scored best."""
    losses = {0: 4.0, 1: 1.0, 2: 3.0, 3: 2.0}
    selection = {"metric": "loss", "mode": "min"}
    sections = {"aggregation": {"ema": 0.75}, "selection": selection}
    scored: dict[int, bytes] = {}
    assert train(config(tmp_path, 3, **sections), losses=losses, scored=scored)
    assert scored == {version: committed(tmp_path, version)["w"] for version in losses}
    model = open_model(tmp_path / "runs/t/best/model.safetensors")
    assert bytes(model.view("w")) == committed(tmp_path, 1)["w"]
    average = open_model(tmp_path / "runs/t/ema/model.safetensors")
    assert bytes(average.view("w")) not in scored.values()


@pytest.mark.parametrize("optimizer", [None, MOMENTUM])
def test_the_average_of_the_models_is_the_reference_over_restarts_and_is_exported(
    tmp_path: Path, optimizer: Any
) -> None:
    extra = {} if optimizer is None else {"optimizer": optimizer}
    seen: set[bytes] = set()
    for rounds in (2, 4):
        assert train(config(tmp_path, rounds, aggregation={**extra, "ema": 0.75}), seen=seen)
    bare = tmp_path / "bare"
    assert train(config(bare, 4, optimizer))
    first = committed(tmp_path, 0)
    average = {n: np.frombuffer(first[n], d).astype(np.float64) for n, d in DTYPES.items()}
    for version in range(1, 5):
        made = committed(tmp_path, version)
        assert made == committed(bare, version)
        x = np.frombuffer(made["w"], np.float32).astype(np.float64)
        average["w"] = (0.75 * average["w"] + 0.25 * x).astype(np.float32).astype(np.float64)
    state = open_model(tmp_path / "runs/t/models/round-0004.ema.safetensors")
    exported = open_model(tmp_path / "runs/t/ema/model.safetensors")
    assert bytes(state.view("w")) == average["w"].astype(np.float32).tobytes()
    assert bytes(exported.view("w")) == bytes(state.view("w"))
    wide = np.frombuffer(bytes(state.view("h")), np.float32)
    assert bytes(exported.view("h")) == wide.astype(ml_dtypes.bfloat16).tobytes()
    assert {n: d for n, d, *_ in exported.layout.tensors} == {"h": "BF16", "w": "F32"}
    assert exported.metadata["fedcore.ema"] == (0.75).hex()
    assert "the average (EMA)" in (tmp_path / "runs/t/ema/README.md").read_text()
    assert seen == {committed(tmp_path, version)["w"] for version in range(5)}
    for name in ("final", "best"):  # no metric selects, so the last model is the best one
        model = open_model(tmp_path / f"runs/t/{name}/model.safetensors")
        assert {n: bytes(v) for n, v in model.views().items()} == committed(tmp_path, 4)


def test_without_an_optimizer_a_run_keeps_no_states_and_old_settings_match(tmp_path: Path) -> None:
    assert train(config(tmp_path, 1, None))
    names = {path.name for path in (tmp_path / "runs/t/models").iterdir()}
    assert names == {"round-0000.safetensors", "round-0001.safetensors"}
    with pytest.raises(ConfigError, match=r"another aggregation\.optimizer: it was not given"):
        Server(config(tmp_path, 2))
    settings = config(tmp_path, 2, None).model_dump(mode="json", exclude={"folder", "simulate"})
    del settings["aggregation"]["optimizer"]  # as it was recorded before there were any
    shutil.copytree(tmp_path / "runs/t", tmp_path / "old")
    Store(tmp_path / "old", settings).close()
    Store(tmp_path / "old", config(tmp_path, 2, None).model_dump(mode="json")).close()


def test_the_learning_rate_follows_its_schedule_over_restarts(tmp_path: Path) -> None:
    optimizer = {**MOMENTUM, "schedule": [[1, 0.5], [3, 1.0]]}
    factors = [0.5, 0.75, 1.0, 1.0]
    assert train(config(tmp_path, 2, optimizer))
    assert train(config(tmp_path, 4, optimizer))
    for version in range(1, 5):
        assert committed(tmp_path, version) == as_bytes(reference(version, factors=factors))
    with safe_open(tmp_path / "runs/t/models/round-0002.safetensors", "np") as file:
        said = file.metadata()["fedcore.optimizer"]
    assert f"learning_rate={(0.3 * 0.75).hex()}" in said
    with pytest.raises(ConfigError, match=r"another aggregation\.optimizer"):
        Server(config(tmp_path, 5))


def test_a_schedule_is_straight_lines_between_its_points() -> None:
    points = [(3, 0.25), (5, 1.0), (6, 1.0), (7, 0.5)]
    found = [factor_of(points, round_) for round_ in range(1, 10)]
    assert found == [0.25, 0.25, 0.25, 0.625, 1.0, 1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"optimizer": {"name": "sgd"}}, r"expected one of 'momentum', .*'yogi', got 'sgd'"),
        ({"optimizer": {**MOMENTUM, "momentum": 1.0}}, "at least 0 and below 1, got 1.0"),
        ({"optimizer": {**MOMENTUM, "learning_rate": 0}}, "above 0 and below 1e.06, got 0"),
        ({"optimizer": {**MOMENTUM, "beta": 0.5}}, "unknown key 'beta' of 'momentum'"),
        ({"optimizer": {**MOMENTUM, "momentun": 0.5}}, "did you mean 'momentum'"),
        (
            {"optimizer": {**MOMENTUM, "momentum": "0.5"}},
            r"momentum: expected a valid number, got '0.5'",
        ),
        ({"optimizer": {**MOMENTUM, "plain": "b"}}, r"plain: expected a list, such as \['b'\]"),
        ({"optimizer": {**MOMENTUM, "schedule": [[2, 1.0], [2, 0.5]]}}, "each later than the one"),
        ({"optimizer": {**MOMENTUM, "schedule": [[0, 1.0]]}}, "expected rounds from 1 on"),
        ({"optimizer": {**MOMENTUM, "schedule": [[4, 0.0]]}}, "got 0.0 for round 4"),
        ({"optimizer": {**MOMENTUM, "schedule": 3}}, "schedule: expected a"),
        ({"optimizer": {"name": "rate", "schedule": [[1, 1.0]]}}, "'rate' has no learning_rate"),
        ({"optimizer": "momentum"}, "optimizer: expected a table of keys, got 'momentum'"),
        ({"optimizer": {"name": "rate", "momentum": 0.5}}, "unknown key 'momentum' of 'rate'"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused_by_name(
    tmp_path: Path, sections: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "'rate'" in text:
        monkeypatch.setitem(FINISHERS, "rate", RATE)
    with pytest.raises(ConfigError, match=text):
        config(tmp_path, 1, aggregation=sections)


def test_an_optimizer_takes_the_numbers_that_the_registry_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FINISHERS, "rate", RATE)
    for given, expected in ({}, {"rate": 0.5}), ({"rate": 2}, {"rate": 2.0}):
        section = config(tmp_path, 1, {"name": "rate", **given}).aggregation.optimizer
        assert section is not None
        assert section.options == expected
        assert section.model_dump() == {"name": "rate", "plain": [], **expected}


def test_an_optimizer_is_for_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"aggregation\.optimizer: it is for run\.task = 'train'"):
        config(tmp_path, 1, run={"name": "t", "task": "evaluate"}, model={"initial": "m"})


def test_momentum_in_too_little_memory_is_refused_with_the_number(tmp_path: Path) -> None:
    server = {"listen": "tcp://127.0.0.1:0", "insecure": True, "memory": "16MiB"}
    with pytest.raises(ConfigError, match=r"aggregation\.optimizer.*at least \d+MiB"):
        Server(config(tmp_path, 1, server=server))


@pytest.mark.parametrize("sites", [40, 150])
def test_the_least_memory_for_momentum_of_a_median_is_what_the_core_needs(
    tmp_path: Path, sites: int
) -> None:
    def budget(memory: int, optimizer: bool = True) -> Budget:
        made = {"rule": "median", **({"optimizer": MOMENTUM} if optimizer else {})}
        server = {"listen": "tcp://127.0.0.1:0", "insecure": True, "memory": f"{memory}MiB"}
        people = {"count": sites, "round_deadline": "300s"}
        given = config(tmp_path, 1, aggregation=made, server=server, participants=people)
        return Budget.of_run(given, encrypted=False)

    least = next(mib for mib in range(16, 200) if fits(budget, mib))
    divided = budget(least)
    layout = Layout([("h", "BF16", [1 << 20])], divided.chunk_bytes)
    made = Finisher(layout, "momentum", {"learning_rate": 1.0, "momentum": 0.9}, set(), {})
    base = (MappedFile.anonymous(layout.total_bytes), 0)
    options = CollectorOptions(divided.chunks, rule="median", finisher=made)
    assert Collector.open(layout, sites, base, options).window >= 1
    assert fits(functools.partial(budget, optimizer=False), least)


def fits(budget: Callable[[int], Budget], mib: int) -> bool:
    try:
        budget(mib)
    except ConfigError:
        return False
    return True


def test_an_optimizer_that_acts_on_no_tensor_ends_the_server_before_round_1(
    tmp_path: Path,
) -> None:
    everything = {**MOMENTUM, "plain": ["*"]}
    server = Server(config(tmp_path, 1, everything))
    with ThreadPoolExecutor(2) as pool:
        sites = [pool.submit(site, server.endpoint, name, idle_timeout=5) for name in "ab"]
        with pytest.raises(ConfigError, match="no tensor on which a server optimizer acts"):
            server.run()
        assert all(isinstance(done.exception(60), FedcoreError) for done in sites)
    assert train(config(tmp_path, 1))  # the run file may be mended: no model was committed
    first = {"initial": str(tmp_path / "runs/t/models/round-0001.safetensors")}
    server = Server(config(tmp_path / "b", 1, everything, model=first))
    with pytest.raises(ConfigError, match="no tensor on which a server optimizer acts"):
        server.run()
    assert not list((tmp_path / "b").rglob("round-0000.safetensors"))


def test_a_state_that_changes_during_a_round_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, made = tmp_path / "runs/t/models", change
    state = models / "round-0002.momentum.safetensors"
    kept = tmp_path / "kept"

    def spoil(name: str, round_: int) -> Model:
        if (name, round_) == ("a", 3) and not kept.exists():
            shutil.copy(state, kept)
            flip(state)
        return made(name, round_)

    monkeypatch.setitem(globals(), "change", spoil)
    server = Server(config(tmp_path, 3))
    with ThreadPoolExecutor(2) as pool:
        sites = [pool.submit(site, server.endpoint, name, idle_timeout=5) for name in "ab"]
        with pytest.raises(IntegrityError, match=r"momentum.* has changed .* a state of the last"):
            server.run()
        for done in sites:
            done.exception(60)
    assert not list(models.glob("round-0003*"))
    shutil.copy(kept, state)  # from a backup
    assert train(config(tmp_path, 3))
    assert committed(tmp_path, 3) == as_bytes(reference(3))
