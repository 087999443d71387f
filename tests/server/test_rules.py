"""A rule other than the mean in whole runs: what is refused at the start, the bytes, and the size of chunks."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.config import RunConfig, parse_run
from fedcore.errors import ConfigError
from fedcore.model_file import open_model
from fedcore.rules import RULES, Option, PythonRule, Rule
from fedcore.rules.python import load_rule
from fedcore.server.budget import Budget
from fedcore.server.collecting import Collecting
from fedcore.server.rule import rule_of
from fedcore.server.service import Server
from fedcore.server.storage.store import Store

from ..support.python_rules import Busy, Mean, Median, Trimmed, named
from ..support.rule_sites import sites_of
from ..support.runs import run

MIB = 1 << 20
COUNT = 300_000


def config(folder: Path, sites: int, rule: str = "median", **sections: Any) -> RunConfig:
    server = {"listen": "tcp://127.0.0.1:0", "insecure": True, **sections.pop("server", {})}
    values = {
        "run": {"name": "t", "rounds": 1},
        "participants": {"count": sites, "round_deadline": "300s"},
        "aggregation": {"rule": rule},
        "server": server,
    }
    return parse_run(values | sections, folder=folder)


def update(name: str, round_: int) -> np.ndarray:
    dice = np.random.default_rng([round_, *name.encode()])
    return dice.standard_normal(COUNT).astype(np.float32)


def close(server: Server) -> None:
    server.runs[0].store.close()
    server.link.close()


def median(names: str, round_: int) -> bytes:
    values = np.stack([update(name, round_) for name in names]).astype(np.float64)
    return np.median(values, axis=0).astype(np.float32).tobytes()


def test_a_run_takes_the_median_and_says_that_weights_do_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    server = Server(config(tmp_path, 4, run={"name": "t", "rounds": 2}))
    result, _ = run(server, *sites_of(server, "abcd", update))
    assert result.ok
    assert (
        "rule median (version 1): the median of each element; weights do not count" in caplog.text
    )
    store = Store(tmp_path / "runs/t", None)
    for version in (1, 2):
        store.verify(version)
        model = open_model(store.path(version))
        assert bytes(model.view("w")) == median("abcd", version)
        assert model.metadata["fedcore.rule"] == "median 1"
    assert "fedcore.rule" not in open_model(store.path(0)).metadata


@pytest.mark.parametrize(("kind", "update_"), [(Median, "raw"), (Median, "fp16"), (Mean, "raw")])
def test_a_run_by_a_rule_in_python_has_the_bits_of_the_same_rule_in_the_core(
    tmp_path: Path, kind: type[PythonRule], update_: str
) -> None:
    found = []
    for rule in (named(kind), kind.__name__.lower()):
        folder, transfer = tmp_path / rule.partition(":")[0], {"update": update_}
        made = config(folder, 4, rule, transfer=transfer, server={"threads": 3})
        server = Server(made)
        result, _ = run(server, *sites_of(server, "abcd", update))
        assert result.ok
        found.append(open_model(Store(folder / "runs/t", None).path(1)))
    assert bytes(found[0].view("w")) == bytes(found[1].view("w"))
    metadata = found[0].metadata
    assert metadata["fedcore.rule"] == f"{named(kind)} 1"
    assert metadata["fedcore.rule-code"] == load_rule(named(kind)).code
    assert "fedcore.rule-code" not in found[1].metadata


def test_a_rule_that_is_busy_with_other_things_holds_up_neither_server_nor_sites(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server(config(tmp_path, 3, named(Busy), run={"name": "t", "rounds": 2}))
    result, _ = run(server, *sites_of(server, "abc", update))
    assert result.ok
    store = Store(tmp_path / "runs/t", None)
    for version in (1, 2):
        assert bytes(open_model(store.path(version)).view("w")) == median("abc", version)
    assert "is lost" not in caplog.text
    assert "3 sources" in capsys.readouterr().out


@pytest.mark.parametrize("rule", [named(Trimmed), "trimmed-mean"], ids=["python", "core"])
def test_the_settings_of_a_rule_change_the_model_and_are_recorded_in_it(
    tmp_path: Path, rule: str
) -> None:
    names = "abcde"
    values = np.stack([update(name, 1) for name in names]).astype(np.float64)
    for trim, options in ((1, {}), (2, {"trim": 2})):
        folder = tmp_path / str(trim)
        chosen = {"rule": rule, "options": options}
        server = Server(config(folder, 5, aggregation=chosen))
        result, _ = run(server, *sites_of(server, names, update))
        assert result.ok
        model = open_model(Store(folder / "runs/t", None).path(1))
        expected = np.sort(values, axis=0)[trim : 5 - trim].mean(axis=0).astype(np.float32)
        assert bytes(model.view("w")) == expected.tobytes()
        assert model.metadata["fedcore.rule"] == f"{rule} 1 trim={float(trim).hex()}"


def test_a_run_weighs_its_sites_as_its_file_says_and_keeps_what_they_weighed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    values = [update(name, 1).astype(np.float64) for name in "abc"]  # of 3, 10 and 17 examples
    for setting, weights, recorded in (
        ({"weights": "equal"}, [1, 1, 1], "equal"),
        ({"max_share": 0.5}, [3, 10, 13], "examples max_share=0.5"),
    ):
        folder = tmp_path / recorded[:5]
        server = Server(config(folder, 3, aggregation=setting))
        result, _ = run(server, *sites_of(server, "abc", update))
        assert result.ok
        store = Store(folder / "runs/t", None)
        assert store.versions()[1].participants == dict(zip("abc", weights, strict=True))
        model = open_model(store.path(1))
        assert model.metadata["fedcore.weights"] == recorded
        wanted = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert bytes(model.view("w")) == wanted.astype(np.float32).tobytes()
        store.close()
    assert "the updates of all sites weigh the same" in caplog.text
    assert "no site counts for more than 50 %" in caplog.text
    assert "c counts for 50 % by aggregation.max_share; its examples are 56.67 %" in caplog.text
    with pytest.raises(ConfigError, match=r"aggregation\.max_share: it was 0\.5 and is now 0\.4"):
        Server(config(folder, 3, aggregation={"max_share": 0.4}))


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"max_share": 0.3}, r"min_results: aggregation.max_share = 0.3 needs 4 or more .* and 3"),
        ({"max_share": 1.5}, r"aggregation.max_share: expected a number above 0 and below 1"),
        ({"max_share": 0.5, "weights": "equal"}, r"aggregation.max_share: equal weights"),
        (
            {"max_share": 0.5, "rule": "median"},
            r"max_share: 0.5 does not go .*: weights do not count",
        ),
        (
            {"weights": "examples", "rule": "median"},
            r"weights: 'examples' does not go .*: weights do not count",
        ),
        ({"weights": "loud"}, r"aggregation.weights: .*'examples' or 'equal'"),
    ],
)
def test_weights_that_can_not_be_are_refused_when_the_file_is_read(
    tmp_path: Path, setting: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=text):
        config(tmp_path, 3, aggregation=setting)
    assert config(tmp_path, 3, aggregation={"weights": "equal", "rule": "median"})


def test_a_trimmed_mean_needs_more_updates_than_it_leaves_out(tmp_path: Path) -> None:
    chosen = {"rule": "trimmed-mean", "options": {"trim": 2}}
    text = r"participants.min_results: aggregation.rule = 'trimmed-mean' needs 5 or more updates .* and 4"
    with pytest.raises(ConfigError, match=text):
        config(tmp_path, 4, aggregation=chosen)
    assert config(tmp_path, 5, aggregation=chosen).aggregation.options == {"trim": 2}
    usual = rule_of(config(tmp_path, 4, "trimmed-mean"))
    assert (usual.least, usual.recorded) == (3, "trimmed-mean 1 trim=0x1.0000000000000p+0")
    with pytest.raises(ConfigError, match=r"aggregation.options: trim: expected an integer"):
        config(tmp_path, 5, aggregation={"rule": "trimmed-mean", "options": {"trim": 0.5}})


def test_a_rule_in_python_that_does_not_weigh_is_refused_a_greatest_share(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not weigh"):
        Server(config(tmp_path, 3, aggregation={"rule": named(Median), "max_share": 0.5}))


def test_chunks_of_a_run_are_as_small_as_a_rule_needs_and_stay_so(tmp_path: Path) -> None:
    names = "abcdefghij"
    server = Server(config(tmp_path, len(names), server={"memory": "16MiB"}))
    result, _ = run(server, *sites_of(server, names, update))
    assert result.ok
    store = Store(tmp_path / "runs/t", None)
    assert store.chunk_bytes == MIB // 2
    store.verify(1)
    assert bytes(open_model(store.path(1)).view("w")) == median(names, 1)
    store.close()
    more = config(tmp_path, len(names), run={"name": "t", "rounds": 2}, server={"memory": "1GiB"})
    again = Server(more)
    versions = again.runs[0].versions
    versions.open_last(1)  # it is compared with its checksum
    assert versions.model is not None
    assert versions.model.layout.chunk_bytes == MIB // 2
    close(again)


@pytest.mark.parametrize("spill", [True, False])
def test_a_median_that_memory_does_not_hold_is_refused_with_the_least_that_does(
    tmp_path: Path, spill: bool
) -> None:
    for update_, sites in (("raw", 150), ("int8", 120)):
        made = functools.partial(config, tmp_path, sites, transfer={"update": update_})
        small = made(server={"memory": "16MiB", "spill": spill})
        with pytest.raises(ConfigError, match=rf"'median', which .* all {sites} sites") as refused:
            Budget.of_run(small, encrypted=False)
        least = int(str(refused.value).rpartition("at least ")[2].removesuffix("MiB"))
        enough = made(server={"memory": f"{least}MiB", "spill": spill})
        assert Budget.of_run(enough, encrypted=False).chunk_bytes == 64 << 10
        little = made(server={"memory": f"{least - 1}MiB", "spill": spill})
        with pytest.raises(ConfigError, match=f"{least}MiB"):
            Budget.of_run(little, encrypted=False)
    with pytest.raises(ConfigError, match="too little"):
        Server(small)
    assert not (tmp_path / "runs").exists()


def test_a_run_without_a_model_gets_the_chunks_that_memory_holds(tmp_path: Path) -> None:
    found = []
    for memory in ("1GiB", "16MiB", "16MiB"):
        server = Server(config(tmp_path, 40, server={"memory": memory}))
        store = server.runs[0].store
        found.append((store.chunk_bytes, store.run_id))
        close(server)
    (large, first), (small, second), again = found
    assert (large, small) == (MIB, 64 << 10)
    assert first != second  # what a site has in other chunks is of no use
    assert again == (small, second)


def test_a_median_without_room_to_read_chunks_back_goes_without_a_spill_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = "abcdefghij"
    sizes = []
    for memory, rounds in (("40MiB", 1), ("24MiB", 2)):  # 20 and then 10 chunks of 1 MiB
        given = config(tmp_path, 10, run={"name": "t", "rounds": rounds}, server={"memory": memory})
        server = Server(given)
        assert server.config.server.spill == (rounds == 1)
        assert run(server, *sites_of(server, names, update))[0].ok
        assert any("nothing is spilled" in text for text in caplog.messages) == (rounds == 2)
        sizes.append(server.runs[0].store.chunk_bytes)
    assert sizes == [MIB, MIB]
    store = Store(tmp_path / "runs/t", None)
    assert bytes(open_model(store.path(2)).view("w")) == median(names, 2)
    store.close()


def test_a_model_of_chunks_that_memory_holds_no_longer_is_refused(tmp_path: Path) -> None:
    little = config(tmp_path, 10, server={"memory": "16MiB"})
    with pytest.raises(ConfigError, match=r"all 10 sites .* at least \d+MiB"):
        Budget.of_run(little, encrypted=False, chunk_bytes=MIB)


def test_a_mean_has_chunks_of_one_mebibyte_whatever_the_memory(tmp_path: Path) -> None:
    mean = config(tmp_path, 40, "mean", server={"memory": "20MiB"})
    assert Budget.of_run(mean, encrypted=True) == Budget.of(
        20 * MIB, 40, spill=True, encrypted=True
    )


def test_a_rule_is_refused_by_name_where_it_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"aggregation.rule: expected one of 'mean', 'median', 'trimmed-mean', .*, got 'mode'",
    ):
        config(tmp_path, 2, "mode")
    with pytest.raises(ConfigError, match="aggregation.rule: expected 'package.module:Class'"):
        config(tmp_path, 2, "../a:B")
    with pytest.raises(ConfigError, match="'no_such:Rule' can't be imported: .* in PYTHONPATH"):
        Server(config(tmp_path, 2, "no_such:Rule"))
    with pytest.raises(ConfigError, match=r"options: unknown key 'trim' of 'median'.*no options"):
        config(tmp_path, 2, aggregation={"rule": "median", "options": {"trim": 1}})
    chosen = {"rule": named(Trimmed), "options": {"trim": 0}}
    with pytest.raises(ConfigError, match="Trimmed': options: trim: expected an integer"):
        Server(config(tmp_path, 2, aggregation=chosen))
    with pytest.raises(ConfigError, match="Trimmed' needs 3 or more updates .* and 2 would do"):
        Server(config(tmp_path, 2, named(Trimmed)))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ConfigError, match=r"transfer.update: 'top-k' does not go with .*'median'"):
        config(tmp_path, 2, transfer={"update": "top-k"})
    assert config(tmp_path, 2, "mean", transfer={"update": "top-k"}).transfer.update == "top-k"


def test_a_rule_of_the_core_takes_its_options_from_the_run_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trim = Option(1, 0, 100, "values left out at either end", whole=True)
    rule = replace(RULES["trimmed-mean"], name="cut", least=1, options={"trim": trim})
    monkeypatch.setitem(RULES, "cut", rule)

    def of(sites: int, **options: float) -> Rule:
        return rule_of(config(tmp_path, sites, aggregation={"rule": "cut", "options": options}))

    assert (of(3).core, of(3).least) == (("cut", {"trim": 1.0}), 3)
    assert (of(5, trim=2).core, of(5, trim=2).least) == (("cut", {"trim": 2.0}), 5)
    with pytest.raises(ConfigError, match=r"options: unknown key 'trin' of 'cut'; .* 'trim'\?"):
        of(5, trin=2)
    with pytest.raises(ConfigError, match="options: trim: expected an integer at least 0"):
        of(5, trim=0.5)
    with pytest.raises(ConfigError, match="min_results: .* 'cut' needs 5 or more .* 4 would do"):
        of(4, trim=2)


def test_what_was_reduced_by_another_rule_is_not_gone_on_with(tmp_path: Path) -> None:
    keys = set()
    one, two = ({"rule": named(Trimmed), "options": {"trim": trim}} for trim in (1, 2))
    for number, chosen in enumerate(({"rule": "mean"}, {"rule": "median"}, one, two)):
        server = Server(config(tmp_path / str(number), 5, aggregation=chosen))
        collecting: Collecting = server.runs[0].collecting
        keys.add(collecting.scratch(1).of)
        close(server)
    assert len(keys) == 4
