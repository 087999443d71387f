"""The survey of updates as they arrive: distances against exact fractions, then the mean of those that count.

In any order, with threads, instruction sets, chunk sizes, spilled chunks, lost sites and encodings.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from fractions import Fraction
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
    Record,
    SourceRejected,
)
from fedcore.encoding import UpdateEncoder
from fedcore.errors import ConfigError, LayoutError, ProtocolError

from ..support.frames import pass_frames
from ..support.spilling import CHUNK, CHUNKS, LAYOUT, WEIGHTS, Federation, spill_file, update
from ..support.surveying import BASE, Surveyed, exact, mean, surveyed, values


@pytest.fixture(autouse=True)
def restore_level() -> Iterator[None]:
    before = _core.simd_level()
    yield
    _core.set_simd_level(before)


def test_distances_are_those_of_exact_fractions_with_the_base_as_the_last_row() -> None:
    names = "abc"
    found = surveyed(names)
    files = [*map(update, names), BASE]
    for (i, one), (j, other) in itertools.product(enumerate(files), repeat=2):
        assert found[i][j] == found[j][i]
        wanted = exact(one, other)
        assert abs(Fraction(found[i][j]) - wanted) <= wanted / 10**9


def test_arrival_threads_and_instruction_set_change_no_bit_of_a_distance() -> None:
    wanted = surveyed("abcde")
    for level, threads in itertools.product(_core.simd_levels(), (1, 3)):
        _core.set_simd_level(level)
        assert surveyed("abcde", threads, threads=threads) == wanted
    turned = surveyed("ecabd")
    rows = [*("abcde".index(name) for name in "ecabd"), 5]
    assert turned == [[wanted[i][j] for j in rows] for i in rows]


def test_a_chunk_of_another_size_changes_no_bit_of_a_distance() -> None:
    specs = [("x", "F64", [3]), ("w", "F32", [70_001]), ("h", "F16", [50_003])]
    dice = np.random.default_rng(5)
    flats = [
        dice.standard_normal(3).tobytes()
        + dice.standard_normal(70_001).astype(np.float32).tobytes()
        + dice.standard_normal(50_003).astype(np.float16).tobytes()
        for _ in range(4)
    ]
    found = set()
    for size in (64 << 10, 128 << 10, 1 << 20):
        layout = Layout([(n, d, s) for n, d, s in specs], size)
        server, collector = served(
            layout, flats[:3], flats[3], CollectorOptions(1 << 24, survey=True)
        )
        server.survey(collector, [0, 1, 2])
        carry(server, collector, layout, flats[:3])
        found.add(str(collector.distances))
    assert len(found) == 1


def served(
    layout: Layout, flats: list[bytes], base: bytes, options: CollectorOptions
) -> tuple[Exchange, Collector]:
    file = MappedFile.anonymous(len(base))
    file.write(0, base)
    collector = Collector.open(layout, len(flats), (file, 0), options)
    server = Exchange()
    server.start(collector)
    for k in range(len(flats)):
        server.add(collector, bytes([k + 1]), bytes([k + 1]) * 16, 1)
    return server, collector


def published(layout: Layout, flats: list[bytes]) -> dict[bytes, Exchange]:
    sites = {}
    for k, flat in enumerate(flats):
        file = MappedFile.anonymous(len(flat))
        file.write(0, flat)
        sites[bytes([k + 1])] = site = Exchange()
        site.publish(bytes([k + 1]) * 16, file, 0, layout.total_bytes, layout.chunk_bytes)
    return sites


def carry(server: Exchange, collector: Collector, layout: Layout, flats: list[bytes]) -> None:
    pass_frames(server, collector, published(layout, flats))


@pytest.mark.parametrize("base", [0, 7])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_updates_that_count_are_combined_after_a_survey(base: int, threads: int) -> None:
    weights = {"a": 3, "c": 1}
    federation = Surveyed("abcd", threads=threads)
    federation.survey()
    federation.run("abcd", 1)
    assert federation.collector.surveying
    federation.close("ac", weights, base)
    assert not federation.collector.done
    federation.run("abcd", 2)
    assert federation.result() == mean("ac", weights, base)
    assert federation.collector.checksums == federation.out.checksums()
    assert {n for (n, _), times in federation.asked.items() if times > 1} == {"a", "c"}


def test_what_was_spilled_in_a_survey_is_not_pulled_again(tmp_path: Path) -> None:
    names = "abcd"
    federation = Surveyed(names, 2 * len(names) * CHUNK, spill_file(tmp_path))
    federation.survey()
    federation.run("bcd")  # they are ahead of the first one
    federation.run(names)
    federation.close("bd", {"b": 1, "d": 1})
    federation.run(names)
    assert federation.result() == mean("bd", {"b": 1, "d": 1}, 0)
    again = sum(times > 1 for (name, _), times in federation.asked.items() if name in "bd")
    assert again <= 6


@pytest.mark.parametrize("threads", [1, 3])
def test_what_was_surveyed_is_kept_for_the_second_pass_as_far_as_there_is_room(
    tmp_path: Path, threads: int
) -> None:
    spill = spill_file(tmp_path)
    federation = Surveyed("abcd", 64 * CHUNK, spill, keep_surveyed=True, threads=threads)
    federation.survey()
    federation.run("abcd", 3)
    assert spill.used == 4 * CHUNKS
    federation.close("abd", {"a": 1, "b": 5, "d": 2}, 3)
    federation.run("", 4)  # nothing arrives
    assert federation.result() == mean("abd", {"a": 1, "b": 5, "d": 2}, 3)
    assert set(federation.asked.values()) == {1}
    (tmp_path / "full").mkdir()
    full = spill_file(tmp_path / "full", keep_free=1 << 60)
    federation = Surveyed("abcd", 64 * CHUNK, full, keep_surveyed=True)
    federation.survey()
    federation.run("abcd")
    federation.close("ab", {"a": 1, "b": 5})
    federation.run("ab")
    assert federation.result() == mean("ab", {"a": 1, "b": 5}, 0)


@pytest.mark.parametrize("seed", range(4))
def test_a_lost_site_takes_its_row_along_and_no_chunk_is_measured_again(
    tmp_path: Path, seed: int
) -> None:
    wanted = surveyed("abcd")
    dice = random.Random(seed)
    federation = Surveyed("abcd", 4 * 3 * CHUNK, spill_file(tmp_path) if seed % 2 else None)
    federation.survey()
    federation.run(dice.choice(["abcd", "abd"]), seed, until=dice.randrange(CHUNKS))
    before = federation.collector.progress()[0]
    lost = dice.choice("abcd")
    federation.lose(lost)
    assert federation.collector.progress()[0] >= before
    left = "abcd".replace(lost, "")
    federation.run(left, seed)
    rows = [*("abcd".index(name) for name in left), 4]
    assert federation.collector.distances == [[wanted[i][j] for j in rows] for i in rows]
    federation.close(left[1:], WEIGHTS)
    federation.run(left, seed)
    assert federation.result() == mean(left[1:], WEIGHTS, 0)


def test_a_site_that_is_lost_after_the_survey_is_left_out_of_what_is_combined() -> None:
    wanted = surveyed("abcd")
    federation = Surveyed("abcd")
    federation.survey()
    federation.run("abcd")
    federation.lose("b")
    assert federation.collector.distances == [
        [wanted[i][j] for j in (0, 2, 3, 4)] for i in (0, 2, 3, 4)
    ]
    federation.close("acd", WEIGHTS, 5)
    federation.run("acd", until=CHUNKS // 2)
    federation.lose("c")
    federation.run("ad")
    assert federation.result() == mean("ad", WEIGHTS, 5)


def test_buffers_count_in_no_distance_and_keep_the_mean_without_the_base() -> None:
    federation = Surveyed("abc", plain={"w"})
    federation.survey()
    federation.run("abc")
    wanted = exact(update("a"), update("b"), "d")
    assert abs(Fraction(federation.collector.distances[0][1]) - wanted) <= wanted / 10**9
    federation.close("ab", {"a": 1, "b": 3}, 4)
    federation.run("abc")
    shorter, plain = mean("ab", {"a": 1, "b": 3}, 4), mean("ab", {"a": 1, "b": 3}, 0)
    assert federation.result() == shorter[: 8 * 700] + plain[8 * 700 :]


def test_a_value_that_is_not_finite_is_refused_in_the_survey_by_its_site() -> None:
    federation = Surveyed("abc", b=CHUNKS // 2)
    federation.survey()
    federation.run("abc")
    (event,) = federation.events()
    assert isinstance(event, SourceRejected)
    assert event.source == 1
    federation.lose("b")
    federation.run("ac")
    assert federation.collector.distances[0][1] == surveyed("ac")[0][1]


def test_an_update_that_no_rule_can_compare_is_refused_and_the_others_stand() -> None:
    federation = Surveyed("abc")
    far = update("b")
    far.view("d")[8 * 600 : 8 * 601] = np.float64(1e145).tobytes()
    site = Exchange()
    site.publish(b"b" * 16, far.file, far.data_offset, LAYOUT.total_bytes, CHUNK)
    federation.sites[b"b"] = site
    federation.survey()
    federation.run("abc")
    (event,) = federation.events()
    assert isinstance(event, SourceRejected)
    assert (event.source, event.code) == (1, "distance")
    federation.lose("b")
    federation.run("ac")
    assert federation.collector.distances == surveyed("ac")


def test_chunks_that_hold_no_float_have_no_distance() -> None:
    layout = Layout([("n", "I64", [5 * 512]), ("w", "F32", [900])], CHUNK)
    flats = [bytes(8 * 5 * 512) + np.full(900, k, np.float32).tobytes() for k in range(4)]
    options = CollectorOptions(64 * CHUNK, survey=True)
    server, collector = served(layout, flats[:3], flats[3], options)
    server.survey(collector, [0, 1, 2])
    carry(server, collector, layout, flats[:3])
    assert collector.distances == [[900.0 * (a - b) ** 2 for b in range(4)] for a in range(4)]


@pytest.mark.parametrize("element", [0, 131_071, 131_072, 199_999])
def test_an_update_that_is_too_far_is_found_in_any_part_of_a_large_chunk(element: int) -> None:
    layout = Layout([("w", "F64", [200_000])], 1 << 20)
    values = np.zeros(200_000)
    values[element] = 1e145
    flats = [bytes(layout.total_bytes)] * 2 + [values.tobytes()]
    options = CollectorOptions(16 << 20, survey=True)
    server, collector = served(layout, flats, flats[0], options)
    server.survey(collector, [0, 1, 2])
    rejected = []

    def look() -> bool:
        for event in iter(server.next_event, None):
            if isinstance(event, SourceRejected):
                rejected.append((event.source, event.code))
                server.drop(collector, event.source)
        return False

    pass_frames(server, collector, published(layout, flats), look)
    assert rejected == [(2, "distance")]
    assert collector.distances == [[0.0] * 3] * 3


def test_where_most_updates_are_too_far_each_of_them_is_refused() -> None:
    federation = Surveyed("abc")
    for name, value in (("a", 1e200), ("b", -1e308)):
        far, site = update(name), Exchange()
        far.view("d")[-8:] = np.float64(value).tobytes()
        site.publish(name.encode() * 16, far.file, far.data_offset, LAYOUT.total_bytes, CHUNK)
        federation.sites[name.encode()] = site
    federation.survey()
    federation.run("abc")
    events = federation.events()
    assert [event.source for event in events if isinstance(event, SourceRejected)] == [0, 1]
    federation.lose("a")
    federation.lose("b")
    federation.run("c")
    assert federation.collector.distances == surveyed("c")


def test_a_killed_second_pass_goes_on_with_the_weights_that_were_decided(tmp_path: Path) -> None:
    weights = {"a": 3, "c": 1}
    record = Record.create(
        str(tmp_path / "r"), bytes(64), [("a", b"a" * 16, 3), ("c", b"c" * 16, 1)], CHUNKS
    )
    federation = Surveyed("abc")
    federation.survey()
    federation.run("abc")
    federation.close("ac", weights, 9, record)
    federation.run("ac", until=CHUNKS // 2)
    again = Federation("ac", 1 << 30)
    again.server.cancel(again.collector)
    again.out = federation.out
    again.collector = Collector(
        LAYOUT,
        [(n.encode(), n.encode() * 16, weights[n]) for n in "ac"],
        again.out.file,
        again.out.data_offset,
        (BASE.file, BASE.data_offset),
        CollectorOptions(64 * CHUNK, survey=True, base_weight=9),
        record=Record.open(str(tmp_path / "r")),
    )
    assert again.collector.progress()[0] >= CHUNKS // 2
    again.server.start(again.collector)
    again.run("ac")
    assert again.result() == mean("ac", weights, 9)
    assert len(again.asked) < 2 * CHUNKS


def lying(federation: Federation, name: str) -> None:
    """From now on a site sends other values than before."""
    file = update(name)
    file.view("w")[:] = (values(file, "w") * 100).astype(np.float32).tobytes()
    site = Exchange()
    site.publish(name.encode() * 16, file.file, file.data_offset, LAYOUT.total_bytes, CHUNK)
    federation.sites[name.encode()] = site


def test_a_site_that_sends_other_bytes_the_second_time_is_named_and_does_not_count() -> None:
    federation = Surveyed("abc", digest_key=os.urandom(1032))
    federation.survey()
    federation.run("abc")
    federation.close("ab", {"a": 1, "b": 2})
    lying(federation, "b")
    federation.run("ab")
    (*_, event) = federation.events()
    assert isinstance(event, SourceRejected)
    assert (event.source, event.code) == (1, "changed")
    federation.lose("b")
    federation.run("a")
    assert federation.result() == mean("a", {"a": 1}, 0)


def test_another_collector_takes_the_same_bytes_as_the_survey_and_no_others() -> None:
    key = os.urandom(1032)
    federation = Surveyed("abc", digest_key=key)
    federation.survey()
    federation.run("abc")
    digests = [federation.collector.digests(k) for k in range(3)]
    for liar in ("", "c"):
        again = Federation("ac", 1 << 30)
        again.server.cancel(again.collector)
        again.collector = Collector(
            LAYOUT,
            [(n.encode(), n.encode() * 16, 1) for n in "ac"],
            again.out.file,
            again.out.data_offset,
            (BASE.file, BASE.data_offset),
            CollectorOptions(64 * CHUNK, survey=True, digest_key=key),
            digests=[digests[0], digests[2]],
        )
        again.server.start(again.collector)
        if liar:
            lying(again, liar)
        again.run("ac")
        if liar:
            (event,) = again.events()
            assert isinstance(event, SourceRejected)
            assert event.code == "changed"
        else:
            assert again.result() == mean("ac", {"a": 1, "c": 1}, 0)


def test_a_digest_of_other_bytes_or_under_another_key_is_another_one() -> None:
    found = {
        str([federation_digests(key)]) for key in (bytes(range(8)) * 129, bytes(range(1, 9)) * 129)
    }
    assert len(found) == 2
    with pytest.raises(ConfigError, match="1032 bytes"):
        Surveyed("abc", digest_key=b"short")


def federation_digests(key: bytes) -> list[bytes]:
    federation = Surveyed("ab", digest_key=key)
    federation.survey()
    federation.run("ab")
    found = [federation.collector.digests(k) for k in range(2)]
    assert found[0] != found[1]
    assert all(len(of) == 8 * CHUNKS for of in found)
    return found


@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
def test_encoded_updates_are_measured_as_they_decode(encoding: str) -> None:
    layout = Layout([("w", "F32", [9_001]), ("steps", "I16", [600])], CHUNK)
    dice = np.random.default_rng(7)
    base = dice.standard_normal(9_001).astype(np.float32)
    rest = dice.integers(0, 99, 600).astype(np.int16).tobytes()
    flat_base = MappedFile.anonymous(layout.total_bytes)
    flat_base.write(0, base.tobytes() + rest)
    codec, sites, decoded = Codec(layout, encoding), {}, []
    for k in range(3):
        moved = MappedFile.anonymous(layout.total_bytes)
        step = dice.standard_normal(9_001).astype(np.float32) * np.float32(0.01)
        moved.write(0, (base + step).tobytes() + rest)
        made = UpdateEncoder(layout, encoding).encode(1, moved, 0, flat_base, 0)
        sites[bytes([k + 1])] = site = Exchange()
        site.publish_encoded(bytes([k + 1]) * 16, made.file, made.offsets, made.encodings)
        flat = bytearray(layout.total_bytes)
        for index, kind in enumerate(made.encodings):
            at, size = layout.chunk_range(index)
            begin, end = made.offsets[index : index + 2]
            with memoryview(flat)[at : at + size] as out:
                codec.decode(
                    index, kind, made.file.view(begin, end - begin), out, flat_base.view(at, size)
                )
        decoded.append(bytes(flat))
    flats = [*decoded, base.tobytes() + rest]
    options = CollectorOptions(1 << 20, codec=codec, survey=True)
    server, collector = served(layout, flats[:3], flats[3], options)
    server.survey(collector, [0, 1, 2])
    pass_frames(server, collector, sites)
    numbers = [np.frombuffer(flat[: 4 * 9_001], np.float32).astype(np.float64) for flat in flats]
    wanted = [[float(((a - b) ** 2).sum()) for b in numbers] for a in numbers]
    np.testing.assert_allclose(collector.distances, wanted, rtol=1e-9)


def test_a_survey_without_a_base_or_out_of_turn_is_refused() -> None:
    with pytest.raises(LayoutError, match="needs a base"):
        Collector.open(LAYOUT, 2, None, CollectorOptions(1 << 20, survey=True))
    place = BASE.file, BASE.data_offset
    with pytest.raises(ConfigError, match="is the mean"):
        Collector.open(LAYOUT, 2, place, CollectorOptions(1 << 20, survey=True, rule="median"))
    with pytest.raises(ConfigError, match="a survey needs a chunk of each of 40 sources"):
        Collector.open(LAYOUT, 40, place, CollectorOptions(8 * CHUNK, survey=True))
    federation = Surveyed("abc")
    with pytest.raises(ProtocolError, match="not surveyed yet"):
        federation.close("ab", WEIGHTS)
    federation.survey()
    with pytest.raises(ProtocolError, match="not done"):
        assert federation.collector.distances
    with pytest.raises(ProtocolError, match="not surveyed yet"):
        federation.close("ab", WEIGHTS)
