"""What a message costs the server before it is refused, and those that would end it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any
from unittest.mock import Mock

import pytest

from fedcore import protocol
from fedcore.clock import ManualClock
from fedcore.errors import ProtocolError
from fedcore.protocol import control_frames
from fedcore.security.keys import load_kit
from fedcore.security.provision import Provisioned
from fedcore.server import ending, replies
from fedcore.server.service import Server
from fedcore.server.status import within_a_message
from fedcore.transport.link import Control, SiteLink

from ..support.links import DEADLINE, Links, wait
from ..support.secured_runs import join

pytestmark = pytest.mark.timeout(600)

MIB = 1 << 20

# Each body as large as a message may be; they run in a process of its own, whose memory is bounded.
COSTLY = """
import resource, sys, time
from fedcore import protocol
from fedcore.errors import ProtocolError

MOST = protocol.MAX_CONTROL_BYTES


def filled(begin, each, end, most=MOST):
    size, parts = len(begin) + len(end), []
    while size < most - 40:
        parts.append(each.replace(b"%d", b"%d" % len(parts)))
        size += len(parts[-1]) + 1
    return begin + b",".join(parts) + end


DECLARE = b'{"type":"declare","tensors":['
ONE = DECLARE + b'["w","F32",[1]]],'
ANSWER = b'{"type":"answer","version":0,"examples":1,"outputs":{"a":['
LOG = b'{"type":"log","round":0,"step":0,"metrics":{'
bodies = {
    "tensors that are none": filled(DECLARE, b"[%d,1,1]", b"]}"),
    "tensors": filled(DECLARE, b'["w%d","F32",[1]]', b"]}"),
    "as many wrong tensors as it may have": filled(DECLARE, b"[%d,1,1]", b"]}", 900_000),
    "shapes": filled(DECLARE + b'["w","F32",[', b"-%d", b"]]]}"),
    "numbers": filled(DECLARE, b"%d", b"]}"),
    "outputs": filled(ANSWER, b"[%d]", b"]}}"),
    "empty outputs": filled(ANSWER, b"{}", b"]}}"),
    "as many outputs as it may have": filled(ANSWER, b"{}", b"]}}", 1 << 20),
    "brackets": b"[" * MOST,
    "metrics": filled(LOG, b'"m%d":"x"', b"}}"),
    "fields": filled(b'{"type":"alive",', b'"m%d":0', b"}"),
    "fields of a declaration": filled(ONE, b'"m%d":0', b"}"),
    "as many of them as it may have": filled(ONE, b'"m%d":0', b"}", 1_400_000),
    "files": filled(ONE + b'"files":{', b'"m%d.json":"x"', b"}}"),
    "fingerprints": filled(ONE + b'"fingerprints":{', b'"m%d":"x"', b"}}"),
    "roles": filled(ONE[:-1] + b'],"roles":[{"role":"buffer","tensors":[', b"0", b"]}]}"),
    "wrong roles": filled(ONE[:-1] + b'],"roles":[', b'{"role":"%d","tensors":[0]}', b"]}"),
    "as many places as it may have": filled(
        ONE[:-1] + b'],"roles":[{"role":"buffer","tensors":[', b"%d", b"]}]}", 600_000
    ),
    "two types": filled(ONE + b'"type":"log","round":0,"step":0,"metrics":{', b'"m%d":"x"', b"}}"),
    "a type that comes last": filled(b'{"metrics":{', b'"m%d":"x"', b'},"type":"log"}'),
}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
before = peak()
for name, body in bodies.items():
    print(name, end=": ", flush=True)
    assert len(body) <= MOST
    began = time.process_time()
    try:
        protocol.decode_from_site(body)
        raise SystemExit("it was taken")
    except ProtocolError:
        assert protocol.greeting(body) is None
    print(round(time.process_time() - began, 2), "s,", (peak() - before) >> 10, "MiB", flush=True)
    assert time.process_time() - began < 10
    assert (peak() - before) >> 10 < 200
print("done")
"""


def test_no_message_costs_more_memory_or_time_than_few_times_what_it_holds() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", COSTLY], capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    "message",
    [
        protocol.Declare(tensors=[(f"layer.{i}.weight", "F32", [8, 8]) for i in range(100_000)]),
        protocol.Declare(
            tensors=[("w", "F32", [1])],
            files={"config.json": json.dumps({"a": [{"b": "c,:"}] * 9000})},
            fingerprints={"tokenizer": "0" * 64},
        ),
        protocol.Log(round=1, step=1, metrics={f"m{i}".ljust(128, "x"): 1.0 for i in range(64)}),
        protocol.Answer(version=1, examples=1, outputs={"a": [0] * 500_000}),
        protocol.Answer(version=1, examples=1, outputs={"a": [1, 2.5, "x", True], "b": "text"}),
        protocol.Problem(message="\U0001f600" * 4096),
    ],
    ids=["tensors", "files", "metrics", "outputs", "kinds of outputs", "text"],
)
def test_messages_as_large_as_they_may_be_are_taken(message: protocol.FromSite) -> None:
    assert protocol.decode_from_site(protocol.encode(message)) == message


def test_where_there_is_a_model_few_more_tensors_than_it_has_are_looked_at() -> None:
    tensors: Any = [(f"layer.{i}.weight", "F32", [8, 8]) for i in range(30_000)]
    body = protocol.encode(protocol.Declare(tensors=tensors))
    assert protocol.decode_from_site(body, 30_000)
    with pytest.raises(ProtocolError, match="more than 10000 tensors"):
        protocol.decode_from_site(body, 10_000)


def test_what_a_site_declares_leaves_room_for_the_task_that_repeats_it() -> None:
    tensors: Any = [(f"w{i}" + "x" * 1000, "F32", [1]) for i in range(8000)]
    with pytest.raises(ProtocolError, match="too large"):
        protocol.decode_from_site(
            protocol.encode(
                protocol.Declare.model_construct(
                    type="declare", tensors=tensors, files={"a.json": "x" * (180 << 10)}
                )
            )
        )


@pytest.mark.parametrize("value", [{}, None, [[]], [None], [{"a": 1}]])
def test_an_output_is_a_number_a_text_or_a_list_of_them(value: Any) -> None:
    body = {"type": "answer", "version": 0, "examples": 1, "outputs": {"a": value}}
    with pytest.raises(ProtocolError, match="expected a number, a text or a list of them"):
        protocol.decode_from_site(json.dumps(body).encode())


def test_the_status_of_any_number_of_talkative_sites_fits_into_a_message() -> None:
    metrics = {f"{i}".ljust(128, "\u6f22"): 1.0 for i in range(64)}
    sites = [
        protocol.SiteStatus(site=f"s{i}", state="joined", metrics=metrics, message="\u6f22" * 4096)
        for i in range(1200)
    ]
    names = [f"s{i}".ljust(63, "x") for i in range(100_000)]
    reply = protocol.StatusReply(
        run="t", phase="training", round=1, rounds=2, metric=None, mode=None, sites=sites,
        versions=[protocol.VersionStatus(version=0, participants=names)] * 3,
    )  # fmt: skip
    short, size = within_a_message(reply)
    assert len(protocol.encode(short)) == size
    assert 0 < len(short.sites) < 1000
    few = reply.model_copy(update={"sites": sites[:3], "versions": []})
    assert within_a_message(few)[0] is few
    long = few.model_copy(update={"versions": reply.versions[:1]})
    assert len(within_a_message(long)[0].sites) == 3


def test_answers_that_are_not_read_are_bounded_for_each_key_and_those_of_others_are_not() -> None:
    clock = ManualClock()
    found = replies.Replies(Mock(), clock)
    mib = 1 << 20
    eager = [b"observer/eye/0\0%d" % number for number in range(30)]
    assert sum(found.may_have(peer, mib) for peer in eager) == 16
    assert found.may_have(b"observer/other/0\0x", mib)
    clock.advance(5.0)
    assert sum(found.may_have(peer, mib) for peer in eager) == 5
    clock.advance(1000.0)
    assert found.may_have(eager[0], 100 * mib)
    clock.advance(50.0)
    assert not found.may_have(eager[0], 0)


@pytest.mark.parametrize("what", ["join", "status"])
def test_who_asks_without_end_for_large_answers_has_few(
    waiting: Server,
    kits: Provisioned,
    links: Links,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    monkeypatch.setattr(replies, "ANSWER_PER_SECOND", 0)
    monkeypatch.setattr(type(waiting.runs[0].versions), "table_bytes", property(lambda _: 1 << 20))
    monkeypatch.setattr(ending, "within_a_message", lambda reply: (reply, 16 << 20))
    name, message, reply = {
        "join": ("a", join("a"), b'"welcome"'),
        "status": ("eye", protocol.StatusRequest(), b'"status-reply"'),
    }[what]
    link = links.site(waiting.endpoint, load_kit(kits.kits[name]).credentials)
    link.send(message)
    wait(link, lambda m: isinstance(m, Control) and reply in m.body)
    for _ in range(100):
        link.send(message)
    other = links.site(waiting.endpoint, load_kit(kits.kits["b"]).credentials)
    other.send(join("b"))
    told(other, protocol.Welcome)
    answers = 1
    while (arrived := link.recv(0.5)) is not None:
        answers += isinstance(arrived, Control) and reply in arrived.body
    assert answers <= 18


def say(link: SiteLink, body: bytes) -> None:
    """Send a message that the site's own library would refuse to make."""
    link.command([b"S", b"", *control_frames(body)])


def told(link: SiteLink, kind: type[Any]) -> Any:
    def is_kind(arrived: object) -> bool:
        return isinstance(arrived, Control) and isinstance(
            protocol.decode_from_server(arrived.body), kind
        )

    arrived = wait(link, is_kind)
    assert isinstance(arrived, Control)
    return protocol.decode_from_server(arrived.body)


@pytest.mark.parametrize("depth", [30, 900, 100_000])
def test_a_config_that_is_nested_without_end_ends_no_server(
    waiting: Server,
    kits: Provisioned,
    links: Links,
    depth: int,
) -> None:
    nested = '{"a": ' + "[" * depth + "]" * depth + "}"
    agreed = []
    for name in ("a", "b"):
        link = links.site(waiting.endpoint, load_kit(kits.kits[name]).credentials)
        link.send(join(name))
        told(link, protocol.Welcome)
        tensors = [("w", "F32", [4])]
        link.send(protocol.Declare(tensors=tensors, files={"adapter_config.json": nested}))
        agreed.append(told(link, protocol.Accepted).layout_hash)
    assert agreed[0] == agreed[1]


def test_a_key_whose_message_is_none_is_told_and_not_heard_for_a_while(
    waiting: Server,
    kits: Provisioned,
    links: Links,
    caplog: pytest.LogCaptureFixture,
) -> None:
    link = links.site(waiting.endpoint, load_kit(kits.kits["a"]).credentials)
    link.send(join("a"))
    told(link, protocol.Welcome)
    say(link, b'{"type":"nothing"}')
    refused = told(link, protocol.Refused)
    assert refused.code == "message"
    until = time.monotonic() + DEADLINE
    while "is not heard any more" not in caplog.text:
        say(link, b'{"type":"nothing"}')
        assert time.monotonic() < until
        time.sleep(0.02)
    assert caplog.text.count("a sent a bad control message") == 1
    other = links.site(waiting.endpoint, load_kit(kits.kits["b"]).credentials)
    other.send(join("b"))
    told(other, protocol.Welcome)


def test_a_site_whose_config_has_an_endless_name_fills_no_log(
    waiting: Server,
    kits: Provisioned,
    links: Links,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, scale in (("a", 1), ("b", 2)):
        link = links.site(waiting.endpoint, load_kit(kits.kits[name]).credentials)
        link.send(join(name))
        told(link, protocol.Welcome)
        config = json.dumps({"\x1b" * 100_000: scale})
        tensors = [("w", "F32", [4])]
        link.send(protocol.Declare(tensors=tensors, files={"adapter_config.json": config}))
    refused = told(link, protocol.Refused)
    assert "is not that of site 'a'" in refused.message
    lines = [r.getMessage() for r in caplog.records if "refused b" in r.getMessage()]
    assert len(lines) == 1
    assert len(lines[0]) < 1000
    assert lines[0].isprintable()
