"""Runs in which the products of adapters' factors are combined: mixed ranks, bytes, kills, what is refused."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fedcore.config import RunConfig, parse_run
from fedcore.errors import ConfigError, LayoutError, RefusedError, StorageError
from fedcore.model_file import open_model
from fedcore.server.factors import Factors
from fedcore.server.service import Server
from fedcore.server.storage.files import Files
from fedcore.server.storage.store import Store
from fedcore.server.versions import Versions
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.local import LocalNetwork

from ..support.factor_runs import joined, models, reader, values_of

SIZES = {"m0": (40, 30), "m1": (12, 50)}  # rows and columns of each adapted module
PREFIX = "base_model.model."
PAIRS = tuple((f"{PREFIX}{m}.lora_A.weight", f"{PREFIX}{m}.lora_B.weight") for m in SIZES)
OF = dict(zip(SIZES, PAIRS, strict=True))
RANKS = {"a": 2, "b": 5, "c": 16}
WEIGHTS = {"a": 3, "b": 8, "c": 5}
MAX_RANK = 16
MOST = {"m0": 16, "m1": 12}  # ranks of the global model
NUMPY = {"F32": np.float32, "I64": np.int64}
CARD = {
    "peft_type": "LORA",
    "target_modules": ["m0", "m1"],
    "use_rslora": True,
    "lora_dropout": 0.1,
}
Values = dict[str, np.ndarray]


def specs(rank: int) -> list[tuple[str, str, list[int]]]:
    found = [("head", "F32", [7]), ("seen", "I64", [1])]
    for module, (rows, columns) in SIZES.items():
        a, b = OF[module]
        found += [(a, "F32", [rank, columns]), (b, "F32", [rows, rank])]
    return found


def first(rank: int) -> Values:
    """A site's first model: the same product at all, as B is 0 but for two columns."""
    found: Values = {"head": np.arange(7, dtype=np.float32), "seen": np.array([5])}
    for module, (rows, columns) in SIZES.items():
        dice = np.random.default_rng([1, *module.encode()])
        b = np.zeros((rows, rank), np.float32)
        b[:, :2] = dice.standard_normal((rows, 2)) / 4
        a = dice.standard_normal((rank, columns)).astype(np.float32)
        found |= dict(zip(OF[module], (a, b), strict=True))
    return found


def given(model: Values, rank: int) -> Values:
    """The best part of a rank, as a site takes it: the first rows of A and columns of B."""
    found = dict(model)
    for a, b in PAIRS:
        whole_a, whole_b = model[a], model[b]
        found[a] = np.zeros((rank, whole_a.shape[1]), np.float32)
        found[b] = np.zeros((whole_b.shape[0], rank), np.float32)
        kept = min(rank, len(whole_a))
        found[a][:kept], found[b][:, :kept] = whole_a[:kept], whole_b[:, :kept]
    return found


def trained(model: Values, site: str, round_: int) -> Values:
    found = {}
    for name, value in given(model, RANKS[site]).items():
        dice = np.random.default_rng([round_, *site.encode(), *name.encode()])
        step = dice.standard_normal(value.shape).astype(np.float32) / 8
        found[name] = value if name == "seen" else value + step
    return found


def products(values: Mapping[str, np.ndarray]) -> Values:
    return {
        m: values[b].astype(np.float64) @ values[a].astype(np.float64) for m, (a, b) in OF.items()
    }


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def dense(
    before: Values,
    updates: Mapping[str, Values],
    *,
    zero: bool = False,
    weights: Mapping[str, float] = WEIGHTS,
) -> Values:
    """The next products by the formula, in binary64 and with NumPy's SVD."""
    total, found = sum(weights[site] for site in updates), {}
    for module, w in products(before).items():
        following = np.zeros_like(w) if zero else w.copy()
        for site, update in updates.items():
            taken = 0 if zero else products(given(before, RANKS[site]))[module]
            following += weights[site] / total * (products(update)[module] - taken)
        found[module] = best(following, MOST[module])
    return found


def config(folder: Path, rounds: int = 3, **sections: Any) -> RunConfig:
    aggregation = {"lora": "exact", "max_rank": MAX_RANK, **sections.pop("aggregation", {})}
    values = {
        "run": {"name": "t", "rounds": rounds},
        "participants": {"sites": list(RANKS), "round_deadline": "1h"},
        "server": {"insecure": True},
        "aggregation": aggregation,
    }
    return parse_run(values | sections, folder=folder)


def card(rank: int) -> str:
    return json.dumps({**CARD, "r": rank, "lora_alpha": 2 * rank})


def take_part(
    network: LocalNetwork,
    name: str,
    *,
    waits: threading.Event | None = None,
    leaves: bool = False,
    **options: Any,
) -> list[int]:
    """Return the rounds trained. Round 2 is sent after ``waits`` is set, or the last thing before the end."""
    session = Session(SiteSettings("local", name, idle_timeout=200, **options), network.dial)
    rank, rounds = RANKS[name], []
    try:
        while session.is_running():
            files = {"adapter_config.json": card(rank)}
            model = session.begin(specs(rank), files, reader(first(rank)), roles={}, pairs=PAIRS)
            session.score({"loss": 1.0}, 1)
            if model.kind == "evaluate":
                session.end_task()
                continue
            update = trained(values_of(model), name, model.round)
            if model.round == 2 and waits is not None:
                assert waits.wait(200)
            session.submit(reader(update), WEIGHTS[name])
            rounds.append(model.round)
            if model.round == 2 and leaves:
                return rounds
    finally:
        session.close()
    return rounds


def finish(server: Server, pool: ThreadPoolExecutor, network: LocalNetwork, **options: Any) -> None:
    with ExitStack() as stack:
        stack.callback(server.stop)
        result = pool.submit(server.run)
        sites = [pool.submit(take_part, network, name, **options) for name in RANKS]
        assert result.result(200).ok
        for done in sites:
            done.result(200)


def run_through(run: RunConfig, **options: Any) -> Path:
    with joined() as (network, pool):
        finish(Server(run, link=network.server()), pool, network, **options)
    return run.run_folder


@functools.cache
def undisturbed() -> tuple[dict[str, bytes], ...]:
    """The versions of a run without any fault."""
    with tempfile.TemporaryDirectory() as folder:
        return as_bytes(models(run_through(config(Path(folder)))))


def as_bytes(found: list[Values]) -> tuple[dict[str, bytes], ...]:
    return tuple({n: v.tobytes() for n, v in one.items()} for one in found)


@pytest.mark.parametrize("base", ["difference", "zero"])
def test_a_round_adds_the_weighted_products_of_sites_of_any_rank(base: str, tmp_path: Path) -> None:
    folder = run_through(config(tmp_path, aggregation={"base": base}))
    found = models(folder)
    assert len(found) == 4
    for module, product in products(first(2)).items():
        np.testing.assert_allclose(products(found[0])[module], product, rtol=0, atol=1e-5)
    for round_ in (1, 2, 3):
        before, after = found[round_ - 1], found[round_]
        updates = {site: trained(before, site, round_) for site in RANKS}
        wanted = dense(before, updates, zero=base == "zero")
        for module, product in products(after).items():
            scale = np.abs(wanted[module]).max()
            np.testing.assert_allclose(product, wanted[module], rtol=0, atol=1e-5 * scale)
            a, b = (after[name].astype(np.float64) for name in OF[module])
            assert a.shape[0] == b.shape[1] == MOST[module]
            np.testing.assert_allclose(a @ a.T, np.eye(len(a)), atol=1e-5)
            norms = np.linalg.norm(b, axis=0)
            assert (np.diff(norms) <= 1e-6 * norms[0]).all(), "the best part is the first columns"
        heads = sum(WEIGHTS[s] * updates[s]["head"].astype(np.float64) for s in RANKS) / 16
        assert after["head"].tobytes() == heads.astype(np.float32).tobytes()
        assert after["seen"].tolist() == [5]
    header = open_model(folder / "models/round-0003.safetensors").metadata
    assert header["fedcore.lora"] == f"exact {MAX_RANK}{' zero' if base == 'zero' else ''}"
    told = json.loads((folder / "final/adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["use_rslora"]) == (16, 16, False)
    assert told["rank_pattern"] == told["alpha_pattern"] == {"^m1": 12}
    assert sorted(p.name for p in (folder / "models").iterdir()) == [
        f"round-000{version}.safetensors" for version in range(4)
    ]


@pytest.mark.parametrize(
    "sections", [{"transfer": {"lossless": True}}, {"server": {"insecure": True, "spill": False}}]
)
def test_the_bytes_do_not_depend_on_how_updates_travel(sections: Any, tmp_path: Path) -> None:
    assert as_bytes(models(run_through(config(tmp_path, **sections)))) == undisturbed()


@pytest.mark.parametrize(
    ("sections", "weights"),
    [
        ({"weights": "equal"}, {"a": 1, "b": 1, "c": 1}),
        ({"max_share": 0.4}, {"a": 0.225, "b": 0.4, "c": 0.375}),
    ],
)
def test_products_have_the_weights_that_the_run_file_says(
    sections: Any, weights: Any, tmp_path: Path
) -> None:
    found = models(run_through(config(tmp_path, 1, aggregation=sections)))
    updates = {site: trained(found[0], site, 1) for site in RANKS}
    for module, wanted in dense(found[0], updates, weights=weights).items():
        atol = 1e-5 * np.abs(wanted).max()
        np.testing.assert_allclose(products(found[1])[module], wanted, rtol=0, atol=atol)


def test_the_log_says_what_the_mean_of_the_factors_would_be_and_what_is_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fedcore.server")
    folder = run_through(config(tmp_path, 2))
    of = json.loads((folder / "summary.json").read_text())["versions"][2]["factors"]
    assert (of["modules"], of["of"], of["total"]["rank"]) == (2, 2, 16)
    off, cut = of["total"]["of_norm"], of["total"]["cut"] / of["total"]["norm"]
    assert off > 0.01
    assert 0 < cut < 0.5
    assert "round 2: the mean of the factors, filled up with zeros where ranks" in caplog.text
    assert f"differ, would be {100 * off:.3g} % off" in caplog.text
    assert f"; {100 * cut:.3g} % is cut at rank 16" in caplog.text


KILLS: dict[str, tuple[type, str, bool]] = {
    "all is reduced": (Versions, "whole", False),
    "the version is written": (Versions, "whole", True),
    "its file has its name": (Files, "put_in_place", True),
}


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("moment", KILLS)
def test_a_server_killed_at_a_commit_goes_on_to_the_same_bytes(
    moment: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is copied as it is at that moment, and another server goes on with the copy."""
    run, later = config(tmp_path / "first"), config(tmp_path / "copy")
    of, name, after = KILLS[moment]
    done = getattr(of, name)
    copied = []

    def killed(self: Any, version: int, *args: Any) -> Any:
        found = done(self, version, *args) if after or version != at else None
        if version == at and not copied:
            copied.append(shutil.copytree(run.run_folder, later.run_folder))
            raise StorageError("killed")
        return found

    monkeypatch.setattr(of, name, killed)
    with joined() as (network, pool):
        result = pool.submit(Server(run, link=network.server()).run)
        sites = [pool.submit(take_part, network, name) for name in RANKS]
        with pytest.raises(StorageError, match="killed"):
            result.result(200)
        monkeypatch.undo()
        server = Server(later, link=network.server())
        with ExitStack() as stack:
            stack.callback(server.stop)
            assert pool.submit(server.run).result(200).ok
            for done in sites:
                done.result(200)
    assert as_bytes(models(later.run_folder)) == undisturbed()


def test_a_site_that_is_started_again_delivers_its_update_without_training(tmp_path: Path) -> None:
    """The server is another one by then, which the site has told nothing of its rank."""
    back = threading.Event()
    with joined() as (network, pool):
        run = config(tmp_path)
        server = Server(run, link=network.server())
        with ExitStack() as stack:
            stack.callback(server.stop)
            stack.callback(back.set)
            result = pool.submit(server.run)
            others = [pool.submit(take_part, network, name, waits=back) for name in "bc"]
            work = tmp_path / "work"
            assert take_part(network, "a", leaves=True, work=work) == [1, 2]
            back.set()
            assert take_part(network, "a", work=work) == [3]
            assert result.result(200).ok
            assert [other.result(200) for other in others] == [[1, 2, 3]] * 2
    assert as_bytes(models(run.run_folder)) == undisturbed()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_run_begins_with_an_adapters_folder_of_any_rank_and_scale(
    dtype: Any, tmp_path: Path
) -> None:
    folder, values = tmp_path / "adapter", first(3)
    factors = {name for pair in PAIRS for name in pair}
    folder.mkdir()
    save_file(
        {n: v.astype(dtype) if n in factors else v for n, v in values.items()},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(card(3))
    made = run_through(config(tmp_path, 1, model={"initial": str(folder)}))
    found, scale = models(made), 6 / 3**0.5  # rank-stabilised
    for module, product in products(values).items():
        atol = 1e-5 if dtype is np.float32 else 1e-2
        np.testing.assert_allclose(products(found[0])[module], scale * product, atol=atol)
    updates = {site: trained(found[0], site, 1) for site in RANKS}
    for module, wanted in dense(found[0], updates).items():
        np.testing.assert_allclose(products(found[1])[module], wanted, atol=1e-4)
    told = json.loads((made / "best/adapter_config.json").read_text())
    assert (told["r"], told["lora_alpha"], told["rank_pattern"]) == (16, 16, {"^m1": 12})


def test_a_run_does_not_begin_with_what_is_no_adapter(tmp_path: Path) -> None:
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    run = config(tmp_path, 1, model={"initial": str(tmp_path / "model.safetensors")})
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json: .*folder of an adapter"):
        Server(run).run()


def declaring(
    run: RunConfig,
    site: str,
    rank: int,
    tensors: Any = None,
    pairs: Any = PAIRS,
    *,
    text: str | None = None,
) -> None:
    """Declare an adapter as a site of a run that no other site takes part in."""
    with joined() as (network, pool):
        server = Server(run, link=network.server())
        serving = pool.submit(server.run)
        session = Session(SiteSettings("local", site, idle_timeout=200), network.dial)
        try:
            with closing(session):
                assert session.is_running()
                files = {"adapter_config.json": card(rank) if text is None else text}
                session.begin(
                    tensors or specs(rank), files, reader(first(rank)), roles={}, pairs=pairs
                )
        finally:
            server.stop()
            serving.result(200)


def of_half_precision() -> list[tuple[str, str, list[int]]]:
    return [(n, "BF16" if n == PAIRS[0][0] else d, s) for n, d, s in specs(2)]


@pytest.mark.parametrize(
    ("tensors", "pairs", "reason"),
    [
        (specs(17), PAIRS, r"has rank 17, and aggregation\.max_rank is 16: take a lower rank"),
        (of_half_precision(), PAIRS, r"is BF16 of shape \[2, 30\]: .* matrices of F32"),
        (specs(2), (), r"names no factors of a LoRA adapter, which aggregation\.lora = 'exact'"),
    ],
)
def test_an_adapter_that_can_not_be_combined_is_refused_by_name(
    tensors: Any, pairs: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises((LayoutError, RefusedError), match=reason):
        declaring(config(tmp_path), "a", 2, tensors, pairs)


@pytest.mark.parametrize("text", ["not json", "[1]", "[" * 9999])
def test_a_damaged_adapter_config_puts_out_its_site_and_not_the_server(
    text: str, tmp_path: Path
) -> None:
    with pytest.raises(LayoutError, match=r"site 'a': adapter_config\.json: not the"):
        declaring(config(tmp_path), "a", 2, text=text)


def test_ranks_of_an_adapter_that_has_not_become_the_runs_are_no_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site declares one module, and leaves; another one declares two, and then it does, too."""
    run, fewer = config(tmp_path, 1), [s for s in specs(3) if "m1" not in s[0]]
    said, keep = threading.Event(), Factors.keep_ranks

    def kept(self: Factors, site: str, declare: Any) -> None:
        keep(self, site, declare)
        if site == "b":
            said.set()

    monkeypatch.setattr(Factors, "keep_ranks", kept)
    with joined() as (network, pool):
        server = Server(run, link=network.server())
        with ExitStack() as stack:
            stack.callback(server.stop)
            result = pool.submit(server.run)
            with closing(
                Session(SiteSettings("local", "a", idle_timeout=200), network.dial)
            ) as one:
                assert one.is_running()
                files = {"adapter_config.json": card(3)}
                with pytest.raises(LayoutError, match="are no bytes"):
                    one.begin(fewer, files, no_bytes, roles={}, pairs=PAIRS[:1])
            other = pool.submit(take_part, network, "b")
            assert said.wait(60), result.exception(1)
            sites = [other, *(pool.submit(take_part, network, name) for name in "ac")]
            assert result.result(200).ok
            assert [done.result(200) for done in sites] == [[1]] * 3
    assert as_bytes(models(run.run_folder)) == undisturbed()[:2]


def no_bytes(name: str) -> bytes:
    raise LayoutError(f"of {name} there are no bytes")


def test_a_huge_first_adapter_leaves_finite_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normal = first
    huge = dict.fromkeys(PAIRS[0], 3e38)
    monkeypatch.setitem(
        globals(),
        "first",
        lambda rank: {n: np.full_like(v, huge.get(n, v)) for n, v in normal(rank).items()},
    )
    found = models(run_through(config(tmp_path, 1)))
    assert all(np.isfinite(tensor).all() for one in found for tensor in one.values())
    assert np.abs(found[0][PAIRS[0][1]]).max() == np.finfo(np.float32).max


def test_a_run_goes_on_with_the_rank_and_base_that_it_began_with(tmp_path: Path) -> None:
    run_through(config(tmp_path, 1))
    with pytest.raises(ConfigError, match="is finished"):
        Server(config(tmp_path, 1, aggregation={"base": "difference"})).run()
    for changed in ({"max_rank": 17}, {"base": "zero"}):
        with pytest.raises(ConfigError, match=rf"another aggregation\.{next(iter(changed))}"):
            Server(config(tmp_path, 2, aggregation=changed)).run()


def test_memory_that_does_not_hold_a_modules_factors_is_refused_at_the_declaration(
    tmp_path: Path,
) -> None:
    large = [(n, d, [s[0], 1 << 21] if n == PAIRS[0][0] else s) for n, d, s in specs(16)]
    run = config(tmp_path, server={"insecure": True, "memory": "64MiB"})
    with pytest.raises(LayoutError, match=r"memory is too little for the adapter of site 'a'"):
        declaring(run, "a", 16, large)


def test_a_model_beyond_memory_is_looked_at_without_memory_or_disk(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    free = shutil.disk_usage(tmp_path).free
    file = store.untouched(1 << 38)
    assert file.size == 1 << 38
    assert free - shutil.disk_usage(tmp_path).free < 1 << 30
    assert not list(store.models.glob(".*untouched"))
    store.close()


def test_room_on_the_disk_is_looked_for_in_the_rank_of_the_global_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Store, "check_space", lambda _, nbytes: asked.append(nbytes))
    run_through(config(tmp_path, 1))
    own = {sum(prod(s) * (8 if d == "I64" else 4) for _, d, s in specs(r)) for r in RANKS.values()}
    whole = 4 * sum(MOST[m] * (rows + columns) for m, (rows, columns) in SIZES.items()) + 36
    assert set(asked) <= {nbytes + whole for nbytes in own}
    assert asked


def test_a_site_keeps_the_rank_with_which_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with joined() as (network, pool):
        finish(Server(config(tmp_path, 1), link=network.server()), pool, network)
    monkeypatch.setitem(RANKS, "a", 3)
    text = "site 'a' had an adapter of rank 2 in this run, and now one of rank 3: start it with"
    later = config(tmp_path, 2)
    with joined() as (network, pool):
        server = Server(later, link=network.server())
        with ExitStack() as stack:
            stack.callback(server.stop)
            pool.submit(server.run)
            with pytest.raises(RefusedError, match=text):
                take_part(network, "a")


@pytest.mark.parametrize(("value", "counts"), [(np.nan, False), (3e38, True), (0.0, True)])
def test_a_hostile_factor_is_no_update_or_leaves_finite_numbers(
    value: float, counts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN takes its update out, by name. What is finite counts, as with the mean: huge, or of no rank at all."""
    honest = trained

    def hostile(model: Values, site: str, round_: int) -> Values:
        found = honest(model, site, round_)
        if site == "a" and round_ == 2:
            found |= {name: np.full_like(found[name], value) for name in PAIRS[0]}
        return found

    monkeypatch.setitem(globals(), "trained", hostile)
    of = {"sites": list(RANKS), "min_results": 2, "round_deadline": "1h"}
    run = config(tmp_path, participants=of)
    with joined() as (network, pool):
        server = Server(run, link=network.server())
        with ExitStack() as stack:
            stack.callback(server.stop)
            result = pool.submit(server.run)
            for name in RANKS:
                pool.submit(take_part, network, name)
            assert result.result(200).ok
    found = models(run.run_folder)
    assert all(np.isfinite(tensor).all() for one in found for tensor in one.values())
    updates = {site: hostile(found[1], site, 2) for site in (RANKS if counts else "bc")}
    for module, wanted in dense(found[1], updates).items():
        if value < 1 or module == "m1":
            atol = 1e-5 * np.abs(wanted).max()
            np.testing.assert_allclose(products(found[2])[module], wanted, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        (
            {"aggregation": {"max_rank": None}},
            r"aggregation\.max_rank: missing; lora = 'exact' needs",
        ),
        (
            {"aggregation": {"lora": "freeze-a"}},
            r"max_rank: it is for lora = 'exact'; leave it out",
        ),
        ({"transfer": {"update": "int8"}}, r"transfer\.update: 'int8'.*factors are turned"),
        ({"aggregation": {"rule": "median"}}, r"rule: 'median' .*weighted means"),
        ({"aggregation": {"ema": 0.9}}, r"ema.*average of the factors"),
        ({"aggregation": {"optimizer": {"name": "adam"}}}, r"optimizer.*turn from round to round"),
        ({"aggregation": {"max_rank": 0}}, r"max_rank"),
    ],
)
def test_what_does_not_go_with_products_is_refused_by_name(
    sections: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        config(tmp_path, **sections)
