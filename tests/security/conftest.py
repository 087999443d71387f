"""What the tests of keys and connections share: a server's and some parties' keys, and a relay that listens in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcore.security.provision import Project, Provisioned, provision

from ..support.links import Links, Parties
from ..support.secured_runs import AT_ONCE, PARTIES, running, server_of


@pytest.fixture
def parties() -> Parties:
    found = Parties()
    found.add("north")
    found.add("south")
    return found


@pytest.fixture
def links() -> Iterator[Links]:
    found = Links()
    yield found
    found.close()


@pytest.fixture
def kits(tmp_path: Path) -> Provisioned:
    return provision(Project("tcp://127.0.0.1:7733", PARTIES), tmp_path / "kits")


@pytest.fixture
def waiting(tmp_path: Path, kits: Provisioned) -> Any:
    """A server that waits for its sites, and for nobody when it is stopped."""
    server = server_of(tmp_path, timing=AT_ONCE)
    with running(server):
        yield server
