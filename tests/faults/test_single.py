"""One fault at a time, at every place where it can strike, with what the server says of it."""

from __future__ import annotations

import random

import pytest

from fedcore import protocol
from fedcore._core import Collector, CollectorOptions, Exchange, FrameMalformed, Layout, crc32c
from fedcore.errors import ProtocolError, WeightError
from fedcore.model_file import create_model
from fedcore.protocol import Kind, read_header
from fedcore.protocol import frame_header as header

from .faults import Fault, flipped, inject, once
from .reference import CHUNK, SPECIAL_BITS, flat, mean, random_update
from .world import LOST_MS, Frame, Site, World, chunk_frame

LAYOUT = Layout([("w", "F32", [5000]), ("h", "BF16", [777]), ("n", "I64", [3])], CHUNK)
WEIGHTS = {"a": 3, "b": (1 << 24) - 1, "c": 1}
UPDATES = {name: random_update(LAYOUT, seed) for seed, name in enumerate(WEIGHTS)}
EVERY_CHUNK = range(LAYOUT.chunk_count)


def world(seed: int = 0, budget: int = 6 * CHUNK) -> World:
    sites = [Site(name, weight, bytearray(UPDATES[name])) for name, weight in WEIGHTS.items()]
    return World(LAYOUT, sites, random.Random(seed), budget, None)


def exact(*names: str) -> bytes:
    return flat(LAYOUT, mean(LAYOUT, [(WEIGHTS[name], UPDATES[name]) for name in names]))


def test_without_a_fault_nobody_is_asked_twice_and_each_chunk_counts_once() -> None:
    undisturbed = world()
    undisturbed.run()
    assert undisturbed.result == exact("a", "b", "c")
    assert (undisturbed.stalls, undisturbed.malformed, undisturbed.rejections) == (0, 0, {})
    assert undisturbed.collector is not None
    assert undisturbed.collector.progress()[2] == [LAYOUT.chunk_count] * 3
    assert undisturbed.collector.bytes_received == 3 * LAYOUT.total_bytes


@pytest.mark.parametrize("fault", [Fault.KILLED, Fault.HALF_OPEN])
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("chunk", EVERY_CHUNK)
def test_a_site_killed_at_any_chunk_leaves_the_survivors_aggregate(
    fault: Fault, name: str, chunk: int
) -> None:
    killed = world(chunk)
    site = next(s for s in killed.sites if s.name == name)
    inject(fault, LAYOUT, site, random.Random(0), chunk=chunk)
    killed.run()
    assert killed.rejections.keys() == {name}
    assert killed.result == exact(*(other for other in WEIGHTS if other != name))
    if fault is Fault.HALF_OPEN:
        assert killed.now >= LOST_MS, "it was given up before its time"


@pytest.mark.parametrize("fault", [Fault.RESTARTED, Fault.RECONNECTED])
@pytest.mark.parametrize("chunk", EVERY_CHUNK)
def test_a_site_that_comes_back_at_any_chunk_counts_once(fault: Fault, chunk: int) -> None:
    back = world(chunk)
    inject(fault, LAYOUT, back.sites[1], random.Random(0), chunk=chunk)
    back.run()
    assert back.rejections == {}
    assert back.now == 0, "what was under way was not asked for at once"
    assert back.result == exact("a", "b", "c")


@pytest.mark.parametrize("budget", [1, 6 * CHUNK, 30 * CHUNK])
@pytest.mark.parametrize("chunk", EVERY_CHUNK)
def test_a_server_killed_at_any_chunk_goes_on_with_what_was_reduced(
    chunk: int, budget: int
) -> None:
    killed = world(chunk, budget)
    before = []
    inject(Fault.SERVER_KILLED, LAYOUT, killed.sites[1], random.Random(0), chunk=chunk)
    kill = killed.kill_server

    def note() -> None:
        assert killed.collector is not None
        before.append(killed.collector.progress()[0])
        kill()
        before.append(killed.collector.progress()[0])

    killed.kill_server = note  # type: ignore[method-assign]
    killed.run()
    assert killed.kills == 1
    assert before[0] == before[1]
    assert (killed.rejections, killed.stalls, killed.now) == ({}, 0, 0)
    assert killed.result == exact("a", "b", "c")


@pytest.mark.parametrize(
    "fault",
    [
        Fault.LOST_CHUNK,
        Fault.LOST_REQUEST,
        Fault.TRUNCATED,
        Fault.OVERSIZED,
        Fault.BUSY,
    ],
)
@pytest.mark.parametrize("chunk", EVERY_CHUNK)
def test_what_did_not_come_is_asked_for_again_after_two_seconds(fault: Fault, chunk: int) -> None:
    lossy = world(chunk)
    inject(fault, LAYOUT, lossy.sites[1], random.Random(0), chunk=chunk)
    lossy.run()
    assert lossy.result == exact("a", "b", "c")
    assert lossy.stalls >= 1
    assert 2000 <= lossy.now <= 4000
    assert lossy.malformed == (fault in (Fault.TRUNCATED, Fault.OVERSIZED))


@pytest.mark.parametrize(
    "fault",
    [Fault.DUPLICATE, Fault.STALE_SET, Fault.UNASKED, Fault.BEYOND_GRID, Fault.OTHER_BYTES_LATER,
     Fault.STRANGER, Fault.FLIPPED_BIT, Fault.SHORT_CHUNK],
)  # fmt: skip
@pytest.mark.parametrize("chunk", EVERY_CHUNK)
def test_what_nobody_asked_for_changes_nothing_and_costs_no_time(fault: Fault, chunk: int) -> None:
    noisy = world(chunk)
    inject(fault, LAYOUT, noisy.sites[1], random.Random(0), chunk=chunk)
    noisy.run()
    assert noisy.result == exact("a", "b", "c")
    assert (noisy.rejections, noisy.stalls, noisy.malformed, noisy.now) == ({}, 0, 0, 0)
    assert noisy.collector is not None
    assert noisy.collector.progress()[2] == [LAYOUT.chunk_count] * 3


@pytest.mark.parametrize("wrong", ["checksum", "length"])
def test_two_wrong_chunks_in_a_row_are_forgiven_and_the_third_is_not(wrong: str) -> None:
    for times, rejected in ((2, False), (3, True)):
        bad = world(budget=1)  # one chunk at a time, so that nothing comes between the wrong ones
        left = times

        def spoil(world: World, site: Site, frame: Frame) -> list[Frame]:
            nonlocal left
            left -= 1
            if left < 0:
                return [frame]
            if wrong == "length":
                return [chunk_frame(frame.peer, frame.set_id, frame.index, frame.body[:-4])]
            return [Frame(frame.peer, frame.head, flipped(frame.body, world.dice), genuine=False)]

        bad.sites[1].interferences.append(once(spoil, 2, again=True))
        bad.run()
        if rejected:
            said = (wrong, f"3 chunks in a row had a wrong {wrong}")
            assert bad.rejections == {"b": said}
            assert bad.result == exact("a", "c")
        else:
            assert bad.rejections == {}
            assert bad.result == exact("a", "b", "c")


@pytest.mark.parametrize("which", [0, 1], ids=["nan", "infinity"])
@pytest.mark.parametrize(
    ("tensor", "element"), [("w", 0), ("w", 1023), ("w", 1024), ("w", 4999), ("h", 776)]
)
def test_a_value_that_is_not_finite_is_named_and_left_out(
    which: int, tensor: str, element: int
) -> None:
    broken = world()
    _, dtype, _, offset, _ = next(t for t in LAYOUT.tensors if t[0] == tensor)
    size = {"F32": 4, "BF16": 2}[dtype]
    at = offset + element * size
    broken.sites[2].update[at : at + size] = SPECIAL_BITS[dtype][which].to_bytes(size, "little")
    broken.sites[2].publish()
    broken.run()
    text = f"NaN or infinity in tensor '{tensor}', element {element}"
    assert broken.rejections == {"c": ("nonfinite", text)}
    assert broken.result == exact("a", "b")


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (Fault.WITHDRAWN, "the tensors are no longer published there"),
        (Fault.TOO_FEW_CHUNKS, "the published tensors have fewer chunks"),
    ],
)
def test_a_refused_range_leaves_its_site_out_with_the_reason(fault: Fault, text: str) -> None:
    refusing = world(3)
    inject(fault, LAYOUT, refusing.sites[0], random.Random(3))
    refusing.sites[0].publish()
    refusing.run()
    assert refusing.rejections == {"a": ("refused", text)}
    assert refusing.result == exact("b", "c")


def test_a_slow_site_is_waited_for_as_long_as_it_sends() -> None:
    slow = world()
    slow.sites[1].interferences.append(
        lambda world, _, frame: [
            Frame(frame.peer, frame.head, frame.body, world.now + LOST_MS // 2, False)
        ]
    )
    slow.run()
    assert slow.result == exact("a", "b", "c")
    assert slow.now >= LOST_MS
    assert slow.stalls > 4


@pytest.mark.parametrize("weight", [0, -1, 1 << 64, 1 << 70])
def test_a_weight_out_of_range_is_refused_before_anything_is_asked_for(weight: int) -> None:
    out = create_model(None, LAYOUT)
    sources = [(b"a", b"a" * 16, 1), (b"b", b"b" * 16, weight)]
    said = rf"weight {weight}: expected an integer from 1 to 2\^64 - 1 with at most 24 significant bits"
    with pytest.raises(WeightError, match=said):
        Collector(LAYOUT, sources, out.file, out.data_offset, None, CollectorOptions(1 << 20))
    body = protocol.encode(
        protocol.Ready.model_construct(
            type="ready",
            round=1,
            sets=[protocol.NamedSet(id="0" * 32, layout="0" * 64)],
            weight=weight,
            metrics={},
        )
    )
    with pytest.raises(ProtocolError, match="weight"):
        protocol.decode_from_site(body)


# --- the frames themselves ---

BODY = bytes(range(256)) * 16
CHUNK_HEAD = header(Kind.CHUNK, b"a" * 16, 0, 0, BODY)


def _changed(at: int, value: int) -> bytes:
    """A well-formed CHUNK header with one other byte and a checksum that is right for it."""
    head = bytearray(CHUNK_HEAD[:44])
    head[at] = value
    return bytes(head) + crc32c(head).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("head", "body", "why"),
    [
        (CHUNK_HEAD[:-1], BODY, "the header is not 48 bytes long"),
        (CHUNK_HEAD + b"\0", BODY, "the header is not 48 bytes long"),
        (_changed(0, 0x47), BODY, "the magic number is wrong"),
        (_changed(4, 1), BODY, "the protocol version is 1, not 2"),
        (CHUNK_HEAD[:9] + b"b" + CHUNK_HEAD[10:], BODY, "the header's checksum"),
        (_changed(5, 0), BODY, "the kind is unknown"),
        (_changed(5, 7), BODY, "the kind is unknown"),
        (_changed(6, 200), BODY, "the encoding is unknown"),
        (_changed(7, 1), BODY, "the flags are not zero"),
        (CHUNK_HEAD, BODY[:-1], "the body's length does not match the header"),
        (CHUNK_HEAD, BODY + b"\0", "the body's length does not match the header"),
        (CHUNK_HEAD, None, "the body's length does not match the header"),
        (header(Kind.CHUNK, b"a" * 16), None, "a CHUNK's length is out of range"),
        (header(Kind.CHUNK, b"a" * 16, 0, 1, BODY), BODY, "a CHUNK's count is not zero"),
        (header(Kind.GET, b"a" * 16, 0, 0), None, "a GET asks for no chunk or for too many"),
        (header(Kind.GET, b"a" * 16, 0, 1025), None, "a GET asks for no chunk or for too many"),
        (header(Kind.GET, b"a" * 16, 0, 1, BODY), BODY, "this kind of frame has no body"),
        (header(Kind.REFUSE, b"a" * 16, 0, 0), None, "a REFUSE gives an unknown reason"),
        (header(Kind.REFUSE, b"a" * 16, 0, 4), None, "a REFUSE gives an unknown reason"),
        (header(Kind.PING, bytes(16), 1), None, "a heartbeat's count or index is not zero"),
        (header(Kind.CONTROL), None, "a control message's length is out of range"),
        (header(Kind.CONTROL, bytes(16), 0, 1, BODY), BODY, "a control message's count or index"),
        (
            header(Kind.CONTROL, body=BODY),
            BODY[:-1] + b"\0",
            "a control message's checksum does not match",
        ),
    ],
)  # fmt: skip
def test_a_frame_that_breaks_a_rule_is_dropped_with_the_reason(
    head: bytes, body: bytes | None, why: str
) -> None:
    exchange = Exchange()
    assert exchange.deliver(0, b"peer", head, body) == 3
    event = exchange.next_event()
    assert event is not None
    assert isinstance(event, FrameMalformed)
    assert event.peer == b"peer"
    assert event.message.startswith(why)
    assert exchange.stats()["dropped"] == 1
    assert exchange.last_heard(b"peer") is None or why.startswith("a control message's checksum")


@pytest.mark.parametrize(("kind", "limit"), [(Kind.CHUNK, 4 << 20), (Kind.CONTROL, 8 << 20)])
def test_the_longest_body_passes_and_one_byte_more_does_not(kind: int, limit: int) -> None:
    for size, malformed in ((limit, False), (limit + 1, True)):
        body = bytes(size)
        verdict = Exchange().deliver(0, b"peer", header(kind, body=body), body)
        assert (verdict == 3) == malformed


def test_a_publisher_refuses_the_request_that_is_one_too_many_and_serves_the_others() -> None:
    site = Site("a", 1, bytearray(UPDATES["a"]))
    site.publish()
    for _ in range(1025):
        assert site.exchange.deliver(0, b"server", header(Kind.GET, site.set_id, 1, 1), None) == 0
    first = site.exchange.next_out(0)
    assert first is not None
    assert first[1] == header(Kind.REFUSE, site.set_id, 1, 3)
    chunks = 0
    while (out := site.exchange.next_out(0)) is not None:
        assert bytes(out[2]) == UPDATES["a"][CHUNK : 2 * CHUNK]  # type: ignore[arg-type]
        chunks += 1
    assert chunks == 1024
    site.exchange.deliver(0, b"another", header(Kind.GET, site.set_id, 1, 1), None)
    served = site.exchange.next_out(0)
    assert served is not None
    assert read_header(served[1]).kind == Kind.CHUNK


def test_frames_of_a_peer_that_takes_no_part_change_no_collection() -> None:
    strange = world()
    strange.collect()
    server = strange.server
    assert strange.collector is not None
    for site in strange.sites:
        for frame in (
            chunk_frame(b"nobody", site.set_id, 0, BODY),
            Frame(b"nobody", header(Kind.REFUSE, site.set_id, 0, 1)),
            Frame(site.peer, header(Kind.REFUSE, b"x" * 16, 0, 1)),
        ):
            assert server.deliver(0, frame.peer, frame.head, frame.body or None) == 0
    assert server.next_event() is None
    strange.run()
    assert strange.rejections == {}
    assert strange.result == exact("a", "b", "c")
