"""Encryption is the work of a server's I/O threads, and each connection belongs to one of them."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore._core import Collector, CollectorDone, CollectorOptions
from fedcore.model_file import create_model
from fedcore.transport.link import IO_THREADS, SiteLink

from ..support.links import Links, Parties, model, wait

ELEMENTS = 16 << 20
SET = bytes(range(16))

SERVER = f"""
import sys
import numpy as np
from fedcore._core import Layout
from fedcore.security.door import Secured
from fedcore.model_file import create_model
from fedcore.security.keys import AllowList, KeyPair, Role
from fedcore.transport.link import ServerLink

secret, north, south = sys.stdin.readline().split()
allowed = AllowList.of([("north", Role.SITE, north), ("south", Role.SITE, south)])
link = ServerLink("tcp://127.0.0.1:0", Secured(KeyPair.from_secret(secret), allowed))
file = create_model(None, Layout([("w", "F32", [{ELEMENTS}])], 1 << 20))
link.exchange.publish({SET!r}, file.file, file.data_offset, file.layout.total_bytes, 1 << 20)
print(link.endpoint, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def server(parties: Parties) -> Iterator[tuple[int, str]]:
    """A server's process and address; it publishes a model of zeros."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    keys = (parties.server.secret, *(parties.keys[name].public for name in ("north", "south")))
    child.stdin.write(" ".join(keys) + "\n")
    child.stdin.flush()
    yield child.pid, child.stdout.readline().strip()
    child.kill()
    child.communicate()


def busy(pid: int) -> dict[str, int]:
    """Return the processor's nanoseconds that each I/O thread of a process has used, exactly."""
    used = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        name = (task / "comm").read_text()
        if "/IO/" in name:
            used[name] = int((task / "schedstat").read_text().split()[0])
    return used


def pull(site: SiteLink, times: int) -> None:
    file, _ = model(1)
    layout = type(file.layout)([("w", "F32", [ELEMENTS])], 1 << 20)
    for _ in range(times):
        target = create_model(None, layout)
        collector = Collector(
            layout,
            [(b"", SET, 1)],
            target.file,
            target.data_offset,
            None,
            CollectorOptions(64 << 20),
        )
        site.exchange.start(collector)
        site.kick()
        wait(site, lambda m: isinstance(m, CollectorDone))
        site.exchange.cancel(collector)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux's /proc")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two processors")
def test_one_sites_cipher_work_is_done_beside_anothers(
    server: tuple[int, str], links: Links, parties: Parties
) -> None:
    pid, address = server
    used = [busy(pid)]
    assert len(used[0]) == IO_THREADS >= 2
    for name in ("north", "south"):
        pull(links.site(address, parties.credentials(name)), 8)
        used.append(busy(pid))
    spent = [
        {name: after[name] - before[name] for name in before}
        for before, after in itertools.pairwise(used)
    ]
    first, second = (max(of, key=lambda name: of[name]) for of in spent)
    assert first != second, spent
    assert spent[0][second] * 5 < spent[0][first]
    assert spent[1][first] * 5 < spent[1][second]
