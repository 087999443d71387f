"""A site whose connection carries nothing dials again; one whose name has several addresses tries them all."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import zmq

from fedcore import protocol
from fedcore.errors import ConfigError, TransferTimeout
from fedcore.monitor.ask import StatusClient
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport import dialling
from fedcore.transport import link as transport
from fedcore.transport.dialling import Route, Server
from fedcore.transport.link import Control, ServerLink, SiteLink, now_ms

from ..support.ports import free_address
from ..support.relay import Relay

DEADLINE = 200.0
NAME = "fed.example"
NOWHERE = "fd00::dead"


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have sites ping, and find out that nothing comes back, ten times as fast."""
    monkeypatch.setattr(transport, "HEARTBEAT_MS", 100)


class Names:
    """What a name server answers; a list of addresses, an error, or nothing until `free` is set."""

    def __init__(self) -> None:
        self.answers: dict[str, list[str] | OSError | None] = {}
        self.free = threading.Event()
        self.asked = 0

    def __call__(self, host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        self.asked += 1
        answer = self.answers[host]
        if answer is None:
            self.free.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        if isinstance(answer, OSError):
            raise answer
        return [(0, 0, 0, "", (address, port)) for address in answer]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    found = Names()
    monkeypatch.setattr(transport, "CONNECT_MS", 300)
    monkeypatch.setattr(dialling.socket, "getaddrinfo", found)
    yield found
    found.free.set()


def linked(address: str) -> closing[SiteLink]:
    return closing(SiteLink(address, uuid.uuid4().bytes))


def until(condition: Callable[[], bool], link: SiteLink | ServerLink) -> None:
    """Wait until something holds, looking when the link has news."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        link.recv(0.05)


def port_of(link: ServerLink) -> int:
    return int(link.endpoint.rpartition(":")[2])


def named(server: ServerLink) -> str:
    return f"tcp://{NAME}:{port_of(server)}"


def heard(server: ServerLink, seconds: float = DEADLINE) -> Control:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        arrived = server.recv(deadline - time.monotonic())
        if isinstance(arrived, Control):
            return arrived
    raise AssertionError("nothing was heard")


def test_a_link_whose_packets_vanish_is_dialled_again(pump: str, brisk: None) -> None:
    with (
        closing(ServerLink("tcp://127.0.0.1:0")) as server,
        Relay(server.endpoint) as relay,
        linked(relay.address) as site,
    ):
        until(lambda: site.exchange.last_heard(b"") is not None, site)
        relay.swallow()
        site.send(protocol.Alive())
        until(lambda: site.connections == 2, site)
        site.send(protocol.Problem(message="back"))
        assert b"back" in heard(server).body
        assert relay.dials >= 2


def test_a_connection_that_was_let_go_does_not_come_up_later(
    pump: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "HEARTBEAT_MS", 200)
    address = free_address()
    with linked(address) as site:
        site.send(protocol.Alive())  # waits for the first connection
        site.command([b"D", address.encode()])
        sent = site.exchange.stats()["bytes_out"]  # the pump has let go before it pings twice more
        until(lambda: site.exchange.stats()["bytes_out"] >= sent + 2 * protocol.HEADER_BYTES, site)
        with closing(ServerLink(address)) as server:
            site.send(protocol.Problem(message="over the second"))
            assert b"over the second" in heard(server).body
            pings = 8  # for longer than what waits at its end has to leave
            until(lambda: site.exchange.stats()["bytes_in"] > pings * protocol.HEADER_BYTES, site)
            assert site.connections == 1


def test_a_connection_that_is_coming_up_is_not_let_go_for_silence(pump: str) -> None:
    first = ServerLink("tcp://127.0.0.1:0")
    with linked(first.endpoint) as site:
        until(lambda: site.exchange.last_heard(b"") is not None, site)
        first.close()
        until(lambda: not site.up, site)
        assert not site.exchange.silent(now_ms() + 10 * transport.HEARTBEAT_MS)


def test_a_link_that_is_answered_is_left_alone(pump: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "HEARTBEAT_MS", 400)
    with (
        closing(ServerLink("tcp://127.0.0.1:0")) as server,
        Relay(server.endpoint) as relay,
        linked(relay.address),
    ):
        start = relay.up.passed
        relay.up.until(lambda passed: passed > start + 8 * protocol.HEADER_BYTES)
        assert relay.dials == 1


def test_the_system_gives_a_sites_connection_up_within_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, make = [], zmq.Context.socket

    def noted(context: Any, kind: int, *args: Any) -> Any:
        made.append(make(context, kind, *args))
        return made[-1]

    with closing(ServerLink("tcp://127.0.0.1:0")) as server:
        monkeypatch.setattr(zmq.Context, "socket", noted)
        with linked(server.endpoint):
            (net,) = (socket for socket in made if socket.type == zmq.DEALER)
            assert net.getsockopt(zmq.TCP_MAXRT) <= 5000
            assert net.getsockopt(zmq.CONNECT_TIMEOUT) <= 3000


@pytest.mark.parametrize("listen", ["tcp://[::1]:0", "tcp://127.0.0.1:0"])
def test_all_addresses_of_a_name_are_tried(pump: str, names: Names, listen: str) -> None:
    names.answers[NAME] = [NOWHERE, "127.0.0.1", "::1"]
    with closing(ServerLink(listen)) as server, linked(named(server)) as site:
        site.send(protocol.Problem(message="hello"))
        assert b"hello" in heard(server).body
        assert not site.hint


def test_a_name_of_ipv6_alone_is_dialled(names: Names) -> None:
    names.answers[NAME] = ["::1"]
    with closing(ServerLink("tcp://[::1]:0")) as server, linked(named(server)) as site:
        site.send(protocol.Problem(message="hello"))
        assert b"hello" in heard(server).body


def test_a_server_that_moves_with_its_name_is_found_again(pump: str, names: Names) -> None:
    names.answers[NAME] = ["127.0.0.1"]
    first = ServerLink("tcp://127.0.0.1:0")
    with linked(named(first)) as site:
        until(lambda: site.connections == 1, site)
        with closing(ServerLink(f"tcp://127.0.0.2:{port_of(first)}")) as second:
            names.answers[NAME] = ["127.0.0.2"]
            first.close()
            until(lambda: site.connections == 2, site)
            site.send(protocol.Problem(message="moved"))
            assert b"moved" in heard(second).body


def test_a_name_that_does_not_resolve_is_said_at_once_and_tried_on(names: Names) -> None:
    names.answers[NAME] = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with closing(ServerLink("tcp://127.0.0.1:0")) as server, linked(named(server)) as site:
        until(lambda: bool(site.unresolved), site)
        assert f"cannot resolve {NAME}: Name or service not known" in site.unresolved
        site.send(protocol.Problem(message="patience"))
        names.answers[NAME] = ["127.0.0.1"]
        assert b"patience" in heard(server).body
        until(lambda: not site.unresolved, site)


def test_a_name_server_that_does_not_answer_delays_no_deadline(names: Names) -> None:
    names.answers[NAME] = None  # it never answers
    with (
        pytest.raises(TransferTimeout, match=rf"within 0.3 s; .*DNS.* {NAME}"),
        StatusClient(f"tcp://{NAME}:7733") as client,
    ):
        client.ask(0.3)
    session = Session(SiteSettings(server=f"tcp://{NAME}:7733", site="a", connect_timeout=0.3))
    with closing(session), pytest.raises(TransferTimeout, match=rf"DNS.* {NAME}"):
        session.is_running()


def test_nobodys_link_waits_for_the_lookup_of_another(names: Names) -> None:
    names.answers.update({NAME: ["127.0.0.1"], "gone.example": None})
    with (
        linked("tcp://gone.example:7733"),
        closing(ServerLink("tcp://127.0.0.1:0")) as server,
        linked(named(server)) as site,
    ):
        site.send(protocol.Problem(message="hello"))
        assert b"hello" in heard(server).body


def test_a_name_whose_addresses_do_not_answer_is_named_with_them(names: Names) -> None:
    names.answers[NAME] = [NOWHERE, "127.0.0.1"]
    with closing(ServerLink("tcp://127.0.0.1:0")) as probe:
        address = named(probe)
    with linked(address) as site:
        addresses = f"{NAME} is {NOWHERE}, 127.0.0.1"
        until(lambda: addresses in site.hint, site)
        assert addresses in site.hint


def test_addresses_that_all_fail_are_tried_again_after_a_pause_that_grows() -> None:
    route = Route()
    assert route.resolved(["a", "b", "c"], connected=False) == "a"
    assert [route.failed(0.0), route.failed(0.0), route.failed(0.0)] == ["b", "c", None]
    assert route.failed(0.05) is None
    assert [route.failed(0.2), route.failed(0.2), route.failed(0.2)] == ["a", "b", None]
    assert route.failed(0.35) is None
    assert route.failed(0.45) == "a"
    route.connected()
    assert route.resolved(["b"], connected=True) is None
    assert route.resolved(["b"], connected=False) == "b"


def test_the_first_address_of_a_list_that_answers_is_taken(pump: str, names: Names) -> None:
    names.answers["gone.example"] = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    with closing(ServerLink("tcp://127.0.0.1:0")) as server:
        addresses = f"tcp://gone.example:1,{free_address()},{server.endpoint}"
        with linked(addresses) as site:
            site.send(protocol.Problem(message="hello"))
            assert b"hello" in heard(server).body
            assert not site.unresolved


def test_a_link_that_ends_goes_through_the_list_of_addresses(pump: str) -> None:
    first = ServerLink("tcp://127.0.0.1:0")
    with (
        closing(ServerLink("tcp://127.0.0.1:0")) as second,
        linked(f"{first.endpoint},{second.endpoint}") as site,
    ):
        until(lambda: site.connections == 1, site)
        first.close()
        until(lambda: site.connections == 2, site)
        site.send(protocol.Problem(message="moved"))
        assert b"moved" in heard(second).body


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_an_address_of_a_list_at_which_another_program_listens_is_passed_over(
    pump: str, answer: bytes
) -> None:
    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                with listener.accept()[0] as end:
                    end.sendall(answer)

    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        closing(ServerLink("tcp://127.0.0.1:0")) as server,
    ):
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        other = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with linked(f"{other},{server.endpoint}") as site:
            site.send(protocol.Problem(message="hello"))
            assert b"hello" in heard(server).body
            assert not site.refused
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    "address",
    [
        "tcp://a:1,", "tcp://a:1,tcp://b",
        "tcp://host", "tcp://host:0", "tcp://host:99999", "tcp://host:x", "ipc:///tmp/x", "host:7733",
        "tcp://:7733", "tcp://fd00::1:7733", "tcp://[fd00::x]:7733", "tcp://[1.2.3.4]x:7733", "",
    ],
)  # fmt: skip
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="cannot dial"):
        SiteLink(address, uuid.uuid4().bytes)


@pytest.mark.parametrize(
    ("address", "host", "numeric"),
    [
        ("tcp://10.0.0.1:7733", "10.0.0.1", True),
        ("tcp://[fd00::1]:7733", "fd00::1", True),
        ("tcp://[fe80::1%eth0]:7733", "fe80::1%eth0", True),
        ("tcp://fed.example:7733", "fed.example", False),
    ],
)
def test_an_address_is_taken_apart(address: str, host: str, numeric: bool) -> None:
    found = Server.of(address)
    assert (found.host, found.port, found.numeric) == (host, 7733, numeric)
    assert not numeric or found.endpoint(host) == address
