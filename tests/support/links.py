"""Links over loopback sockets: keys, links that are closed at the end, and a relay that copies every byte."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np

from fedcore._core import Collector, CollectorDone, CollectorOptions, Layout
from fedcore.model_file import ModelFile, create_model
from fedcore.security.connections import Limits
from fedcore.security.door import Secured
from fedcore.security.keys import AllowList, Credentials, KeyPair, Role
from fedcore.transport.link import ServerLink, SiteLink

DEADLINE = 200.0


@dataclass
class Parties:
    """A server's keys and those of the parties that it admits, by name."""

    server: KeyPair = field(default_factory=KeyPair.generate)
    keys: dict[str, KeyPair] = field(default_factory=dict)
    allowed: AllowList = field(default_factory=lambda: AllowList({}))

    def add(self, name: str, role: Role = Role.SITE) -> KeyPair:
        pair = self.keys[name] = KeyPair.generate()
        self.allowed = self.allowed.admit(name, role, pair.public)
        return pair

    def secured(self, limits: Limits | None = None) -> Secured:
        return Secured(self.server, self.allowed, limits or Limits())

    def credentials(self, name: str) -> Credentials:
        return Credentials(self.server.public, self.keys[name])


class Links:
    """Links that are closed when the test ends."""

    def __init__(self) -> None:
        self._open: list[ServerLink | SiteLink] = []

    def server(self, secured: Secured | None) -> ServerLink:
        link = ServerLink("tcp://127.0.0.1:0", secured)
        self._open.append(link)
        return link

    def site(
        self, address: str, credentials: Credentials | None, identity: bytes | None = None
    ) -> SiteLink:
        link = SiteLink(address, identity or uuid.uuid4().bytes, credentials)
        self._open.append(link)
        return link

    def close(self) -> None:
        for link in reversed(self._open):
            link.close()


def wait(link: ServerLink | SiteLink, accept: Callable[[object], bool]) -> object:
    """Return the first thing to arrive that ``accept`` takes."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        arrived = link.recv(deadline - time.monotonic())
        if arrived is not None and accept(arrived):
            return arrived
    raise AssertionError("nothing acceptable arrived")


def refusal(link: SiteLink) -> str:
    """Wait until a link is refused, or has a hint why its handshake fails; return what it says."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        link.recv(0.2)
        if link.refused or link.hint:
            return link.refused or link.hint
    raise AssertionError("nothing was refused")


@dataclass
class Wire:
    """What went over a relay: in both directions together, and to the server alone."""

    address: str
    seen: bytearray = field(default_factory=bytearray)
    to_server: bytearray = field(default_factory=bytearray)
    servers_end: socket.socket | None = None

    def inject(self, data: bytes) -> None:
        """Send something to the server as if it came from the last site that dialled."""
        assert self.servers_end is not None
        self.servers_end.sendall(data)


@contextmanager
def relay(target: str) -> Iterator[Wire]:
    """A TCP relay to ``target`` (tcp://host:port) that keeps a copy of every byte."""
    host, _, port = target.removeprefix("tcp://").rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    wire = Wire(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
    ends: list[socket.socket] = []
    far_ends: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                wire.seen.extend(data)
                if sink in far_ends:
                    wire.to_server.extend(data)
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, int(port)))
                ends.extend([near, far])
                far_ends.append(far)
                wire.servers_end = far
                for pair in ((near, far), (far, near)):
                    threads.append(threading.Thread(target=copy, args=pair, daemon=True))
                    threads[-1].start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield wire
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        acceptor.join(DEADLINE)
        for thread in threads:
            thread.join(DEADLINE)
        for end in ends:
            end.close()


def model(elements: int) -> tuple[ModelFile, np.ndarray]:
    values = np.random.default_rng(3).standard_normal(elements).astype(np.float32)
    file = create_model(None, Layout([("w", "F32", [elements])], 4096))
    file.view("w")[:] = values.tobytes()
    return file, values


def pulled(server: ServerLink, site: SiteLink, peer: bytes, elements: int) -> bytes:
    """Publish at the site, pull at the server; return what came."""
    file, values = model(elements)
    set_id = uuid.uuid4().bytes
    total = file.layout.total_bytes
    site.exchange.publish(set_id, file.file, file.data_offset, total, 4096)
    target = create_model(None, file.layout)
    collector = Collector(
        file.layout,
        [(peer, set_id, 1)],
        target.file,
        target.data_offset,
        None,
        CollectorOptions(1 << 20),
    )
    server.exchange.start(collector)
    server.kick()
    wait(server, lambda m: isinstance(m, CollectorDone))
    assert bytes(target.view("w")) == values.tobytes()
    return values.tobytes()
