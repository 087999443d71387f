"""How a run ended is the same for all who took part: what they say, and their exit status."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from fedcore.protocol import SiteStatus

from .test_crashes import Federation, Site

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.end()


def begun(federation: Federation, deadline: str) -> tuple[subprocess.Popen[str], list[Site]]:
    """Return the server and two sites: the first trains, the other one waits for its first model."""
    federation.write(1, sites=["a", "b"], sample=1, round_deadline=deadline)
    server, sites = federation.server(), [federation.site("a"), federation.site("b")]
    chosen: list[str] = []

    def one_trains(states: Mapping[str, SiteStatus]) -> bool:
        chosen[:] = [name for name in "ab" if states[name].state == "training"]
        return len(chosen) == 1 and all(state.state != "absent" for state in states.values())

    federation.until(one_trains)
    if chosen == ["b"]:
        sites.reverse()
    sites[0].reached(1)
    return server, sites


def ended(sites: list[Site], outcome: str) -> list[str]:
    """Return what each site said, once its script has ended."""
    said = []
    for site in sites:
        site.process.wait()
        said.append(site.log.read_text())
        assert "Traceback" not in said[-1], said[-1]
        assert f"outcome: {outcome}" in said[-1], said[-1]
    return said


def test_every_script_of_a_run_that_fails_ends_with_status_1(federation: Federation) -> None:
    server, sites = begun(federation, "2s")
    assert server.wait() == 1
    sites[0].go()
    for said in ended(sites, "failed"):
        assert "the run failed: 0 of the 1 updates that a round needs" in said
        assert "best model so far: round 0" in said
    assert [site.process.returncode for site in sites] == [1, 1]


def test_every_script_of_a_run_that_is_stopped_says_so_and_ends_with_status_0(
    federation: Federation,
) -> None:
    server, sites = begun(federation, "50s")
    server.send_signal(signal.SIGINT)
    assert server.wait() == 130
    sites[0].go()
    for said in ended(sites, "stopped"):
        assert "the run was stopped on request; best model so far: round 0" in said
    assert [site.process.returncode for site in sites] == [0, 0]
    log = (federation.folder / "server.log").read_text()
    assert "INFO the run was stopped on request; best model: round 0" in log
    assert "no model was scored" not in log
