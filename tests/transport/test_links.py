"""Links over real loopback sockets: control messages, chunks in both directions, and strangers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import zmq

from fedcore import protocol
from fedcore._core import (
    Collector,
    CollectorDone,
    CollectorOptions,
    FrameMalformed,
    Layout,
    SourceRejected,
)
from fedcore.errors import BusyError, ClosedError, ConfigError
from fedcore.model_file import ModelFile, create_model
from fedcore.transport.link import Control, ServerLink, SiteLink, pump_name

from ..support.ports import free_address

DEADLINE = 200.0


@contextmanager
def linked(sites: int = 1) -> Iterator[tuple[ServerLink, list[SiteLink], list[bytes]]]:
    server = ServerLink("tcp://127.0.0.1:0")
    peers = [uuid.uuid4().bytes for _ in range(sites)]
    links = [SiteLink(server.endpoint, peer) for peer in peers]
    try:
        yield server, links, peers
    finally:
        for link in links:
            link.close()
        server.close()


def wait(link: ServerLink | SiteLink, accept: Callable[[object], bool]) -> object:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        arrived = link.recv(deadline - time.monotonic())
        if arrived is not None and accept(arrived):
            return arrived
    raise AssertionError("nothing acceptable arrived")


def hello(server: ServerLink, link: SiteLink, peer: bytes) -> None:
    """Make the ROUTER know the peer: a site always speaks first."""
    link.send(protocol.Problem(message="hello"))
    wait(server, lambda m: isinstance(m, Control) and m.peer == peer)


def model(elements: int, seed: int) -> tuple[ModelFile, np.ndarray]:
    values = np.random.default_rng(seed).standard_normal(elements).astype(np.float32)
    file = create_model(None, Layout([("w", "F32", [elements])], 4096))
    file.view("w")[:] = values.tobytes()
    return file, values


def test_control_messages_pass_in_both_directions(pump: str) -> None:
    with linked() as (server, (site,), (peer,)):
        site.send(protocol.Leave(reason="x" * 4000))
        message = wait(server, lambda m: isinstance(m, Control))
        assert isinstance(message, Control)
        assert message.peer == peer
        assert protocol.decode_from_site(message.body) == protocol.Leave(reason="x" * 4000)
        server.send(peer, protocol.Finish(ok=True, outcome="complete", message="bye"))
        reply = wait(site, lambda m: isinstance(m, Control))
        assert isinstance(reply, Control)
        said = protocol.Finish(ok=True, outcome="complete", message="bye")
        assert protocol.decode_from_server(reply.body) == said


@pytest.mark.parametrize("elements", [1, 1023, 1024, 1025, 500_001])
def test_a_site_pulls_the_published_bytes_exactly(pump: str, elements: int) -> None:
    file, _ = model(elements, 1)
    set_id = uuid.uuid4().bytes
    with linked() as (server, (site,), _):
        total = file.layout.total_bytes
        server.exchange.publish(set_id, file.file, file.data_offset, total, 4096)
        out = create_model(None, file.layout)
        collector = Collector(
            file.layout,
            [(b"", set_id, 1)],
            out.file,
            out.data_offset,
            None,
            CollectorOptions(1 << 20, rule="copy"),
        )
        site.exchange.start(collector)
        site.kick()
        event = wait(site, lambda m: not isinstance(m, Control))
        assert event == CollectorDone(collector.id)
        assert bytes(out.view("w")) == bytes(file.view("w"))


def test_the_server_reduces_what_two_sites_publish(pump: str) -> None:
    elements, weights = 300_001, [3, 5]
    files = [model(elements, seed) for seed in (1, 2)]
    layout = files[0][0].layout
    with linked(2) as (server, sites, peers):
        ids = [uuid.uuid4().bytes for _ in sites]
        for link, peer, set_id, (file, _) in zip(sites, peers, ids, files, strict=True):
            link.exchange.publish(
                set_id, file.file, file.data_offset, layout.total_bytes, layout.chunk_bytes
            )
            hello(server, link, peer)
        out = create_model(None, layout)
        sources = list(zip(peers, ids, weights, strict=True))
        collector = Collector(
            layout, sources, out.file, out.data_offset, None, CollectorOptions(1 << 20)
        )
        server.exchange.start(collector)
        server.kick()
        event = wait(server, lambda m: not isinstance(m, Control))
        assert event == CollectorDone(collector.id)
        a, b = (values.astype(np.float64) for _, values in files)
        expected = ((3 * a + 5 * b) / 8).astype(np.float32)
        assert bytes(out.view("w")) == expected.tobytes()


def test_a_set_that_is_not_published_is_refused(pump: str) -> None:
    layout = Layout([("w", "F32", [10])], 4096)
    with linked() as (_, (site,), _):
        out = create_model(None, layout)
        collector = Collector(
            layout,
            [(b"", uuid.uuid4().bytes, 1)],
            out.file,
            out.data_offset,
            None,
            CollectorOptions(1 << 20),
        )
        site.exchange.start(collector)
        site.kick()
        event = wait(site, lambda m: not isinstance(m, Control))
        assert isinstance(event, SourceRejected)
        assert (event.collector, event.source, event.code) == (collector.id, 0, "refused")


def test_a_port_in_use_is_named(pump: str) -> None:
    first = ServerLink("tcp://127.0.0.1:0")
    try:
        with pytest.raises(BusyError, match=first.endpoint.rsplit(":", 1)[1]):
            ServerLink(first.endpoint)
    finally:
        first.close()


@pytest.mark.parametrize("address", ["tcp://203.0.113.7:0", "nonsense", "tcp://127.0.0.1"])
def test_an_address_that_cannot_be_bound_is_explained(address: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        ServerLink(address)


def test_a_site_that_starts_first_finds_the_server_later(pump: str) -> None:
    address = free_address()
    site = SiteLink(address, uuid.uuid4().bytes)
    try:
        site.send(protocol.Leave(reason="early"))
        assert site.silent_ms() is None
        server = ServerLink(address)
        try:
            message = wait(server, lambda m: isinstance(m, Control))
            assert isinstance(message, Control)
            assert protocol.decode_from_site(message.body) == protocol.Leave(reason="early")
        finally:
            server.close()
    finally:
        site.close()


def test_wake_ends_a_wait_early(pump: str) -> None:
    server = ServerLink("tcp://127.0.0.1:0")
    try:
        server.wake()
        assert server.recv(None) is None  # which waits for ever
    finally:
        server.close()


def test_a_closed_link_refuses_to_wait(pump: str) -> None:
    server = ServerLink("tcp://127.0.0.1:0")
    server.close()
    server.close()
    with pytest.raises(ClosedError):
        server.recv(0)


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"x" * 47],
        [b"x" * 48],
        [b"FDC1" + bytes(44)],
        [b"FDC1" + bytes(44), b"body", b"more", b"and more"],
        [b"x" * 48, b"y" * 100_000],
    ],
)
def test_frames_of_a_stranger_do_no_harm(pump: str, frames: list[bytes]) -> None:
    with linked() as (server, (site,), (peer,)):
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        stranger = context.socket(zmq.DEALER)
        stranger.connect(server.endpoint)
        for _ in range(20):
            stranger.send_multipart(frames)
        for _ in range(20):
            wait(server, lambda m: isinstance(m, FrameMalformed))
        assert server.exchange.stats()["dropped"] == 20
        hello(server, site, peer)
        stranger.close(linger=0)
        context.term()


def test_the_server_hears_a_site_whose_interpreter_is_busy() -> None:
    """A site computes in C without giving the GIL away; its heartbeat must go on."""
    program = (
        "import ctypes, sys, time\n"
        "from fedcore.transport import link as transport\n"
        "from fedcore.transport.link import SiteLink\n"
        "from fedcore import protocol\n"
        "transport.HEARTBEAT_MS = 50\n"
        "run = SiteLink._run\n"
        "SiteLink._run = lambda self: (time.sleep(0.5), run(self))\n"  # a thread that is slow to start
        "link = SiteLink(sys.argv[1], bytes.fromhex(sys.argv[2]))\n"
        "link.send(protocol.Leave(reason='before'))\n"
        "ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)\n"  # it holds the GIL throughout
        "link.send(protocol.Leave(reason='after'))\n"
        "link.close()\n"
    )
    server = ServerLink("tcp://127.0.0.1:0")
    peer = uuid.uuid4().bytes
    env = {**os.environ, "FEDCORE_PUMP": "compiled"}
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", program, server.endpoint, peer.hex()],
        env=env,
        stdin=subprocess.PIPE,
    )
    try:
        wait(server, lambda m: isinstance(m, Control) and b"before" in m.body)
        heard = server.exchange.stats()["bytes_in"]
        until = time.monotonic() + DEADLINE
        while server.exchange.stats()["bytes_in"] < heard + 10 * protocol.HEADER_BYTES:
            assert time.monotonic() < until, "no heartbeat came while the interpreter was busy"
            assert server.recv(0.02) is None
        child.communicate(b"\n", DEADLINE)
        wait(server, lambda m: isinstance(m, Control) and b"after" in m.body)
    finally:
        child.kill()
        child.wait()
        server.close()


def test_the_compiled_pump_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDCORE_PUMP", raising=False)
    assert pump_name() == "compiled"


def test_an_unknown_pump_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDCORE_PUMP", "fast")
    with pytest.raises(ConfigError, match="FEDCORE_PUMP='fast'"):
        pump_name()
    with pytest.raises(ConfigError, match="FEDCORE_PUMP='fast'"):
        ServerLink("tcp://127.0.0.1:0")
    with pytest.raises(ConfigError, match="FEDCORE_PUMP='fast'"):
        SiteLink("tcp://127.0.0.1:9", uuid.uuid4().bytes)


def test_a_process_with_an_open_link_exits(pump: str) -> None:
    program = (
        "from fedcore.transport.link import ServerLink, SiteLink\n"
        "import uuid\n"
        "server = ServerLink('tcp://127.0.0.1:0')\n"
        "site = SiteLink(server.endpoint, uuid.uuid4().bytes)\n"
        "print('leaving', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "leaving\n"), done.stderr
