"""Rules of several passes in whole runs: the bytes of the rule over files, and who was left out and knows it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore._core import Layout
from fedcore.config import RunConfig, parse_run
from fedcore.errors import ConfigError
from fedcore.files.average import aggregate_files
from fedcore.model_file import create_model, open_model
from fedcore.server.service import Server
from fedcore.server.storage.past import read_past
from fedcore.server.storage.store import Store

from ..support.rule_sites import sites_of
from ..support.runs import run

COUNT = 100_000
LIAR = "e"


def config(folder: Path, sites: int, rule: str = "krum", **sections: Any) -> RunConfig:
    server = {"listen": "tcp://127.0.0.1:0", "insecure": True, **sections.pop("server", {})}
    values = {
        "run": {"name": "t", "rounds": 2},
        "participants": {"count": sites, "round_deadline": "300s"},
        "aggregation": {"rule": rule},
        "server": server,
    }
    return parse_run(values | sections, folder=folder)


def update(name: str, round_: int) -> np.ndarray:
    dice = np.random.default_rng([round_, *name.encode()])
    honest = np.random.default_rng(round_).standard_normal(COUNT) * 0.1
    scale = 100 if name == LIAR else 1
    return ((honest + dice.standard_normal(COUNT) * 0.01) * scale).astype(np.float32)


def weights_of(path: Path, values: bytes) -> Path:
    model = create_model(path, Layout([("w", "F32", [COUNT])]))
    model.view("w")[:] = values
    model.file.sync()
    return path


def of_files(
    folder: Path,
    names: str,
    round_: int,
    rule: tuple[str, dict[str, float]],
    base: Path | None = None,
) -> bytes:
    """Return what the rule with its options makes of the same updates in files."""
    paths = [weights_of(folder / name, update(name, round_).tobytes()) for name in names]
    out = folder / f"out-{round_}"
    aggregate_files(paths, None, out, rule=rule[0], settings=rule[1], base=base)
    return bytes(open_model(out).view("w"))


@pytest.mark.parametrize(("rule", "threads"), [("krum", 1), ("multi-krum", 3)])
def test_a_run_has_the_bytes_of_the_rule_over_files_and_names_the_liar(
    rule: str, threads: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = Server(config(tmp_path, 5, rule, server={"threads": threads}))
    result, _ = run(server, *sites_of(server, "abcde", update))
    assert result.ok
    store = Store(tmp_path / "runs/t", None)
    for row in store.versions()[1:]:
        store.verify(row.version)
        (tmp_path / f"{row.version}").mkdir()
        wanted = of_files(tmp_path / f"{row.version}", "abcde", row.version, (rule, {"f": 1}))
        model = open_model(store.path(row.version))
        assert bytes(model.view("w")) == wanted
        assert model.metadata["fedcore.rule"].startswith(f"{rule} 1 f=")
        assert row.verdict is not None
        assert LIAR in row.verdict.left_out
        assert row.participants == {p.site: 1 for p in row.verdict.kept}
        assert not row.verdict.squares
    store.close()
    assert f"{LIAR} 1.9" in caplog.text.partition("left out: ")[2].partition("\n")[0]
    assert "has left this site's update out: sum of squared distances" in caplog.text
    version = read_past(tmp_path / "runs/t").versions[-1]
    assert [of.site for of in version.updates] == list("abcde")
    assert max(version.updates, key=lambda of: of.score).site == LIAR
    assert version.updates[4].weight == 0
    summary = json.loads((tmp_path / "runs/t/summary.json").read_text())
    assert summary["versions"][1]["updates"][LIAR]["weight"] == 0


def test_of_the_nearest_two_of_three_a_run_takes_the_one_that_files_have(tmp_path: Path) -> None:
    chosen = {"rule": "krum", "options": {"f": 0}}  # their scores are equal
    server = Server(config(tmp_path, 3, aggregation=chosen, run={"name": "t", "rounds": 1}))
    result, _ = run(server, *sites_of(server, "abc", update))
    assert result.ok
    store = Store(tmp_path / "runs/t", None)
    made, (_, row) = bytes(open_model(store.path(1)).view("w")), store.versions()
    store.close()
    assert row.verdict is not None
    least, other, _ = sorted(row.verdict.decision.scores)
    assert least == other
    assert made == of_files(tmp_path, "abc", 1, ("krum", {"f": 0}))


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("rfa", {}),
        ("centred-clipping", {"radius": 20.0}),
        ("norm-clipping", {"bound": 20.0}),
    ],
)
def test_a_rule_that_weighs_or_shortens_the_step_has_the_bytes_of_files(
    rule: str, options: dict[str, float], tmp_path: Path
) -> None:
    chosen = {"rule": rule, "options": options}
    server = Server(config(tmp_path, 5, aggregation=chosen, run={"name": "t", "rounds": 1}))
    result, _ = run(server, *sites_of(server, "abcde", update))
    assert result.ok
    store = Store(tmp_path / "runs/t", None)
    (row,) = store.versions()[1:]
    store.close()
    assert row.verdict is not None
    base = None
    if rule != "rfa":
        assert row.verdict.decision.base > 0
        base = weights_of(tmp_path / "base", bytes(open_model(store.path(0)).view("w")))
    wanted = of_files(tmp_path, "abcde", 1, (rule, options), base)
    assert bytes(open_model(store.path(1)).view("w")) == wanted


def test_the_log_names_sites_whose_share_is_bounded_before_a_rule_decides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    chosen = {"rule": "rfa", "weights": "examples", "max_share": 0.3}
    server = Server(config(tmp_path, 5, aggregation=chosen, run={"name": "t", "rounds": 1}))
    result, _ = run(server, *sites_of(server, "abcde", update))
    assert result.ok
    assert caplog.text.count("e counts for 30 % by aggregation.max_share") == 1


@pytest.mark.parametrize("encoding", ["int8", "nf4"])
def test_a_run_with_encoded_updates_momentum_and_little_memory_has_the_same_bytes(
    encoding: str, tmp_path: Path
) -> None:
    found = []
    for name, server in (("wide", {"threads": 3}), ("narrow", {"threads": 1, "memory": "16MiB"})):
        made = config(
            tmp_path / name,
            5,
            transfer={"update": encoding},
            aggregation={"rule": "multi-krum", "optimizer": {"name": "momentum"}},
            server=server,
        )
        started = Server(made)
        result, _ = run(started, *sites_of(started, "abcde", update))
        assert result.ok
        store = Store(tmp_path / name / "runs/t", None)
        found.append([bytes(open_model(store.path(v)).view("w")) for v in (1, 2)])
        assert all(LIAR in row.verdict.left_out for row in store.versions()[1:] if row.verdict)
        store.close()
    assert found[0] == found[1]


def test_what_a_rule_of_several_passes_can_not_have_is_refused_as_the_file_is_read(
    tmp_path: Path,
) -> None:
    def refused(**sections: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            config(tmp_path, 5, **sections)
        return str(caught.value)

    few = refused(participants={"count": 5, "min_results": 4})
    assert "aggregation.rule = 'krum' needs 5 or more updates in a round (2 f + 3" in few
    assert "three allow f = 0 alone" in few
    assert "; f = 1" in few
    config(tmp_path, 3, aggregation={"rule": "krum", "options": {"f": 0}})
    several = {"rule": "multi-krum", "options": {"f": 1, "m": 5}}
    assert "m = 5: expected at most 4" in refused(aggregation=several)
    assert "top-k" in refused(transfer={"update": "top-k"})
    with pytest.raises(ConfigError, match="needs a chunk of the updates of all 400 sites"):
        Server(config(tmp_path, 400, server={"memory": "16MiB"}))
