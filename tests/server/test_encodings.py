"""Whole runs with encoded updates over loopback sockets, against the mean of what each encoding stands for."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedcore import _core
from fedcore.config import RunConfig, parse_run
from fedcore.errors import ConfigError, IntegrityError
from fedcore.server.service import Server
from fedcore.site import encoded, machine, waits
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

from ..support.runs import run

COUNT = 300_000
LAYOUT = _core.Layout([("w", "F32", [COUNT]), ("n", "I64", [2])])
SPECS = [("w", "F32", [COUNT]), ("n", "I64", [2])]
ROUNDS = 3
WEIGHTS = {"a": 3, "b": 5}
Flat = NDArray[np.uint8]


def config(folder: Path, transfer: dict[str, Any], **people: Any) -> RunConfig:
    return parse_run(
        {
            "run": {"name": "t", "rounds": people.pop("rounds", ROUNDS)},
            "participants": {"round_deadline": "300s", "sites": list(WEIGHTS), **people},
            "server": {"insecure": True, "listen": "tcp://127.0.0.1:0"},
            "transfer": transfer,
        },
        folder=folder,
    )


def start() -> Flat:
    dice = np.random.default_rng(0)
    counts = np.array([1, 2], np.int64).view(np.uint8)
    values = dice.standard_normal(COUNT).astype(np.float32).view(np.uint8)
    return np.concatenate([counts, values])  # the order of the flat bytes


def trained(flat: Flat, name: str, round_: int) -> Flat:
    """What a site makes of the global model: the same in every run."""
    step = np.random.default_rng([round_, *name.encode()]).standard_normal(COUNT) * 0.01
    values = flat[16:].view(np.float32) + step.astype(np.float32)
    return np.concatenate([np.array([7, 7], np.int64).view(np.uint8), values.view(np.uint8)])


def site(
    server: Server, name: str, *, nan_in: int = 0, spoil: int = 1234
) -> Callable[[], dict[str, Any]]:
    """Train in each round; return what was counted."""

    def part() -> dict[str, Any]:
        session = Session(SiteSettings(server=server.endpoint, site=name, connect_timeout=200))
        try:
            while session.is_running():
                first = start()
                parts = {"n": first[:16], "w": first[16:]}
                model = session.begin(SPECS, {}, lambda key, parts=parts: parts[key].tobytes())
                if model.kind == "evaluate":
                    session.end_task()
                    continue
                flat = np.concatenate([np.frombuffer(model.tensors[k], np.uint8) for k in "nw"])
                new = trained(flat, name, model.round)
                if model.round == nan_in:
                    new[16:].view(np.float32)[spoil] = np.nan
                parts = {"n": new[:16], "w": new[16:]}
                session.submit(lambda key, parts=parts: parts[key].tobytes(), WEIGHTS[name])
            assert session.connection.link is not None
            return dict(session.connection.link.exchange.stats())
        finally:
            session.close()

    return part


def run_sites(server: Server) -> tuple[Any, list[Any]]:
    return run(server, site(server, "a"), site(server, "b"))  # type: ignore[arg-type]


class Reference:
    """A site's encoder, written out: what is sent stands for, and what is carried over."""

    def __init__(self, transfer: dict[str, Any]) -> None:
        self.codec = _core.Codec(LAYOUT, transfer["update"], False, transfer.get("top_k", 0.01))
        self.residual = np.zeros(LAYOUT.total_bytes, np.uint8)

    def __call__(self, local: Flat, base: Flat, *, counts: bool = True) -> Flat:
        got, rest = np.empty_like(local), np.empty_like(local)
        for index in range(LAYOUT.chunk_count):
            at, nbytes = LAYOUT.chunk_range(index)
            p = slice(at, at + nbytes)
            body = self.codec.encode(index, local[p], base[p], self.residual[p])
            self.codec.decode(index, *body, got[p], base[p])
            self.codec.carry(index, local[p], self.residual[p], got[p], rest[p])
        if counts:
            self.residual = rest
        return got


def mean(updates: dict[str, Flat], base: Flat) -> Flat:
    out = bytearray(4 * COUNT)
    _core.mean("F32", [u[16:] for u in updates.values()], [WEIGHTS[n] for n in updates], out)
    return np.concatenate([base[:16], np.frombuffer(bytes(out), np.uint8)])


def committed(folder: Path, version: int) -> Flat:
    model = load_file(folder / f"runs/t/models/round-{version:04d}.safetensors")
    return np.concatenate([model["n"].view(np.uint8), model["w"].view(np.uint8)])


@pytest.mark.parametrize("lossless", [False, True])
@pytest.mark.parametrize("update", ["bf16", "fp16", "int8", "nf4", "top-k"])
def test_each_model_is_the_mean_of_what_the_encoded_updates_stand_for(
    tmp_path: Path, update: str, lossless: bool
) -> None:
    transfer = {"update": update, "lossless": lossless}
    server = Server(config(tmp_path, transfer))
    result, stats = run_sites(server)
    assert result.ok
    references = {name: Reference(transfer) for name in WEIGHTS}
    model = start()
    for version in range(ROUNDS + 1):
        assert committed(tmp_path, version).tobytes() == model.tobytes()
        updates = {n: r(trained(model, n, version + 1), model) for n, r in references.items()}
        model = mean(updates, model)
    ratio = {"bf16": 1.99, "fp16": 1.99, "int8": 3.8, "nf4": 7.5, "top-k": 60}[update]
    sent, more = sorted(each["bytes_out"] for each in stats)  # one gave the initial model, too
    assert sent < ROUNDS * LAYOUT.total_bytes / ratio + 20_000
    came = min(each["bytes_in"] for each in stats)
    assert came / ((ROUNDS + 1) * LAYOUT.total_bytes) < (0.97 if lossless else 1.01)
    said = json.loads((tmp_path / "runs/t/summary.json").read_text())["bytes_in"]
    assert abs(said - sent - more) < 10_000


@pytest.mark.parametrize("update", ["int8", "raw"])
def test_a_model_that_changes_while_sites_train_from_it_makes_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: str
) -> None:
    path = tmp_path / "runs/t/models/round-0001.safetensors"
    good = trained

    def put(value: bytes) -> None:  # an integer, which is taken from the model whatever is sent
        path.chmod(0o644)  # an exported model is read-only
        with path.open("r+b") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            file.write(value)

    def spoiling(flat: Flat, name: str, round_: int) -> Flat:
        if round_ == 2:  # both have pulled it
            both_train.wait(200)
        return good(flat, name, round_)

    both_train = threading.Barrier(2, action=lambda: put(b"\x63"))
    monkeypatch.setitem(globals(), "trained", spoiling)
    first = config(tmp_path, {"update": update})
    server = Server(first)
    listen = first.server.model_copy(update={"listen": server.endpoint})
    with ThreadPoolExecutor(2) as pool:
        sites = [pool.submit(site(server, name)) for name in WEIGHTS]
        with pytest.raises(IntegrityError, match=r"round-0001\.safetensors has changed.*rollback"):
            server.run()
        assert not path.with_name("round-0002.safetensors").exists()
        put(b"\x01")
        assert Server(first.model_copy(update={"server": listen})).run().ok
        assert all(one.result(200) for one in sites)
    assert committed(tmp_path, ROUNDS)[:16].tobytes() == start()[:16].tobytes()


def test_an_update_with_nan_leaves_raw_and_is_refused_by_tensor_and_element(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    transfer = {"update": "int8"}
    server = Server(config(tmp_path, transfer, min_results=1))
    result, _ = run(server, site(server, "a"), site(server, "b", nan_in=2))  # type: ignore[arg-type]
    assert result.ok
    assert (
        "the update of b is left out of round 2: NaN or infinity in tensor 'w', element 1234"
        in (caplog.text)
    )
    references = {name: Reference(transfer) for name in WEIGHTS}
    model = start()
    for version in range(1, ROUNDS + 1):
        there = ["a"] if version == 2 else ["a", "b"]
        updates = {n: references[n](trained(model, n, version), model) for n in there}
        model = mean(updates, model)
        assert committed(tmp_path, version).tobytes() == model.tobytes()


def test_a_site_without_lz4_takes_part_uncompressed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(config(tmp_path, {"update": "bf16", "lossless": True}))
    for module in (encoded, machine, waits):
        monkeypatch.setattr(module, "can_pack", lambda: False)
    result, _ = run_sites(server)
    assert result.ok
    assert caplog.text.count("the package lz4 is missing") == 2
    references = {name: Reference({"update": "bf16"}) for name in WEIGHTS}
    model = start()
    for version in range(1, ROUNDS + 1):
        updates = {n: r(trained(model, n, version), model) for n, r in references.items()}
        model = mean(updates, model)
        assert committed(tmp_path, version).tobytes() == model.tobytes()


def test_a_server_without_lz4_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcore.server.opening.can_pack", lambda: False)
    with pytest.raises(ConfigError, match=r"transfer\.lossless needs the Python package lz4"):
        Server(config(tmp_path, {"lossless": True}))


def test_a_run_keeps_its_encoding(tmp_path: Path) -> None:
    server = Server(config(tmp_path, {"update": "top-k", "top_k": 0.1}, rounds=1))
    assert run_sites(server)[0].ok
    for other, said in [
        ({"update": "nf4"}, "transfer.update: it was 'top-k' and is now 'nf4'"),
        ({"update": "top-k", "top_k": 0.2}, "transfer.top_k: it was 0.1 and is now 0.2"),
        ({"update": "top-k", "top_k": 0.1, "lossless": True}, "transfer.lossless: it was False"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(said)):
            Server(config(tmp_path, other, rounds=2))
    again = Server(config(tmp_path, {"update": "top-k", "top_k": 0.1}, rounds=2))
    assert run_sites(again)[0].ok


@pytest.mark.parametrize(
    ("transfer", "said"),
    [
        ({"update": "int4"}, "transfer.update: expected 'raw', 'bf16', 'fp16', 'int8', 'nf4' or 'top-k'"),
        ({"update": "top-k", "top_k": 0}, "transfer.top_k: expected greater than 0"),
        ({"update": "top-k", "top_k": 1.5}, "transfer.top_k: expected less than or equal to 1"),
        ({"update": "nf4", "top_k": 0.1}, "top_k is for update = 'top-k'"),
        ({"lossless": "yes"}, "transfer.lossless: expected a valid boolean"),
        ({"upload": "nf4"}, "unknown key 'transfer.upload'; expected one of update, top_k, lossless"),
    ],
)  # fmt: skip
def test_a_setting_that_is_wrong_is_named(
    tmp_path: Path, transfer: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, transfer)
    assert said in str(caught.value)
