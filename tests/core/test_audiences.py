"""The data plane keeps runs apart: who may pull a set, whose turn it is, and whose bytes are counted where."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from fedcore._core import Exchange, Layout
from fedcore.model_file import create_model
from fedcore.protocol import Alive, Problem, control_frames
from fedcore.protocol.frames import Kind, frame_header, read_header

CHUNK = 64 << 10
LAYOUT = Layout([("w", "F32", [CHUNK])], CHUNK)  # four chunks
FIRST, SECOND = 1, 2


def pull(server: Exchange, peer: bytes, set_id: bytes) -> tuple[Kind, int]:
    """Ask for the first chunk of a set; returns the kind of the answer, and the reason of a refusal."""
    server.deliver(0, peer, frame_header(Kind.GET, set_id, 0, 1), None)
    out = server.next_out(0)
    assert out is not None
    head = read_header(out[1])
    return Kind(head.kind), head.count if head.kind == Kind.REFUSE else 0


def published(server: Exchange, audience: int = 0, layout: Layout = LAYOUT) -> bytes:
    model, set_id = create_model(None, layout), uuid.uuid4().bytes
    server.publish(
        set_id, model.file, model.data_offset, layout.total_bytes, layout.chunk_bytes, []
    )
    server.restrict(set_id, audience)
    return set_id


def peers(server: Exchange, audience: int, count: int) -> list[bytes]:
    """Put so many peers into an audience."""
    found = [b"%d-%d" % (audience, number) for number in range(count)]
    for peer in found:
        server.enrol(peer, audience)
    return found


def ask(server: Exchange, peer: bytes, set_id: bytes, chunks: int = 4, times: int = 1) -> None:
    for _ in range(times):
        server.deliver(0, peer, frame_header(Kind.GET, set_id, 0, chunks), None)


def served(server: Exchange, most: int = 1 << 30) -> list[tuple[bytes, Any]]:
    """Return the next chunks as peer and bytes, which count as on their way as long as they are kept."""
    found: list[tuple[bytes, Any]] = []
    while len(found) < most and (out := server.next_out(0)) is not None:
        assert read_header(out[1]).kind == Kind.CHUNK
        found.append((out[0], out[2]))
    return found


def of(peer: bytes) -> Callable[[tuple[bytes, Any]], bool]:
    return lambda frame: frame[0] == peer


def test_a_set_is_unknown_to_all_but_the_peers_of_its_run() -> None:
    server = Exchange()
    everybodys, restricted = published(server), published(server, FIRST)
    server.enrol(b"a", FIRST)
    server.enrol(b"b", SECOND)
    chunk, unknown = (Kind.CHUNK, 0), pull(server, b"b", uuid.uuid4().bytes)
    assert unknown[0] == Kind.REFUSE
    assert [pull(server, peer, everybodys) for peer in (b"a", b"b", b"c")] == [chunk] * 3
    assert [pull(server, peer, restricted) for peer in (b"a", b"b", b"c")] == [
        chunk,
        unknown,
        unknown,
    ]
    server.expel(b"a", SECOND)  # it is in another one
    assert pull(server, b"a", restricted) == chunk
    server.expel(b"a", FIRST)
    assert pull(server, b"a", restricted) == unknown


def test_what_a_peer_asked_for_in_one_run_is_not_sent_after_it_left() -> None:
    server = Exchange()
    set_id = published(server, FIRST)
    server.enrol(b"a", FIRST)
    ask(server, b"a", set_id)
    server.enrol(b"a", SECOND)
    assert served(server) == []
    server.enrol(b"a", FIRST)
    ask(server, b"a", set_id)
    assert len(served(server)) == 4


def test_the_messages_of_a_run_with_many_senders_delay_another_by_half() -> None:
    server = Exchange()
    header, body = control_frames(Alive())
    for peer in [*peers(server, FIRST, 50), *peers(server, SECOND, 1)]:
        for _ in range(4):
            server.deliver(0, peer, header, body)
    first = [server.next_control(0) for _ in range(8)]
    assert sum(found is not None and found[0] == b"2-0" for found in first) == 4
    rest = 0
    while server.next_control(0) is not None:
        rest += 1
    assert rest == 50 * 4 - 4


def test_a_run_that_asks_for_many_chunks_delays_another_by_half() -> None:
    server = Exchange()
    sets = {audience: published(server, audience) for audience in (FIRST, SECOND)}
    for peer in peers(server, FIRST, 50):
        ask(server, peer, sets[FIRST])
    (one,) = peers(server, SECOND, 1)
    ask(server, one, sets[SECOND])
    assert sum(map(of(one), served(server, 8))) == 4
    assert len(served(server)) == 50 * 4 - 4


def test_runs_with_small_and_large_chunks_have_the_same_share_of_the_bytes() -> None:
    server = Exchange()
    small = Layout([("w", "F32", [CHUNK])], CHUNK // 4)
    sets = {FIRST: published(server, FIRST), SECOND: published(server, SECOND, small)}
    (large,), (one,) = peers(server, FIRST, 1), peers(server, SECOND, 1)
    ask(server, large, sets[FIRST], 4)
    ask(server, one, sets[SECOND], 16)
    sent = {large: 0, one: 0}
    for _ in range(15):
        ((peer, body),) = served(server, 1)
        sent[peer] += len(body)
        assert abs(sent[large] - sent[one]) <= CHUNK


def test_a_run_that_asked_for_nothing_has_no_claim_on_the_time_before() -> None:
    server = Exchange()
    sets = {audience: published(server, audience) for audience in (FIRST, SECOND)}
    (one,), (two,) = peers(server, FIRST, 1), peers(server, SECOND, 1)
    ask(server, one, sets[FIRST], times=20)
    assert len(served(server, 40)) == 40
    ask(server, two, sets[SECOND], times=10)
    assert sum(map(of(two), served(server, 8))) == 4


def test_peers_of_one_run_that_read_nothing_hold_back_none_of_another() -> None:
    server = Exchange()
    server.set_limits(outgoing=CHUNK, control_per_peer=1 << 20, control=1 << 20)
    for audience in (FIRST, SECOND):
        server.limit_audience(audience, 2 * CHUNK, 1 << 20)
    sets = {audience: published(server, audience) for audience in (FIRST, SECOND)}
    for peer in peers(server, FIRST, 10):
        ask(server, peer, sets[FIRST])
    unread = served(server)
    assert unread
    assert server.outgoing_bytes <= 2 * CHUNK
    (one,) = peers(server, SECOND, 1)
    ask(server, one, sets[SECOND], times=8)
    for _ in range(32):  # each is read before the next one leaves
        ((peer, body),) = served(server, 1)
        assert peer == one
        del body
    del unread
    assert served(server, 1)[0][0] != one


def test_messages_of_one_run_that_fill_its_queue_leave_another_its_room() -> None:
    server = Exchange()
    header, body = control_frames(Problem(message="x" * 4000))
    room = 10 * len(body)
    server.set_limits(outgoing=CHUNK, control_per_peer=room, control=room)
    for audience in (FIRST, SECOND):
        server.limit_audience(audience, CHUNK, room)
    (one,) = peers(server, SECOND, 1)
    for peer in [*peers(server, FIRST, 20), *([one] * 9), b"stranger"]:
        server.deliver(0, peer, header, body)
    waiting = [found[0] for found in iter(lambda: server.next_control(0), None)]
    assert len([peer for peer in waiting if peer.startswith(b"1-")]) == 10
    assert waiting.count(one) == 9
    assert b"stranger" in waiting


def test_bytes_are_counted_for_the_run_whose_peers_they_come_from_and_go_to() -> None:
    server = Exchange()
    set_id = published(server, FIRST)
    (one,), (two,) = peers(server, FIRST, 1), peers(server, SECOND, 1)
    ask(server, one, set_id)
    assert len(served(server)) == 4
    header, body = control_frames(Alive())
    server.deliver(0, two, header, body)
    first, second, all_ = server.stats_of(FIRST), server.stats_of(SECOND), server.stats()
    assert (first["frames_in"], second["frames_in"]) == (1, 1)
    assert second["bytes_in"] == len(header) + len(body)
    assert first["bytes_out"] == all_["bytes_out"] > LAYOUT.total_bytes
    assert (second["bytes_out"], server.stats_of(3)["bytes_in"]) == (0, 0)
    assert all_["bytes_in"] == first["bytes_in"] + second["bytes_in"]
