"""A site behind a proxy: it gets through, encrypted; answers of the proxy are named; its failures are outlived."""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedcore import protocol
from fedcore.errors import ConfigError, TransferTimeout
from fedcore.monitor.ask import Target
from fedcore.security.keys import Role
from fedcore.site.connection import Connection
from fedcore.site.settings import SiteSettings
from fedcore.transport import link as transport
from fedcore.transport import tunnel
from fedcore.transport.dialling import Server
from fedcore.transport.link import Control, ServerLink, SiteLink
from fedcore.transport.proxy import Proxy, ProxyError

from ..support.links import DEADLINE, Parties, pulled, wait
from ..support.ports import free_port
from ..support.small_proxy import SmallProxy

NAME = "fed.invalid"  # stands for nothing, except at the proxy
KINDS = ["http", "socks5"]


@pytest.fixture
def parties() -> Parties:
    found = Parties()
    found.add("north", Role.SITE)
    return found


@pytest.fixture
def server(parties: Parties) -> Iterator[ServerLink]:
    link = ServerLink("tcp://127.0.0.1:0", parties.secured())
    yield link
    link.close()


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a link ping, notice a silence, and give up a handshake four times as fast."""
    monkeypatch.setattr(transport, "HEARTBEAT_MS", 250)
    monkeypatch.setattr(transport, "SITE_HANDSHAKE_MS", 2000)


class Behind:
    """A site's link to a server, through a proxy."""

    def __init__(self, server: ServerLink, parties: Parties, proxy: str, host: str = NAME) -> None:
        port = server.endpoint.rpartition(":")[2]
        self._server = server
        self.link = SiteLink(
            f"tcp://{host}:{port}",
            uuid.uuid4().bytes,
            parties.credentials("north"),
            Proxy.of(proxy),
        )

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()

    def say(self) -> bytes:
        """Send a message until it arrives; return the peer that it came from at the server."""
        text, over = uuid.uuid4().hex, -1
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            if over != self.link.connections:  # what was sent before is lost with its connection
                over = self.link.connections
                self.link.send(protocol.Problem(message=text))
            found = self._server.recv(0.2)
            if isinstance(found, Control) and text.encode() in found.body:
                return found.peer
        raise AssertionError("the server has not got it")

    def until_hint(self, text: str) -> str:
        deadline = time.monotonic() + DEADLINE
        while text not in self.link.hint:
            assert time.monotonic() < deadline, self.link.hint
            self.link.recv(0.2)
        return self.link.hint

    @contextmanager
    def coming_again(self) -> Iterator[None]:
        """Wait until the link has come up for another time since the block began."""
        before = self.link.connections
        yield
        deadline = time.monotonic() + DEADLINE
        while self.link.connections == before:
            assert time.monotonic() < deadline
            self.link.recv(0.2)


SERVER = Server.of("tcp://fed.invalid:443")


@contextmanager
def answering(answer: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A proxy that gives one answer, whatever it is asked: its port, and what it was asked."""
    asked: list[bytes] = []

    def serve() -> None:
        with listener.accept()[0] as end, contextlib.suppress(OSError):
            asked.append(end.recv(1 << 16))
            end.sendall(answer)
            while end.recv(1 << 16):  # until the other side has read it
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], asked
        thread.join()


def small(kind: str, server: ServerLink, *, login: bool = False) -> SmallProxy:
    return SmallProxy(kind, {NAME: server.endpoint.removeprefix("tcp://")}, login=login)


@pytest.mark.parametrize("login", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_passes_a_proxy_is_whole_and_encrypted_and_the_proxy_resolves(
    pump: str, server: ServerLink, parties: Parties, kind: str, login: bool
) -> None:
    with small(kind, server, login=login) as proxy, Behind(server, parties, proxy.url) as site:
        sent = pulled(server, site.link, site.say(), 50_001)
        assert proxy.asked == [(NAME, int(server.endpoint.rpartition(":")[2]))]
        assert not site.link.hint
        assert len(proxy.seen) > len(sent)
        assert all(sent[at : at + 64] not in proxy.seen for at in range(0, len(sent), 4096))


def test_an_answer_that_comes_with_the_servers_first_bytes_is_taken_apart(
    server: ServerLink, parties: Parties
) -> None:
    with small("http", server) as proxy:
        proxy.at_once = True
        with Behind(server, parties, proxy.url) as site:
            site.say()
            assert site.link.connections == 1


@pytest.mark.parametrize(
    ("kind", "refusal", "expected"),
    [
        ("http", "407 Proxy Authentication Required", "407 Proxy Authentication Required when"),
        ("http", "403 Not \x1b[31mallowed", "403 Not \\x1b[31mallowed when"),
        ("http", "503 Service Unavailable", "503 Service Unavailable when it was to connect to fed.invalid:"),
        ("socks5", 2, "its rules do not allow this connection"),
        ("socks5", 5, "connection refused"),
        ("socks5", 77, "error 77"),
    ],
)  # fmt: skip
def test_what_a_proxy_answers_is_named_and_it_is_asked_again(
    server: ServerLink, parties: Parties, kind: str, refusal: str | int, expected: str
) -> None:
    with small(kind, server, login=True) as proxy:
        proxy.refusal = refusal
        with Behind(server, parties, proxy.url) as site:
            hint = site.until_hint(expected)
            assert hint.startswith(f"the proxy {kind}://127.0.0.1:{proxy.port} ")
            assert "p:ss" not in hint
            proxy.refusal = None
            site.say()
            assert not site.link.hint


@pytest.mark.parametrize("kind", KINDS)
def test_a_login_that_is_missing_is_asked_for(
    server: ServerLink, parties: Parties, kind: str
) -> None:
    with small(kind, server, login=True) as proxy:
        url = f"{kind}://127.0.0.1:{proxy.port}"
        with Behind(server, parties, url) as site:
            site.until_hint("wants a login")
    with Behind(server, parties, url) as site:
        site.until_hint("cannot be reached: Connection refused")


@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_that_dies_forgets_or_swallows_is_outlived(
    pump: str, server: ServerLink, parties: Parties, kind: str, brisk: None
) -> None:
    with small(kind, server) as proxy, Behind(server, parties, proxy.url) as site:
        site.say()
        with site.coming_again():
            proxy.forget()
        site.say()
        with site.coming_again():
            proxy.swallow()
        site.say()
        with site.coming_again():
            proxy.die()
            site.until_hint("cannot be reached")
            proxy.start()
        pulled(server, site.link, site.say(), 10_000)


@pytest.mark.parametrize("kind", KINDS)
def test_a_proxy_that_stalls_is_named_and_dialled_again(
    server: ServerLink, parties: Parties, kind: str, brisk: None
) -> None:
    with small(kind, server) as proxy:
        proxy.stalled = True
        with Behind(server, parties, proxy.url) as site:
            site.until_hint("did not answer within")
            proxy.stalled = False
            site.say()


def test_each_address_of_a_server_is_tried_through_the_proxy(
    server: ServerLink, parties: Parties
) -> None:
    with small("http", server) as proxy:
        port = server.endpoint.rpartition(":")[2]
        other = f"unknown.invalid:{port},tcp://{NAME}"
        with Behind(server, parties, proxy.url, other) as site:
            site.say()
            assert not site.link.hint
        assert proxy.asked[0][0] == "unknown.invalid"


def test_an_address_of_this_machine_in_a_list_is_dialled_directly(
    server: ServerLink, parties: Parties
) -> None:
    with small("http", server) as proxy:
        own = f"127.0.0.1:{free_port()},{server.endpoint},tcp://{NAME}"
        with Behind(server, parties, proxy.url, own) as site:
            site.say()
        assert "127.0.0.1" not in {host for host, _ in proxy.asked}


def test_a_proxy_that_puts_a_page_in_the_servers_place_is_named_and_outlived(
    server: ServerLink, parties: Parties
) -> None:
    with small("http", server) as proxy, Behind(server, parties, proxy.url) as site:
        with site.coming_again():
            proxy.refusal = "200 OK\r\n\r\nHTTP/1.1 503 Service Unavailable"
            proxy.forget()
            site.until_hint(f"what listens at tcp://{NAME}:")
            proxy.refusal = None
        site.say()


def test_plain_text_does_not_go_through_a_proxy() -> None:
    with pytest.raises(ConfigError, match="could read and change what is sent in plain text"):
        SiteLink("tcp://fed.invalid:7733", bytes(16), None, Proxy.of("http://127.0.0.1:9"))


def test_a_command_that_gets_no_answer_says_what_the_proxy_answered(
    server: ServerLink, parties: Parties
) -> None:
    with small("http", server) as proxy:
        proxy.refusal = "403 Forbidden"
        keys, way = parties.credentials("north"), Proxy.of(proxy.url)
        with Target(f"tcp://{NAME}:7733", keys, way).connect() as client:
            deadline = time.monotonic() + DEADLINE
            while not client.link.hint:
                assert time.monotonic() < deadline
                client.link.recv(0.2)
            with pytest.raises(
                TransferTimeout, match=r"the proxy http://.* answered 403 Forbidden"
            ):
                client.ask(0.1)


def test_a_sites_session_goes_through_the_proxy_of_its_settings(
    server: ServerLink, parties: Parties
) -> None:
    with small("http", server) as proxy:
        address = f"tcp://{NAME}:{server.endpoint.rpartition(':')[2]}"
        keys, way = parties.credentials("north"), Proxy.of(proxy.url)
        connection = Connection(SiteSettings(address, "north", keys, proxy=way))
        connection.open()
        found = wait(server, lambda m: isinstance(m, Control))
        assert isinstance(found, Control)
        assert isinstance(protocol.decode_from_site(found.body), protocol.Join)
        assert len(proxy.asked) == 1
        connection.close()


def test_another_users_process_is_not_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as near,
    ):
        assert tunnel.is_own(near.getsockname())
        monkeypatch.setattr(tunnel.os, "geteuid", lambda: os.getuid() + 1)
        assert not tunnel.is_own(near.getsockname())


def test_a_connection_that_another_user_has_ended_is_not_taken_for_roots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tunnel.os, "geteuid", lambda: 0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        peer = near.getsockname()
        with listener.accept()[0]:
            near.close()
            assert not tunnel.is_own(peer)


def test_a_failure_that_is_later_than_the_links_patience_is_named() -> None:
    noted = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        way = Proxy("http", *listener.getsockname())
        stuck = tunnel.Tunnel(
            way, SERVER, seconds=DEADLINE, unacknowledged_ms=1000, changed=noted.set
        )
        here = (stuck.address.host, stuck.address.port)
        with (
            socket.create_connection(here),
            listener.accept()[0] as first,
            socket.create_connection(here),
            listener.accept()[0],  # by now the link has let go of what it dialled first
        ):
            first.close()
            assert noted.wait(DEADLINE)
            assert "broke the connection" in stuck.failure
        stuck.close(0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://proxy:8080", Proxy("http", "proxy", 8080)),
        ("http://proxy/", Proxy("http", "proxy", 3128)),
        ("socks5h://u:p%40w@[fd00::1]", Proxy("socks5", "fd00::1", 1080, "u", "p@w")),
    ],
)
def test_a_proxys_url_is_taken_apart(text: str, expected: Proxy) -> None:
    found = Proxy.of(text)
    assert found == expected
    assert found.password == expected.password
    assert "p@w" not in f"{found} {found!r}"


@pytest.mark.parametrize(
    "text",
    [
        "proxy:8080", "https://proxy:443", "http://", "http://u:secret@proxy:99999", "ftp://u:secret@proxy",
        "http://u:secret@proxy/path", "http://u:7#secret@proxy", "u:secret@proxy:8080",
        "http://proxy:0", "socks5://:secret@proxy", "http://a%3Ab:secret@proxy", "http://[fd00::x]:1",
        f"socks5://{'u' * 256}:secret@proxy",
    ],
)  # fmt: skip
def test_a_url_that_names_no_proxy_is_refused_without_its_login(text: str) -> None:
    with pytest.raises(ConfigError, match="FEDCORE_PROXY") as error:
        Proxy.of(text)
    assert "secret" not in str(error.value)


def test_a_login_that_a_proxy_sends_back_is_not_shown() -> None:
    login = base64.b64encode(b"u:sec@ret").decode()
    for answer in (f"GET / Basic {login}", f"HTTP/1.1 407 no {login} for u:sec@ret"):
        with (
            answering(answer.encode() + b"\r\n\r\n") as (port, _),
            pytest.raises(ProxyError, match=r"\*\*\*") as error,
        ):
            Proxy("http", "127.0.0.1", port, "u", "sec@ret").connect(SERVER, DEADLINE)
        assert login not in str(error.value)
        assert "sec@ret" not in str(error.value)


@pytest.mark.parametrize("reply", [b"\x04\x00\x00\x01", b"\x05\x00\x00\x09"])
def test_a_reply_that_is_not_one_of_socks5_is_named(reply: bytes) -> None:
    with (
        answering(b"\x05\x00" + reply + bytes(6)) as (port, _),
        pytest.raises(ProxyError, match="does not speak SOCKS5"),
    ):
        Proxy("socks5", "127.0.0.1", port).connect(SERVER, DEADLINE)


def test_an_http_proxy_is_asked_for_an_international_name_as_dns_has_it() -> None:
    server = Server.of("tcp://b\u00fccher.invalid:443")
    with answering(b"HTTP/1.1 200 OK\r\n\r\n") as (port, asked):
        Proxy("http", "127.0.0.1", port).connect(server, DEADLINE).close()
        assert asked[0].startswith(b"CONNECT xn--bcher-kva.invalid:443 ")


def test_a_server_on_this_machine_is_dialled_directly() -> None:
    environ = {"FEDCORE_PROXY": "http://proxy:3128"}
    assert Proxy.from_environment(environ, "tcp://127.0.0.1:7733") is None
    assert Proxy.from_environment({}, "tcp://fed.invalid:7733") is None
    found = Proxy.from_environment(environ, "tcp://fed.invalid:7733")
    assert str(found) == "the proxy http://proxy:3128"


# --- proxies that others wrote ---


def tinyproxy(folder: Path, port: int, login: bool) -> list[str]:
    (folder / "tinyproxy.conf").write_text(
        f"Port {port}\nListen 127.0.0.1\nTimeout 600\n" + ("BasicAuth site secret\n" * login),
        encoding="utf-8",
    )
    return ["tinyproxy", "-d", "-c", str(folder / "tinyproxy.conf")]


def microsocks(folder: Path, port: int, login: bool) -> list[str]:
    return ["microsocks", "-i", "127.0.0.1", "-p", str(port)] + (
        ["-u", "site", "-P", "secret"] if login else []
    )


@pytest.mark.parametrize("login", [False, True])
@pytest.mark.parametrize("command", [tinyproxy, microsocks])
def test_a_real_proxy_lets_an_update_through_and_its_refusals_are_named(
    server: ServerLink,
    parties: Parties,
    tmp_path: Path,
    command: Callable[[Path, int, bool], list[str]],
    login: bool,
) -> None:
    if shutil.which(command.__name__) is None:
        pytest.skip(f"{command.__name__} is not installed")
    kind = "http" if command is tinyproxy else "socks5"
    port = free_port()
    process = subprocess.Popen(command(tmp_path, port, login), stdout=subprocess.DEVNULL)
    try:
        who = "site:secret@" if login else ""
        with Behind(server, parties, f"{kind}://{who}127.0.0.1:{port}", "localhost") as site:
            pulled(server, site.link, site.say(), 50_001)
        if login:
            with Behind(
                server, parties, f"{kind}://site:wrong@127.0.0.1:{port}", "localhost"
            ) as site:
                assert "wrong" not in site.until_hint("login")
    finally:
        process.terminate()
        process.wait()
