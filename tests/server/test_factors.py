"""Runs in which one factor of each adapter is trained in a round: bytes, kills, what is refused."""

from __future__ import annotations

import itertools
import shutil
import threading
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore import protocol
from fedcore.adapters.forms import update_form
from fedcore.errors import LayoutError, RefusedError, StorageError
from fedcore.model_file import open_model
from fedcore.server.service import Server
from fedcore.server.storage.files import Files
from fedcore.server.storage.store import Store
from fedcore.server.versions import Versions
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.local import LocalNetwork

from ..support.factor_runs import (
    PAIRS,
    SHAPES,
    SPECS,
    WEIGHTS,
    config,
    expected,
    first,
    fixed_in,
    joined,
    models,
    reader,
    run_through,
    same,
    take_part,
    trained,
    values_of,
)

METHODS = ["freeze-a", "alternate"]


@pytest.mark.parametrize("method", METHODS)
def test_a_round_averages_one_factor_and_leaves_the_other(method: str, tmp_path: Path) -> None:
    folder = run_through(config(tmp_path, method))
    assert same(models(folder), expected(method, 3))
    header = open_model(folder / "models/round-0003.safetensors").metadata
    assert header["fedcore.lora"] == method
    assert sorted(p.name for p in (folder / "models").iterdir()) == [
        f"round-000{version}.safetensors" for version in range(4)
    ]


def test_an_update_holds_what_its_round_trains() -> None:
    def names(method: protocol.LoraMethod, round_: int) -> set[str]:
        return {name for name, *_ in update_form(method, round_, SPECS, PAIRS)}

    of_a, of_b = ({pair[i] for pair in PAIRS} for i in range(2))
    rest = {"head", "seen"}
    assert [names("freeze-a", round_) for round_ in (1, 2)] == [of_b | rest] * 2
    assert [names("alternate", round_) for round_ in (1, 2)] == [of_b | rest, of_a | rest]
    assert names("alternate", 0) == names("freeze-a", 0) == set(SHAPES)


@pytest.mark.parametrize("encoding", ["int8", "top-k"])
def test_what_a_frozen_factor_leaves_travels_encoded(encoding: str, tmp_path: Path) -> None:
    transfer = {"update": encoding, **({"top_k": 0.5} if encoding == "top-k" else {})}
    folder = run_through(config(tmp_path, "freeze-a", transfer=transfer))
    found, wanted = models(folder)[-1], expected("freeze-a", 3)[-1]
    for a, b in PAIRS:
        assert found[a].tobytes() == wanted[a].tobytes()
        assert 0 < np.abs(found[b] - wanted[b]).max() < 0.3


@pytest.mark.parametrize("method", METHODS)
def test_a_sites_bound_is_one_of_what_its_round_trains(method: str, tmp_path: Path) -> None:
    found = models(run_through(config(tmp_path, method), clip=0.5))
    for round_, (before, after) in enumerate(itertools.pairwise(found), 1):
        changes = {n: after[n].astype(np.float64) - before[n] for n in SHAPES}
        assert {n for n in changes if not changes[n].any()} == fixed_in(method, round_) | {"seen"}
        assert 0.2 < np.sqrt(sum((change**2).sum() for change in changes.values())) <= 0.5


@pytest.mark.parametrize("rule", ["median", "rfa"])
def test_another_rule_acts_on_the_factor_that_is_trained(rule: str, tmp_path: Path) -> None:
    folder = run_through(config(tmp_path, "alternate", 2, aggregation={"rule": rule}))
    zero, one, two = models(folder)
    for a, b in PAIRS:
        assert zero[a].tobytes() == one[a].tobytes() != two[a].tobytes()
        assert zero[b].tobytes() != one[b].tobytes() == two[b].tobytes()


KILLS: dict[str, tuple[type, str, bool]] = {
    "all is reduced": (Versions, "whole", False),
    "the version is written": (Versions, "whole", True),
    "its file has its name": (Files, "put_in_place", True),
}


@pytest.mark.parametrize("moment", KILLS)
@pytest.mark.parametrize("method", METHODS)
def test_a_server_killed_at_a_commit_goes_on_to_the_same_bytes(
    method: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is copied as it is at that moment, and another server goes on with the copy."""
    run, later = config(tmp_path / "first", method), config(tmp_path / "copy", method)
    of, name, after = KILLS[moment]
    done = getattr(of, name)
    copied = []

    def killed(self: Any, version: int, *args: Any) -> Any:
        found = done(self, version, *args) if after or version != 2 else None
        if version == 2 and not copied:
            copied.append(shutil.copytree(run.run_folder, later.run_folder))
            raise StorageError("killed")
        return found

    monkeypatch.setattr(of, name, killed)
    with joined() as (network, pool):
        result = pool.submit(Server(run, link=network.server()).run)
        sites = [pool.submit(take_part, network, name) for name in WEIGHTS]
        with pytest.raises(StorageError, match="killed"):
            result.result(200)
        monkeypatch.undo()
        server = Server(later, link=network.server())
        with ExitStack() as stack:
            stack.callback(server.stop)
            assert pool.submit(server.run).result(200).ok
            for done in sites:
                done.result(200)
    assert same(models(later.run_folder), expected(method, 3))


@pytest.mark.parametrize("method", METHODS)
def test_a_site_that_is_started_again_delivers_its_factor_without_training(
    method: str, tmp_path: Path
) -> None:
    back = threading.Event()
    with joined() as (network, pool):
        run = config(tmp_path, method)
        server = Server(run, link=network.server())
        with ExitStack() as stack:
            stack.callback(server.stop)
            stack.callback(back.set)
            result = pool.submit(server.run)
            other = pool.submit(take_part, network, "b", waits=back)
            work = tmp_path / "work"
            assert take_part(network, "a", leaves=True, work=work) == [1, 2]
            back.set()
            assert take_part(network, "a", work=work) == [3]
            assert result.result(200).ok
            assert other.result(200) == [1, 2, 3]
    assert same(models(run.run_folder), expected(method, 3))


def declaring(network: LocalNetwork, pairs: Any) -> None:
    session = Session(SiteSettings("local", "a", idle_timeout=200), network.dial)
    with closing(session):
        assert session.is_running()
        session.begin(SPECS, {}, reader(first()), roles={}, pairs=pairs)


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ((), "names no factors of a LoRA adapter, which aggregation.lora = 'freeze-a' combines"),
        ((("head", PAIRS[0][1]),), "can't be factors of a product"),
        (((PAIRS[0][1], PAIRS[0][0]),), "have ranks 200 and 300"),
    ],
)
def test_a_site_without_factors_is_refused_by_name(pairs: Any, reason: str, tmp_path: Path) -> None:
    with joined() as (network, pool):
        server = Server(config(tmp_path, "freeze-a"), link=network.server())
        pool.submit(server.run)
        try:
            with pytest.raises((RefusedError, LayoutError), match=reason):
                declaring(network, pairs)
        finally:
            server.stop()


def test_an_update_that_moved_the_frozen_factor_does_not_leave(tmp_path: Path) -> None:
    with joined() as (network, pool):
        run = config(tmp_path, "freeze-a", participants={"sites": ["a"]})
        server = Server(run, link=network.server())
        pool.submit(server.run)
        session = Session(SiteSettings("local", "a", idle_timeout=200), network.dial)
        try:
            assert session.is_running()
            model = session.begin(SPECS, {}, reader(first()), roles={}, pairs=PAIRS)
            update = trained(values_of(model), "a", 1, frozenset())
            with pytest.raises(LayoutError, match=r"changed 'm0.lora_A.weight', which round 1"):
                session.submit(reader(update), 1)
            session.submit(reader(trained(values_of(model), "a", 1, session.fixed)), 1)
        finally:
            session.close()
            server.stop()


def test_a_restarted_run_knows_its_factors_before_a_site_declares(tmp_path: Path) -> None:
    folder = run_through(config(tmp_path, "alternate", 1))
    with closing(Store(folder, None)) as store:
        assert store.factors() == PAIRS
