"""Real processes behind a slow link: one that lives is not taken for lost, one that is killed is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.processes import SITE, Federation, Site
from ..support.relay import Relay

pytestmark = pytest.mark.timeout(600)

FLOATS = 300_000  # two chunks, of which the first takes longer than the idle timeout
UP = 250_000.0
IDLE = 3


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    (tmp_path / "site.py").write_text(SITE.replace("300_000", f"{FLOATS:_}"))
    made.write(1, sites=["a", "b"], round_deadline="1h", idle_timeout=f"{IDLE}s")
    yield made
    made.end()


def begun(federation: Federation, relay: Relay) -> tuple[Site, Site]:
    """Bring both sites to their training; only the second one is behind the relay."""
    a = federation.site("a")
    a.reached(1)
    b = Site(federation.folder, "b", relay.address)
    federation.started.append(b.process)
    b.reached(1)
    return a, b


def test_a_site_on_a_slow_link_uploads_for_as_long_as_it_takes(federation: Federation) -> None:
    server = federation.server()
    with Relay(federation.address, up=UP, down=1_500_000.0) as relay:
        for site in begun(federation, relay):
            site.go()
        before = relay.up.passed
        assert server.wait() == 0, (federation.folder / "server.log").read_text()
        assert relay.up.passed - before < 4 * FLOATS + 200_000, "chunks were sent twice"
    log = (federation.folder / "server.log").read_text()
    assert "is lost" not in log
    assert federation.participants() == [[], ["a", "b"]]


def test_a_site_killed_in_its_first_chunk_is_noticed_all_the_same(federation: Federation) -> None:
    federation.server()
    with Relay(federation.address, up=UP) as relay:
        a, b = begun(federation, relay)
        before = relay.up.passed
        for site in (a, b):
            site.go()
        relay.up.until(lambda passed: passed > before + 200_000)
        b.process.kill()
        federation.until(lambda states: states["b"].state == "lost")
    assert "b is lost: nothing heard for " in (federation.folder / "server.log").read_text()
