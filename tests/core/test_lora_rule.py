"""The rules for adapters in a collection: sources of other ranks than the output, in any order of arrival."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from fedcore import _core
from fedcore._core import (
    Collector,
    CollectorOptions,
    Exchange,
    Layout,
    LoraRule,
    Record,
    SourceRejected,
    WeighedRule,
)
from fedcore.errors import ConfigError, LayoutError
from fedcore.model_file import ModelFile, create_model
from fedcore.protocol import read_header

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

MODULES = {"attn.q": (130, 90), "attn.v": (40, 30), "mlp": (7, 300)}
GROUPS = [(f"{name}.lora_B.weight", f"{name}.lora_A.weight") for name in MODULES]
RANK = 8
CHUNK = 4096
DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64", "int32": "I32"}


@pytest.fixture(autouse=True)
def restore_level() -> Iterator[None]:
    before = _core.simd_level()
    yield
    _core.set_simd_level(before)


def adapter(rank: int, seed: int, scale: float = 1.0) -> dict[str, Array]:
    """Return factors of each module, and three tensors that are in no group."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for (b, a), (rows, columns) in zip(GROUPS, MODULES.values(), strict=True):
        tensors[b] = (scale * rng.normal(size=(rows, rank))).astype(np.float32)
        tensors[a] = rng.normal(size=(rank, columns)).astype(np.float32)
    tensors["head"] = rng.normal(size=1500).astype(np.float32)
    tensors["norm"] = rng.normal(size=77)
    tensors["steps"] = np.array([seed, 2], np.int32)
    return tensors


def layout_of(tensors: Tensors, chunk: int = CHUNK) -> Layout:
    table = [(name, DTYPES[str(x.dtype)], list(x.shape)) for name, x in tensors.items()]
    return Layout(table, chunk)


def store(tensors: Tensors, chunk: int = CHUNK) -> ModelFile:
    file = create_model(None, layout_of(tensors, chunk))
    for name, values in tensors.items():
        file.view(name)[:] = values.tobytes()
    return file


def load(file: ModelFile, like: Tensors) -> dict[str, Array]:
    return {
        name: np.frombuffer(bytes(file.view(name)), x.dtype).reshape(x.shape)
        for name, x in like.items()
    }


def in_form(tensors: Tensors, rank: int = RANK) -> dict[str, Array]:
    """Return an adapter with its products as recompress() writes them."""
    out = dict(tensors)
    for b, a in GROUPS:
        left, right, _, _ = _core.recompress([(1.0, tensors[b], tensors[a])], rank)
        more = rank - left.shape[1]
        out[b] = np.pad(left, ((0, 0), (0, more))).astype(np.float32)
        out[a] = np.pad(right, ((0, more), (0, 0))).astype(np.float32)
    return out


class Federation:
    """A server's exchange that collects the sites' adapters into one; a test decides the order of chunks."""

    def __init__(
        self,
        method: str,
        base: Tensors,
        sites: Sequence[Tensors],
        weights: Sequence[int],
        *,
        chunk: int = CHUNK,
        budget: int = 1 << 30,
        max_rank: int = 16,
        threads: int = 1,
    ) -> None:
        self.base, self.layout = base, layout_of(base, chunk)
        self.rule = LoraRule(method, self.layout, GROUPS, max_rank, threads=threads)
        self.options = CollectorOptions(budget, rule=self.rule, threads=threads)
        self.from_base = store(base, chunk)
        self.out = create_model(None, self.layout)
        self.server = Exchange()
        self.peers: list[tuple[bytes, Exchange, Layout]] = []
        self.sources: list[tuple[bytes, bytes, int]] = []
        for k, (tensors, weight) in enumerate(zip(sites, weights, strict=True)):
            site, file = Exchange(), store(tensors, chunk)
            name = f"{k:02}".encode()
            site.publish(name * 8, file.file, file.data_offset, file.layout.total_bytes, chunk)
            self.peers.append((name, site, file.layout))
            self.sources.append((name, name * 8, weight))

    def begin(self, out: ModelFile | None = None, record: Record | None = None) -> None:
        """Start a collection of all sources, or go on with the one of a record."""
        self.out = out or self.out
        self.collector = Collector(
            self.layout,
            self.sources,
            self.out.file,
            self.out.data_offset,
            (self.from_base.file, self.from_base.data_offset),
            self.options,
            record,
            own=[(own, None, None) for _, _, own in self.peers],
        )
        self.server.start(self.collector)

    def begin_open(self) -> None:
        """Start a collection to which sources are added one by one."""
        place = (self.from_base.file, self.from_base.data_offset)
        self.collector = Collector.open(self.layout, len(self.peers), place, self.options)
        self.server.start(self.collector)
        for source, (_, _, own) in zip(self.sources, self.peers, strict=True):
            self.server.add(self.collector, *source, layout=own)
        order = list(range(len(self.peers)))
        self.server.close(self.collector, order, self.out.file, self.out.data_offset)

    def run(self, order: int = 0, lost: int | None = None, until: int | None = None) -> None:
        """Let chunks arrive in an order of `order`'s choice; `lost` goes half way, `until` chunks are enough."""
        dice = random.Random(order)
        waiting: list[tuple[bytes, bytes, bytes]] = []
        now = idle = 0
        sites = {name: site for name, site, _ in self.peers}
        while idle < 40 and not self.collector.done:
            now += 10
            self.server.tick(now)
            while (request := self.server.next_out(now)) is not None:
                sites[request[0]].deliver(0, b"server", request[1], None)
            for name, site in sites.items():
                while (reply := site.next_out(0)) is not None:
                    if reply[2] is not None and read_header(reply[1]).index >= 0:
                        waiting.append((name, reply[1], bytes(reply[2])))
            idle = 0 if waiting else idle + 1
            if waiting:
                self.server.deliver(now, *waiting.pop(dice.randrange(len(waiting))))
            reduced, whole, _ = self.collector.progress()
            if until is not None and reduced >= until:
                return
            if lost is not None and reduced >= whole // 2:
                self.server.drop(self.collector, lost)
                lost = None

    def result(self) -> dict[str, Array]:
        assert self.collector.done, list(iter(self.server.next_event, None))
        return load(self.out, self.base)


def combine(
    method: str,
    base: Tensors,
    sites: Sequence[Tensors],
    weights: Sequence[int],
    *,
    order: int = 0,
    lost: int | None = None,
    later: bool = False,
    **options: int,
) -> tuple[dict[str, Array], list[dict[str, Any] | None]]:
    """Collect the sites' adapters; returns the output and the rule's reports."""
    federation = Federation(method, base, sites, weights, **options)
    if later:
        federation.begin_open()
    else:
        federation.begin()
    federation.run(order, lost)
    return federation.result(), federation.rule.reports()


def product(tensors: Tensors, module: int, rank: int | None = None) -> Array:
    b, a = GROUPS[module]
    return tensors[b][:, :rank].astype(float) @ tensors[a][:rank].astype(float)


def best(whole: Array, rank: int) -> Array:
    left, sigma, right = np.linalg.svd(whole, full_matrices=False)
    return np.asarray(left[:, :rank] * sigma[:rank] @ right[:rank])


def same(one: Tensors, other: Tensors) -> bool:
    return all(one[name].tobytes() == other[name].tobytes() for name in one)


RANKS, SHARES = [2, 5, 8, 3], [3, 1, 16777215, 7]


def test_exact_adds_what_each_product_differs_from_what_the_site_was_given() -> None:
    base = in_form(adapter(RANK, 1))
    sites = [adapter(rank, 10 + rank) for rank in RANKS]
    weights = [3, 1, 5, 7]
    made, reports = combine("exact", base, sites, weights)
    for module, report in enumerate(reports):
        change = sum(
            w / 16 * (product(site, module) - product(base, module, rank))
            for w, site, rank in zip(weights, sites, RANKS, strict=True)
        )
        whole = product(base, module) + change
        expected = best(whole, RANK)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(product(made, module), expected, rtol=0, atol=2e-6 * scale)
        assert report is not None
        rank = min(RANK, *MODULES[list(MODULES)[module]])
        assert report["rank"] == rank
        assert report["change"] == pytest.approx(np.linalg.norm(change), rel=1e-9)
        mean = sum(w / 16 * product(s, module) for w, s in zip(weights, sites, strict=True))
        assert report["sum"] == pytest.approx(np.linalg.norm(mean), rel=1e-9)
        cut = np.linalg.norm(whole - expected)
        assert report["cut"] == pytest.approx(cut, rel=1e-6, abs=1e-9)
        assert report["error"] > 0.1 * report["sum"]


def test_products_alone_forget_the_base() -> None:
    sites = [adapter(rank, 10 + rank) for rank in RANKS]
    made, _ = combine("products", in_form(adapter(RANK, 1)), sites, [3, 1, 5, 7])
    for module in range(len(MODULES)):
        mean = sum(w / 16 * product(s, module) for w, s in zip([3, 1, 5, 7], sites, strict=True))
        np.testing.assert_allclose(product(made, module), best(mean, RANK), rtol=0, atol=1e-4)


def test_the_bytes_do_not_depend_on_arrival_chunks_losses_or_instructions() -> None:
    base = in_form(adapter(RANK, 1))
    sites = [adapter(rank, 10 + rank) for rank in RANKS]
    first, reports = combine("exact", base, sites, SHARES)
    for order in (1, 2):
        again, same_reports = combine(
            "exact", base, sites, SHARES, order=order, later=order == 2, threads=2 * order - 1
        )
        assert same(first, again)
        assert reports == same_reports
    assert same(first, combine("exact", base, sites, SHARES, chunk=2 * CHUNK)[0])
    for level in _core.simd_levels():
        _core.set_simd_level(level)
        assert same(first, combine("exact", base, sites, SHARES)[0])
    for lost in (0, 3):
        left = [k for k in range(4) if k != lost]
        alone = combine("exact", base, [sites[k] for k in left], [SHARES[k] for k in left])[0]
        assert same(alone, combine("exact", base, sites, SHARES, lost=lost)[0])


def test_a_killed_collection_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    base = in_form(adapter(RANK, 1))
    sites = [adapter(rank, 10 + rank) for rank in RANKS]
    expected, _ = combine("exact", base, sites, SHARES)
    whole = Federation("exact", base, sites, SHARES)
    for until in range(1, whole.layout.chunk_count):
        path = str(tmp_path / f"record-{until}")
        names = [(name.decode(), set_id, weight) for name, set_id, weight in whole.sources]
        killed = Federation("exact", base, sites, SHARES)
        killed.begin(record=Record.create(path, bytes(64), names, killed.layout.chunk_count))
        killed.run(until, until=until)
        assert killed.collector.progress()[0] >= until
        again = Federation("exact", base, sites, SHARES)
        again.begin(killed.out, Record.open(path))
        assert again.collector.progress()[0] >= until
        again.run()
        assert same(expected, again.result())


def test_sites_may_send_factors_of_another_dtype_than_the_version_has() -> None:
    base = in_form(adapter(RANK, 1))
    names = [name for group in GROUPS for name in group]
    halves = [
        {n: x.astype(np.float16) for n, x in adapter(k, k).items() if n in names} for k in (2, 5)
    ]
    wide = [{n: x.astype(np.float32) for n, x in tensors.items()} for tensors in halves]
    factors = {name: x for name, x in base.items() if name in names}
    made = [combine("exact", factors, sites, [1, 2])[0] for sites in (halves, wide)]
    assert same(*made)


def test_equal_weights_and_bounded_shares_hold_for_products_too() -> None:
    base = in_form(adapter(RANK, 1))
    sites = [adapter(rank, 10 + rank) for rank in RANKS]
    for equal, max_share, same_as in ((True, 1_000_000, [1] * 4), (False, 400_000, [1, 1, 2, 1])):
        federation = Federation("exact", base, sites, [9, 9, 16777215, 9] if not equal else SHARES)
        rule = WeighedRule(federation.rule, equal, max_share)
        federation.options = CollectorOptions(1 << 30, rule=rule)
        federation.begin()
        federation.run()
        expected, _ = combine("exact", base, sites, same_as)
        for module in range(len(MODULES)):
            found, whole = product(federation.result(), module), product(expected, module)
            assert np.linalg.norm(found - whole) <= 1e-6 * np.linalg.norm(whole)


@pytest.mark.parametrize(
    ("ranks", "weights"), [([4, 8, 16], [5, 3, 1]), ([4, 8, 16, 64], [5, 2, 1, 1])]
)
def test_rounds_of_mixed_ranks_follow_a_dense_reference(
    ranks: list[int], weights: list[int]
) -> None:
    most = max(ranks)
    base = in_form(adapter(most, 1), most)
    dense = [product(base, module) for module in range(len(MODULES))]
    for number in range(12 if most < 64 else 20):
        sites = []
        for k, rank in enumerate(ranks):
            steps = adapter(rank, 100 * number + k, scale=0.2)
            for b, a in GROUPS:
                for name, given in ((b, base[b][:, :rank]), (a, base[a][:rank])):
                    steps[name] = (given + 0.3 * steps[name]).astype(np.float32)
            sites.append(steps)
        for module, whole in enumerate(dense):
            dense[module] = best(
                whole
                + sum(
                    w / 9 * (product(site, module) - best(whole, rank))
                    for w, site, rank in zip(weights, sites, ranks, strict=True)
                ),
                most,
            )
        base, _ = combine("exact", base, sites, weights, max_rank=most)
    for module, whole in enumerate(dense):
        far = np.linalg.norm(product(base, module) - whole)
        assert far <= 1e-4 * np.linalg.norm(whole)


def test_what_is_in_no_group_gets_the_mean_and_integers_are_the_base_s() -> None:
    base = in_form(adapter(RANK, 1))
    sites = [adapter(rank, 10 + rank) for rank in RANKS]
    for method in ("exact", "factors"):
        made, _ = combine(method, base, sites, SHARES)
        for name, dtype in (("head", "F32"), ("norm", "F64")):
            out = np.empty_like(base[name])
            _core.mean(dtype, [site[name] for site in sites], SHARES, out)
            assert made[name].tobytes() == out.tobytes()
        assert made["steps"].tolist() == base["steps"].tolist()


def test_factors_are_the_bits_of_the_mean_filled_up_with_zeros() -> None:
    base = adapter(RANK, 1)
    for ranks in ([RANK] * 4, RANKS):
        sites = [adapter(rank, 10 + k) for k, rank in enumerate(ranks)]
        made, reports = combine("factors", base, sites, SHARES)
        for (b, a), report in zip(GROUPS, reports, strict=True):
            filled = []
            for site, rank in zip(sites, ranks, strict=True):
                more = RANK - rank
                filled.append(
                    (
                        np.pad(site[b], ((0, 0), (0, more))),
                        np.pad(site[a], ((0, more), (0, 0))),
                    )
                )
            for i, name in ((0, b), (1, a)):
                out = np.empty_like(base[name])
                _core.mean("F32", [pair[i] for pair in filled], SHARES, out)
                assert made[name].tobytes() == out.tobytes()
            assert report is not None
            of_sum, error, _ = _core.factor_error(SHARES, [(s[b], s[a]) for s in sites])
            assert (report["sum"], report["error"]) == (of_sum, error)


def test_a_factor_that_no_site_sends_stays_as_the_base_has_it() -> None:
    base = adapter(RANK, 1)
    frozen = [a for _, a in GROUPS]
    sites = [
        {name: x for name, x in adapter(RANK, 10 + k).items() if name not in frozen}
        for k in range(3)
    ]
    made, reports = combine("factors", base, sites, [1, 2, 3])
    for (b, a), report in zip(GROUPS, reports, strict=True):
        assert made[a].tobytes() == base[a].tobytes()
        out = np.empty_like(base[b])
        _core.mean("F32", [site[b] for site in sites], [1, 2, 3], out)
        assert made[b].tobytes() == out.tobytes()
        assert report is not None
        assert report["error"] <= 1e-12 * report["sum"]


def test_sources_that_do_not_fit_are_refused_by_name() -> None:
    base = in_form(adapter(RANK, 1))
    good = adapter(4, 2)
    (b, a), *_ = GROUPS
    wrong: list[tuple[str, str, Tensors]] = [
        ("exact", "some sources lack", {n: x for n, x in good.items() if n != b}),
        ("exact", "different ranks", {**good, b: good[b][:, :3].copy()}),
        ("exact", "no factor of rank 1 to 16", adapter(17, 3)),
        ("exact", "no factor of rank 1 to 16", {**good, a: good[a][:, :5].copy()}),
        ("factors", "no factor of rank 1 to 8", adapter(9, 3)),
        ("exact", "some sources lack", {n: x for n, x in good.items() if n != "head"}),
        ("exact", "another dtype or shape", {**good, "head": good["head"][:9].copy()}),
        ("factors", "some sources lack", {n: x for n, x in good.items() if n != a}),
    ]
    for method, why, tensors in wrong:
        with pytest.raises(LayoutError, match=why):
            combine(method, base, [good, tensors], [1, 1])
    half = {name: x for name, x in good.items() if name != a}
    with pytest.raises(LayoutError, match="lacks a factor"):
        combine("exact", base, [half, half], [1, 1])
    with pytest.raises(LayoutError, match="must have the other in rank 8"):
        combine("factors", base, [half, half], [1, 1])
    with pytest.raises(ConfigError, match="chunks of 2 sources"):
        combine("exact", base, [good, good], [1, 1], budget=4 * CHUNK)


def test_a_hostile_factor_is_refused_or_counts_as_it_is() -> None:
    base = in_form(adapter(RANK, 1))
    good, huge, flat = adapter(4, 2), adapter(4, 3), adapter(4, 4)
    (b, a), *_ = GROUPS
    for name in (a, b):
        bad = {**good, name: good[name].copy()}
        bad[name].flat[11] = np.nan
        federation = Federation("exact", base, [good, bad], [1, 1])
        federation.begin()
        federation.run()
        events = list(iter(federation.server.next_event, None))
        [rejected] = [event for event in events if isinstance(event, SourceRejected)]
        assert (rejected.source, rejected.code) == (1, "nonfinite")
        assert name in rejected.message
    huge[a] = huge[a] * np.float32(1e20)
    flat[b][:, 1:] = flat[b][:, :1]  # of rank 1
    flat[a][:] = 0
    for site in (huge, flat):
        made, _ = combine("exact", base, [good, site], [1, 16777215])
        whole = product(base, 0) + sum(
            w / 2**24 * (product(s, 0) - product(base, 0, 4))
            for w, s in ((1, good), (16777215, site))
        )
        far = np.abs(product(made, 0) - best(whole, RANK)).max()
        assert far <= 1e-6 * np.linalg.norm(whole)


def test_a_table_of_groups_that_does_not_fit_the_layout_is_refused() -> None:
    layout = layout_of(adapter(RANK, 1))
    (b, a), (other, _), _ = GROUPS
    for method, groups, error in (
        ("exact", [(b, "nothing")], LayoutError),
        ("exact", [(a, b)], LayoutError),
        ("exact", [(b, "head")], LayoutError),
        ("exact", [(b, a), (other, a)], LayoutError),
        ("sum", [(b, a)], ConfigError),
    ):
        with pytest.raises(error):
            LoraRule(method, layout, groups, RANK)
