"""The median of updates as they arrive, in the core and in Python; against NumPy.

In any order, with spilled chunks, lost sites, encodings and after a kill.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from fedcore import _core
from fedcore._core import (
    Codec,
    Collector,
    CollectorOptions,
    Exchange,
    Layout,
    MappedFile,
    PythonRule,
    Record,
    SourceRejected,
)
from fedcore.encoding import UpdateEncoder
from fedcore.errors import ConfigError
from fedcore.rules.python import load_rule

from ..support.frames import pass_frames
from ..support.python_rules import Median, named
from ..support.spilling import CHUNK, CHUNKS, Federation, spill_file, update

COUNT = 9_001
ENCODED = Layout([("w", "F32", [COUNT]), ("steps", "I16", [600])], CHUNK)


def expected(names: str) -> bytes:
    """Return the flat bytes of the median of these sites' updates, by NumPy in binary64."""
    parts = []
    for dtype, name in (("<f8", "d"), ("<f4", "w")):  # as the layout orders them
        values = np.stack([np.frombuffer(update(site).view(name), dtype) for site in names])
        parts.append(np.median(values.astype(np.float64), axis=0).astype(dtype).tobytes())
    return b"".join([*parts, bytes(2 * 777)])  # the last tensor is zero in all of them


@pytest.fixture(params=["median", "python"])
def rule(request: pytest.FixtureRequest) -> str | PythonRule:
    return "median" if request.param == "median" else load_rule(named(Median)).core


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("names", ["abc", "abcd", "abcdefgh"])
def test_a_median_has_the_bits_of_numpy_in_any_order_of_arrival(
    names: str, threads: int, rule: str | PythonRule
) -> None:
    for seed in range(2):
        federation = Federation(names, 64 * CHUNK, rule=rule, threads=threads)
        federation.run(names, seed)
        assert federation.result() == expected(names)
        assert federation.collector.checksums == federation.out.checksums()


def test_the_order_of_the_sites_does_not_change_a_median() -> None:
    for names in ("abcd", "dcba", "bdac"):
        federation = Federation(names, 64 * CHUNK, rule="median")
        federation.run(names)
        assert federation.result() == expected("abcd")


@pytest.mark.parametrize("level", _core.simd_levels())
def test_each_instruction_set_gives_the_same_median(level: str) -> None:
    before = _core.simd_level()
    _core.set_simd_level(level)
    try:
        federation = Federation("abcdef", 64 * CHUNK, rule="median")
        federation.run("abcdef")
    finally:
        _core.set_simd_level(before)
    assert federation.result() == expected("abcdef")


def test_a_median_reads_back_what_was_spilled_of_more_sites_than_a_mean_does(
    tmp_path: Path, rule: str | PythonRule
) -> None:
    names = "abcdefgh"
    spill = spill_file(tmp_path)
    federation = Federation(names, 2 * len(names) * CHUNK, spill, rule=rule)
    federation.run(names.replace("d", ""))
    assert spill.used >= (len(names) - 1) * (CHUNKS - 2)
    federation.run(names)
    assert federation.result() == expected(names)
    assert {times for (name, _), times in federation.asked.items() if name != "d"} == {1}


@pytest.mark.parametrize("seed", range(4))
def test_a_median_without_a_lost_site_is_that_of_the_others(
    tmp_path: Path, seed: int, rule: str | PythonRule
) -> None:
    dice = random.Random(seed)
    spill = spill_file(tmp_path) if seed % 2 else None
    federation = Federation("abcd", 4 * 3 * CHUNK, spill, rule=rule)
    federation.run(dice.choice(["abcd", "abd"]), seed, until=dice.randrange(CHUNKS))
    lost = dice.choice("abcd")
    federation.lose(lost)
    left = "abcd".replace(lost, "")
    federation.run(left, seed)
    assert federation.result() == expected(left)


def test_a_median_is_refused_where_the_budget_holds_no_chunk_of_each_site() -> None:
    assert Federation("abcd", 4 * CHUNK, rule="median").collector.window == 1
    with pytest.raises(ConfigError, match=r"'median' needs a chunk of each of 4 sources.*holds 3"):
        Federation("abcd", 4 * CHUNK - 1, rule="median")
    opened = Collector.open(ENCODED, 2, None, CollectorOptions(2 * CHUNK, rule="median"))
    server = Exchange()
    server.start(opened)
    server.add(opened, b"a", b"a" * 16, 1)
    server.add(opened, b"b", b"b" * 16, 1)
    with pytest.raises(ConfigError, match="each of 3 sources"):
        server.add(opened, b"c", b"c" * 16, 1)


def test_a_narrow_budget_holds_a_median_with_the_same_bits() -> None:
    federation = Federation("abcde", 5 * CHUNK, rule="median", threads=4)
    federation.run("abcde")
    assert federation.result() == expected("abcde")
    assert federation.most == 1


def test_a_site_with_a_bad_value_is_named_and_left_out_of_the_median(
    rule: str | PythonRule,
) -> None:
    federation = Federation("abc", 3 * 4 * CHUNK, rule=rule, b=CHUNKS // 2)
    federation.run("abc")
    (event,) = federation.events()
    assert isinstance(event, SourceRejected)
    assert event.source == 1
    federation.lose("b")
    federation.run("ac")
    assert federation.result() == expected("ac")


def encoded_median(encoding: str, names: str, rule: str | PythonRule) -> tuple[bytes, bytes]:
    """Return the median of encoded updates, and what NumPy makes of what they decode to."""
    dice = np.random.default_rng(7)
    base = dice.standard_normal(COUNT).astype(np.float32)
    rest = dice.integers(0, 99, 600).astype(np.int16).tobytes()
    flat_base = mapped(base.tobytes() + rest)
    codec = Codec(ENCODED, encoding)
    sites, decoded = {}, []
    for name in names:
        moved = base + dice.standard_normal(COUNT).astype(np.float32) * np.float32(0.01)
        file = mapped(moved.tobytes() + rest)
        encoded = UpdateEncoder(ENCODED, encoding).encode(1, file, 0, flat_base, 0)
        sites[name.encode()] = site = Exchange()
        offsets, kinds = encoded.offsets, encoded.encodings
        site.publish_encoded(name.encode() * 16, encoded.file, offsets, kinds)
        flat = bytearray(ENCODED.total_bytes)
        for index, kind in enumerate(kinds):
            at, size = ENCODED.chunk_range(index)
            begin, end = offsets[index : index + 2]
            with memoryview(flat)[at : at + size] as out:
                codec.decode(
                    index,
                    kind,
                    encoded.file.view(begin, end - begin),
                    out,
                    flat_base.view(at, size),
                )
        decoded.append(np.frombuffer(bytes(flat[: 4 * COUNT]), np.float32))
    out = MappedFile.anonymous(ENCODED.total_bytes)
    sources = [(peer, peer * 16, 1) for peer in sites]
    collector = Collector(
        ENCODED,
        sources,
        out,
        0,
        (flat_base, 0),
        CollectorOptions(1 << 20, codec=codec, rule=rule),
    )
    server = Exchange()
    server.start(collector)
    pass_frames(server, collector, sites)
    wide = np.median(np.stack(decoded).astype(np.float64), axis=0)
    return bytes(out.view()), wide.astype(np.float32).tobytes() + rest


def mapped(data: bytes) -> MappedFile:
    file = MappedFile.anonymous(len(data))
    file.write(0, data)
    return file


@pytest.mark.parametrize("names", ["abc", "abcd"])
@pytest.mark.parametrize("encoding", ["bf16", "fp16", "int8", "nf4"])
def test_the_median_of_encoded_updates_is_that_of_what_they_decode_to(
    encoding: str, names: str, rule: str | PythonRule
) -> None:
    found, wanted = encoded_median(encoding, names, rule)
    assert found == wanted


def test_a_median_goes_on_where_a_killed_server_stood(
    tmp_path: Path, rule: str | PythonRule
) -> None:
    names = "abcd"
    sources = [(n.encode(), n.encode() * 16, 1) for n in names]
    path = str(tmp_path / "record")
    key = bytes(64)
    whole = Federation(names, 64 * CHUNK, rule=rule)
    whole.run(names)
    layout = whole.out.layout
    out = MappedFile.create(str(tmp_path / "out"), layout.total_bytes)
    record = Record.create(path, key, [("a" + n, n.encode() * 16, 1) for n in names], CHUNKS)
    options = CollectorOptions(8 * CHUNK, rule=rule)
    first = Collector(layout, sources, out, 0, None, options, record)
    half = CHUNKS // 2
    drive(first, whole.sites, until=half)
    assert half <= first.progress()[0] < CHUNKS
    del first, record
    found = Record.open(path)
    again = Collector(layout, sources, out, 0, None, options, found)
    assert again.progress()[0] >= half
    drive(again, whole.sites)
    assert bytes(out.view()) == whole.result() == expected(names)


def drive(collector: Collector, sites: dict[bytes, Exchange], until: int = CHUNKS) -> None:
    server = Exchange()
    server.start(collector)
    pass_frames(server, collector, sites, lambda: collector.progress()[0] >= until)
    server.cancel(collector)
