"""How a run ended is the same for all who took part: what they say, and their exit status."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.monitor.ask import StatusClient

from ..support.processes import Federation, Site

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.end()


def begun(
    federation: Federation, linger: str = "100ms", idle: str = "1h"
) -> tuple[subprocess.Popen[str], list[Site]]:
    """Return the server and two sites: the first trains, the other one waits for its first model."""
    people = {"round_deadline": "1h", "idle_timeout": idle}
    federation.write(1, linger, sites=["a", "b"], sample=1, **people)
    server, sites = federation.server(), [federation.site("a"), federation.site("b")]
    with StatusClient(federation.address) as client:
        while True:
            reply = client.ask(200)
            # Before round 1, "training" is shown for the site that is asked for the first model.
            chosen = [site.site for site in reply.sites if site.state == "training"]
            joined = all(site.state != "absent" for site in reply.sites)
            if reply.phase == "training" and len(chosen) == 1 and joined:
                break
            time.sleep(0.02)
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
    server, sites = begun(federation)
    federation.pass_deadline(server)
    assert server.wait() == 1
    sites[0].go()
    for said in ended(sites, "failed"):
        assert "the run failed: 0 of the 1 updates that a round needs" in said
        assert "best model so far: round 0" in said
    assert [site.process.returncode for site in sites] == [1, 1]


def test_every_script_of_a_run_that_is_stopped_says_so_and_ends_with_status_0(
    federation: Federation,
) -> None:
    server, sites = begun(federation)
    server.send_signal(signal.SIGINT)
    assert server.wait() == 130
    sites[0].go()
    for said in ended(sites, "stopped"):
        assert "the run was stopped on request; best model so far: round 0" in said
    assert [site.process.returncode for site in sites] == [0, 0]
    log = (federation.folder / "server.log").read_text()
    assert "INFO the run was stopped on request; best model so far: round 0" in log
    assert "no model was scored" not in log


def away_at_the_end(federation: Federation, linger: str) -> tuple[subprocess.Popen[str], Site]:
    """Return the server of a run of sites a and b, and b, which falls silent in its only round."""
    federation.write(1, linger, sites=["a", "b"], min_results=1, idle_timeout="2s")
    server, a, b = federation.server(), federation.site("a"), federation.site("b")
    a.reached(1)
    b.reached(1)
    b.process.send_signal(signal.SIGSTOP)
    federation.until(lambda states: states["b"].state == "lost")
    a.go()
    assert a.process.wait() == 0
    return server, b


def over(federation: Federation) -> str:
    """Wait until the server's log says that the run is over; returns the log."""
    path, until = federation.folder / "server.log", time.monotonic() + 200
    while "the run is complete" not in path.read_text():
        assert time.monotonic() < until, path.read_text()
        time.sleep(0.02)
    return path.read_text()


def test_a_process_that_was_stopped_at_the_end_learns_of_it_when_it_goes_on(
    federation: Federation,
) -> None:
    server, b = away_at_the_end(federation, "1s")
    assert server.wait() == 0
    assert "b may not know that the run is over" in over(federation)
    b.process.send_signal(signal.SIGCONT)
    b.go()
    (said,) = ended([b], "complete")
    assert b.process.returncode == 0
    assert "the run is complete; best model: round" in said


def test_a_site_that_is_back_within_the_linger_time_learns_of_the_end(
    federation: Federation,
) -> None:
    server, b = away_at_the_end(federation, "50s")
    b.process.kill()
    over(federation)
    again = federation.site("b")
    ended([again], "complete")
    assert again.process.returncode == 0
    assert server.wait() == 0
    assert "may not know" not in over(federation)


def test_a_site_that_was_killed_at_the_end_and_is_started_again_learns_of_it(
    federation: Federation,
) -> None:
    server, sites = begun(federation, "50s", idle="10s")
    sites[1].process.send_signal(signal.SIGSTOP)  # the run ends before its silence is noticed
    federation.pass_deadline(server)
    while "the run failed" not in (federation.folder / "server.log").read_text():
        time.sleep(0.02)
    sites[1].process.kill()
    sites[0].go()
    again = federation.site("a" if sites[1].log.name == "a.log" else "b")
    ended([sites[0], again], "failed")
    assert [sites[0].process.returncode, again.process.returncode] == [1, 1]
    assert server.wait(200) == 1


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_server_ended_in_its_last_words_says_them_when_it_is_started_again(
    federation: Federation, number: signal.Signals
) -> None:
    server, b = away_at_the_end(federation, "100s")
    b.process.kill()
    over(federation)
    server.send_signal(number)
    assert server.wait() == (0 if number == signal.SIGTERM else -number)
    again, site = federation.server(), federation.site("b")
    ended([site], "complete")
    assert (site.process.returncode, again.wait()) == (0, 0)
    assert federation.server().wait() == 2
    assert "is finished; give this run another name" in over(federation)


def test_ctrl_c_ends_the_linger_time(federation: Federation) -> None:
    server, _ = away_at_the_end(federation, "50s")
    over(federation)
    server.send_signal(signal.SIGINT)
    assert server.wait(200) == 0
