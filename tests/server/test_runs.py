"""Whole runs over loopback sockets: sites as threads that speak the protocol through `Session`."""

from __future__ import annotations

import json
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedcore import protocol
from fedcore.errors import BusyError, ConfigError, LayoutError, RefusedError, StorageError
from fedcore.server.rounds.rounds import Rounds
from fedcore.server.service import Server
from fedcore.server.storage.store import Store
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.link import SiteLink

from ..support.runs import SPECS, run, run_config, site, writer
from ..support.several_runs import Peer


def test_a_run_averages_by_weight_and_selects_the_best(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"]))
    at = server.endpoint
    result, trained = run(server, lambda: site(at, "a", 1, 1), lambda: site(at, "b", 3, 3))
    assert (result.ok, result.version, result.best_version, trained) == (True, 3, 2, [3, 3])
    final = load_file(tmp_path / "runs/t/final/model.safetensors")
    assert final["w"].tolist() == [7.5] * 5000  # 3 rounds of (1 * 1 + 3 * 3) / 4
    assert final["n"].tolist() == [1, 2]
    assert load_file(tmp_path / "runs/t/best/model.safetensors")["w"][0] == 5.0
    assert (tmp_path / "runs/t/best/config.json").read_text() == "{}"
    assert len(list((tmp_path / "runs/t/models").iterdir())) == 4


def test_weights_up_to_64_bits_count_and_are_kept(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=1))
    at, most = server.endpoint, (1 << 64) - 1
    result, _ = run(server, lambda: site(at, "a", 1, most), lambda: site(at, "b", 3, 1 << 63))
    assert result.ok
    final = load_file(tmp_path / "runs/t/final/model.safetensors")
    assert (
        final["w"].tolist() == [np.float32((1 * (2**24 - 1) + 3 * 2**23) / (3 * 2**23 - 1))] * 5000
    )
    summary = json.loads((tmp_path / "runs/t/summary.json").read_text())
    weights = {"a": (2**24 - 1) << 40, "b": 1 << 63}
    assert summary["versions"][1]["participants"] == weights


def test_an_update_with_nan_is_left_out_and_the_round_goes_on(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b", "c"], min_results=2))
    at = server.endpoint
    result, _ = run(
        server,
        lambda: site(at, "a", 1),
        lambda: site(at, "b", 3),
        lambda: site(at, "c", 5, nan_in=2),
    )
    assert result.ok
    values = [load_file(p)["w"][0] for p in sorted((tmp_path / "runs/t/models").iterdir())]
    assert values == [0, 3, 5, 8]


def test_a_site_whose_initial_model_is_invalid_is_passed_over(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=2))
    asked = threading.Event()

    def broken() -> int:
        session = Session(SiteSettings(server=server.endpoint, site="a", connect_timeout=200))
        trained = 0

        def not_a_number(name: str) -> bytes:
            asked.set()
            return writer(np.nan)(name)

        try:
            while session.is_running():
                model = session.begin(SPECS, {"config.json": "{}"}, not_a_number)
                if model.kind == "evaluate":
                    session.end_task()
                    continue
                value = float(np.frombuffer(model.tensors["w"], np.float32)[0])
                session.submit(writer(value + 1), 1)
                trained += 1
        finally:
            session.close()
        return trained

    def whole() -> int:
        assert asked.wait(200)
        return site(server.endpoint, "b", 3)

    result, trained = run(server, broken, whole)
    assert (result.ok, result.version, trained) == (True, 2, [2, 2])
    assert load_file(tmp_path / "runs/t/final/model.safetensors")["w"].tolist() == [4.0] * 5000


def test_a_site_that_dies_does_not_stop_the_others(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b", "c"], min_results=2))
    at = server.endpoint
    result, trained = run(
        server,
        lambda: site(at, "a", 1),
        lambda: site(at, "b", 3),
        lambda: site(at, "c", 5, die_in=2),
    )
    assert result.ok
    assert trained == [3, 3, 1]
    values = [load_file(p)["w"][0] for p in sorted((tmp_path / "runs/t/models").iterdir())]
    assert values == [0, 3, 5, 7]


def test_a_run_without_a_quorum_ends_with_the_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = Rounds.ready

    def until_the_deadline(rounds: Rounds, site: str, round_: int, delivery: Any) -> list[Any]:
        actions = ready(rounds, site, round_, delivery)
        if round_ == 1:
            rounds.deadline_seconds = 0  # it passes as soon as a has delivered
        return actions

    monkeypatch.setattr(Rounds, "ready", until_the_deadline)
    server = Server(run_config(tmp_path, sites=["a", "b"]))
    at = server.endpoint
    result, _ = run(server, lambda: site(at, "a", 1))
    assert not result.ok
    assert "1 of the 2 updates" in result.message
    assert "b" in result.message


def test_a_restarted_server_goes_on_after_the_last_round(tmp_path: Path) -> None:
    config = run_config(tmp_path, sites=["a"], rounds=2)
    server = Server(config)
    run(server, lambda: site(server.endpoint, "a", 1))
    with pytest.raises(ConfigError, match="is finished"):
        Server(config)
    longer = Server(run_config(tmp_path, sites=["a"], rounds=4))
    result, trained = run(longer, lambda: site(longer.endpoint, "a", 1))
    assert (result.ok, result.version, trained) == (True, 4, [2])
    assert load_file(tmp_path / "runs/t/final/model.safetensors")["w"][0] == 4


def test_sites_that_were_told_to_go_are_not_expected_back(tmp_path: Path) -> None:
    config = run_config(tmp_path, sites=["a", "b"], rounds=2, min_results=1)
    server = Server(config)
    settings = config.model_dump(mode="json", exclude={"folder", "simulate"})
    run(server, lambda: site(server.endpoint, "a", 1), lambda: site(server.endpoint, "b", 1))
    store = Store(tmp_path / "runs/t", settings)
    try:
        assert store.members() == []
        store.add_member("a")
        store.add_member("a")
        assert store.members() == ["a"]
    finally:
        store.close()


def test_a_run_whose_model_was_lost_or_replaced_is_refused(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a"], rounds=1))
    run(server, lambda: site(server.endpoint, "a", 1))
    last = tmp_path / "runs/t/models/round-0001.safetensors"
    longer = run_config(tmp_path, sites=["a"], rounds=2)
    whole = bytearray(last.read_bytes())
    last.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(StorageError, match="not the file that this run committed"):
        Server(longer).run()
    last.unlink()
    with pytest.raises(StorageError, match=r"round-0001\.safetensors"):
        Server(longer).run()
    header = (
        b'{"w":{"dtype":"F32","shape":[5000],"data_offsets":[0,20000]},'
        b'"n":{"dtype":"I64","shape":[2],"data_offsets":[20000,20016]}}'
    )
    last.write_bytes(len(header).to_bytes(8, "little") + header + bytes(20016))
    with pytest.raises(StorageError, match="not the file that this run committed"):
        Server(longer).run()


def test_a_best_model_that_is_missing_is_named(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a"], rounds=1))
    run(server, lambda: site(server.endpoint, "a", 1))
    (tmp_path / "runs/t/models/round-0000.safetensors").unlink()
    store = Store(
        tmp_path / "runs/t", server.config.model_dump(mode="json", exclude={"folder", "simulate"})
    )
    try:
        with pytest.raises(StorageError, match=r"round-0000\.safetensors is missing"):
            store.export("best", 0)
    finally:
        store.close()


def test_more_sites_than_the_budget_holds_chunks_of_take_part(tmp_path: Path) -> None:
    names = [f"s{number:02d}" for number in range(20)]
    config = run_config(tmp_path, sites=names, rounds=2)
    small = config.server.model_copy(update={"memory": 16 << 20})
    server = Server(config.model_copy(update={"server": small}))
    result, trained = run(
        server, *(lambda n=n, v=v: site(server.endpoint, n, v, v + 1) for v, n in enumerate(names))
    )
    assert (result.ok, trained) == (True, [2] * 20)
    step = sum(v * (v + 1) for v in range(20)) / sum(v + 1 for v in range(20))
    final = load_file(tmp_path / "runs/t/final/model.safetensors")
    first = np.float32(step)
    assert set(final["w"].tolist()) == {np.float32(first + first)}


def test_other_settings_on_the_same_folder_are_refused(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a"], rounds=1))
    with pytest.raises(BusyError, match="in use by another server"):
        Server(run_config(tmp_path, sites=["a"]))
    run(server, lambda: site(server.endpoint, "a", 1))
    with pytest.raises(ConfigError, match=r"another participants\.sites: it was"):
        Server(run_config(tmp_path, sites=["b"]))


def test_strangers_twins_and_other_models_are_refused(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=1))
    at = server.endpoint
    go_on = threading.Event()

    def first() -> int:
        session = Session(SiteSettings(server=at, site="a"))
        session.is_running()
        model = session.begin(SPECS, {}, writer(0))
        with pytest.raises(RefusedError, match="lists a, b"):
            Session(SiteSettings(server=at, site="z")).is_running()
        with closing(SiteLink(at, uuid.uuid4().bytes)) as link:
            twin = Peer(link)
            twin.send(protocol.Join(version="0", site="a", instance="0" * 32))
            refused = twin.await_message(protocol.Refused)
            assert "another process takes part as 'a'" in refused.message
        other = Session(SiteSettings(server=at, site="b"))
        other.is_running()
        with pytest.raises(
            LayoutError, match=r"tensor 'w': site b has F32 \[4\], the global model has F32"
        ):
            other.begin([("w", "F32", [4]), SPECS[1]], {}, writer(0))
        go_on.set()
        session.submit(writer(float(model.round)), 1)
        while session.is_running():
            session.begin(SPECS, {}, writer(0))
            session.end_task()
        session.close()
        return 1

    def second() -> int:
        assert go_on.wait(200)
        return site(at, "b", 3)

    result, _ = run(server, first, second)
    assert result.ok


def test_the_operator_stops_a_run_with_its_last_round_on_disk(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a"], rounds=1_000_000))
    with ThreadPoolExecutor(2) as pool:
        result = pool.submit(server.run)
        worker = pool.submit(site, server.endpoint, "a", 1)
        models = tmp_path / "runs/t/models"
        while not (models / "round-0003.safetensors").exists():
            assert not result.done()
        server.stop()
        assert result.result(200).message == "stopped on request"
        assert worker.result(200) >= 3
    assert (tmp_path / "runs/t/final/model.safetensors").exists()


def test_a_first_start_that_failed_binds_nothing_and_foreign_files_are_left_alone(
    tmp_path: Path,
) -> None:
    config = run_config(tmp_path, sites=["a"], rounds=1)
    Store(config.run_folder, config.model_dump(mode="json")).close()
    notes = config.run_folder / "models" / "notes.txt"
    notes.write_text("keep me")
    (config.run_folder / "models" / "folder").mkdir()
    absent = {"min_results": 1, "join_timeout": "100ms"}  # b never comes
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=1, **absent))
    assert notes.read_text() == "keep me"
    assert run(server, lambda: site(server.endpoint, "a", 1))[0].ok


def test_a_run_may_go_on_with_other_limits_but_not_with_other_sites(tmp_path: Path) -> None:
    absent = {"min_results": 1, "join_timeout": "100ms"}  # b never comes
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=1, **absent))
    assert run(server, lambda: site(server.endpoint, "a", 1))[0].ok
    with pytest.raises(
        ConfigError, match=r"another participants\.sites: it was \['a', 'b'\] and is now \['a'\]"
    ):
        Server(run_config(tmp_path, sites=["a"], rounds=2))
    limits = {"min_results": 2, "round_deadline": "700s", "idle_timeout": "20s"}
    longer = Server(run_config(tmp_path, sites=["a", "b"], rounds=2, **limits))
    at = longer.endpoint
    assert run(longer, lambda: site(at, "a", 1), lambda: site(at, "b", 1))[0].ok


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    config = run_config(tmp_path, sites=["a"])
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "run.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StorageError, match=r"run\.sqlite"):
        Server(config)


def test_only_a_sample_of_the_sites_trains_in_a_round(tmp_path: Path) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b", "c"], sample=2, rounds=4))
    at = server.endpoint
    result, trained = run(server, *(lambda n=n: site(at, n, 1) for n in "abc"))
    assert result.ok
    assert sum(trained) == 8
    versions = json.loads((tmp_path / "runs/t/summary.json").read_text())["versions"]
    assert [len(row["participants"]) for row in versions] == [0, 2, 2, 2, 2]
    assert len(versions[-1]["metrics_by_site"]) == 3  # all of them score the last model


def test_only_the_best_and_the_last_models_are_kept_where_that_is_asked(tmp_path: Path) -> None:
    config = run_config(tmp_path, keep_versions=2, rounds=7, count=1)
    server = Server(config)
    result, _ = run(server, lambda: site(server.endpoint, "a", 1.0))
    assert (result.best_version, result.version) == (4, 7)
    kept = sorted(path.name for path in (config.run_folder / "models").iterdir())
    assert kept == [f"round-{version:04d}.safetensors" for version in (4, 6, 7)]
    assert load_file(config.run_folder / "best" / "model.safetensors")["w"][0] == 4
    summary = json.loads((config.run_folder / "summary.json").read_text())
    assert [v["version"] for v in summary["versions"]] == list(range(8))
    assert all(v["sha256"] for v in summary["versions"])

    longer = Server(run_config(tmp_path, keep_versions=1, rounds=9, count=1))
    result, trained = run(longer, lambda: site(longer.endpoint, "a", 1.0))
    assert (result.best_version, result.version, trained) == (4, 9, [2])
    kept = sorted(path.name for path in (config.run_folder / "models").iterdir())
    assert kept == [f"round-{version:04d}.safetensors" for version in (4, 9)]
