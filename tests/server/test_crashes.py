"""Real processes killed at the worst moments: what was committed stays, and the run ends with the same bytes."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedcore import protocol
from fedcore.config import load_run_file
from fedcore.protocol import SiteStatus
from fedcore.server.service import Server

from ..support.processes import IDLE_SECONDS, Federation, ignore_hangup

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The models of a run of sites a and b in which nothing happens."""
    made = Federation(tmp_path_factory.mktemp("undisturbed"))
    try:
        made.write(sites=["a", "b"])
        server = made.server()
        for name in ("a", "b"):
            made.site(name).go(3)
        assert server.wait() == 0, (made.folder / "server.log").read_text()
        return made.models()
    finally:
        made.end()


@pytest.mark.parametrize("delivered", [False, True], ids=["all train", "one has delivered"])
def test_a_killed_server_goes_on_and_ends_with_the_same_bytes(
    federation: Federation, undisturbed: dict[str, bytes], delivered: bool
) -> None:
    federation.write(sites=["a", "b"])
    server, sites = federation.server(), [federation.site("a"), federation.site("b")]
    for site in sites:
        site.reached(1)
        site.go()
    for site in sites:
        site.reached(2)
    if delivered:
        sites[0].go()
        federation.until(lambda states: states["a"].state == "delivered")
    server.kill()
    server.wait()
    # What a crash between the rename and the journal's transaction would leave.
    (federation.run / "models" / "round-0002.safetensors").write_bytes(b"half a commit")

    again = federation.server()
    # A site that trains says nothing of its own accord for minutes: it must be known again all the same.
    federation.until(lambda states: states["b"].state == "training")
    assert list(federation.models()) == ["round-0000.safetensors", "round-0001.safetensors"]
    if not delivered:
        sites[0].go()
    sites[1].go()
    for site in sites:
        site.reached(3)
        site.go()
    assert again.wait() == 0, (federation.folder / "server.log").read_text()
    assert [site.process.wait() for site in sites] == [0, 0]
    assert "goes on after round 1" in (federation.folder / "server.log").read_text()
    assert federation.models() == undisturbed
    assert (federation.run / "final" / "model.safetensors").read_bytes() == undisturbed[
        "round-0003.safetensors"
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_ended_by_a_signal_is_waited_for_and_goes_on_with_the_same_bytes(
    federation: Federation, undisturbed: dict[str, bytes], number: signal.Signals
) -> None:
    federation.write(sites=["a", "b"])
    server, sites = federation.server(), [federation.site("a"), federation.site("b")]
    for site in sites:
        site.reached(1)
        site.go()
    for site in sites:
        site.reached(2)
    sites[0].go()
    federation.until(lambda states: states["a"].state == "delivered")
    server.send_signal(number)
    assert server.wait() == 128 + number
    for site in sites:
        site.says(f"has stopped because it was ended by {number.name}; waiting for it")
    log = (federation.folder / "server.log").read_text()
    assert f"ended by {number.name}; the run goes on once the server is started again" in log
    assert "best model" not in log
    again = federation.server()
    sites[1].go()
    for site in sites:
        site.go()
    assert again.wait() == 0, (federation.folder / "server.log").read_text()
    assert [site.process.wait() for site in sites] == [0, 0]
    assert federation.models() == undisturbed


def test_a_server_started_under_nohup_outlives_its_terminal(
    federation: Federation, undisturbed: dict[str, bytes]
) -> None:
    federation.write(sites=["a", "b"])
    server = federation.server(ignore_hangup)
    sites = [federation.site("a"), federation.site("b")]
    for site in sites:
        site.reached(1)
    server.send_signal(signal.SIGHUP)
    for site in sites:
        site.go(3)
    assert server.wait() == 0, (federation.folder / "server.log").read_text()
    assert federation.models() == undisturbed


def test_a_site_that_dies_with_the_server_is_not_waited_for_until_the_deadline(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    people = {"round_deadline": "1h", "idle_timeout": "2s"}
    federation.write(2, sites=["a", "b", "c"], min_results=2, **people)
    first, sites = federation.server(), [federation.site(name) for name in "abc"]
    for site in sites:
        site.reached(1)
        site.go()
    for site in sites:
        site.reached(2)
    for process in (first, sites[2].process):
        process.kill()
        process.wait()
    sites[0].go()
    sites[1].go()
    monkeypatch.setattr(protocol, "RETURN_SECONDS", 1.0)
    caplog.set_level("INFO")
    assert Server(load_run_file(federation.folder / "run.toml")).run().ok
    assert "expecting a, b, c back within 3 s" in caplog.text
    assert "c is lost: it did not come back" in caplog.text
    assert federation.participants() == [[], ["a", "b", "c"], ["a", "b"]]
    assert np.array_equal(federation.model(2), federation.mean(2, "a", "b"))


def test_the_sites_chosen_for_a_round_stay_chosen_when_the_server_is_killed(
    federation: Federation,
) -> None:
    federation.write(1, sites=["a", "b", "c"], sample=2, round_deadline="1h", idle_timeout="2s")
    server, sites = federation.server(), {name: federation.site(name) for name in "abc"}
    chosen: list[str] = []

    def two_train(states: Mapping[str, SiteStatus]) -> bool:
        chosen[:] = [name for name in "abc" if states[name].state == "training"]
        return len(chosen) == 2

    federation.until(two_train)
    first, second = chosen
    (other,) = set("abc") - {first, second}
    sites[first].reached(1)
    sites[first].go()
    federation.until(lambda states: states[first].state == "delivered")
    sites[other].process.send_signal(signal.SIGSTOP)  # a new choice would wait for it
    server.kill()
    server.wait()
    again = federation.server()
    federation.until(lambda states: states[first].state == "delivered")
    sites[second].reached(1)
    sites[second].go()
    federation.until(lambda states: not any(s.state == "training" for s in states.values()))
    sites[other].process.send_signal(signal.SIGCONT)
    assert again.wait() == 0, (federation.folder / "server.log").read_text()
    assert federation.participants() == [[], [first, second]]
    assert np.array_equal(federation.model(1), federation.mean(1, first, second))


def test_a_killed_site_is_noticed_and_the_mean_is_that_of_the_others(
    federation: Federation,
) -> None:
    federation.write(2, sites=["a", "b", "c"], min_results=2, round_deadline="1h")
    server = federation.server()
    sites = {name: federation.site(name) for name in "abc"}
    for site in sites.values():
        site.reached(1)
        site.go()
    for site in sites.values():
        site.reached(2)
    sites["a"].go()
    sites["b"].go()
    federation.until(
        lambda states: (
            [states[name].state for name in "abc"] == ["delivered", "delivered", "training"]
        )
    )
    sites["c"].process.kill()
    assert server.wait() == 0
    summary = json.loads((federation.run / "summary.json").read_text())
    silent = re.fullmatch(r"nothing heard for (\d+\.\d) s", summary["sites"]["c"]["message"])
    assert silent is not None
    assert float(silent[1]) >= IDLE_SECONDS
    assert federation.participants() == [[], ["a", "b", "c"], ["a", "b"]]
    assert np.array_equal(federation.model(1), federation.mean(1, "a", "b", "c"))
    assert np.array_equal(federation.model(2), federation.mean(2, "a", "b"))


def test_a_killed_site_that_is_started_again_takes_part_in_a_later_round(
    federation: Federation,
) -> None:
    federation.write(3, sites=["a", "b", "c"], min_results=2, idle_timeout="2s")
    server = federation.server()
    sites = {name: federation.site(name) for name in "abc"}
    for site in sites.values():
        site.reached(1)
    sites["c"].process.kill()
    sites["a"].go()
    sites["b"].go()
    sites["a"].reached(2)
    sites["b"].reached(2)
    back = federation.site("c")
    back.reached(2)
    for site in (sites["a"], sites["b"], back):
        site.go(2)
    assert server.wait() == 0
    assert federation.participants() == [[], ["a", "b"], ["a", "b", "c"], ["a", "b", "c"]]
    assert np.array_equal(federation.model(3), federation.mean(3, "a", "b", "c"))


def test_a_killed_site_that_is_started_again_at_once_gets_its_place_back(
    federation: Federation,
) -> None:
    federation.write(1, sites=["a", "b"], idle_timeout="2s")
    server, a, b = federation.server(), federation.site("a"), federation.site("b")
    a.reached(1)
    b.reached(1)
    # The server can't tell a process that was just killed from one that is there. This one is killed late, so that
    # however slowly the next one starts, the server has not noticed yet.
    again = federation.site("b")
    again.says("site b is still held by an earlier connection")
    b.process.kill()
    b.process.wait()
    again.reached(1)
    assert again.log.read_text().count("site b is still held by an earlier connection") == 1
    a.go()
    again.go()
    assert server.wait() == 0
    assert federation.participants() == [[], ["a", "b"]]
    log = (federation.folder / "server.log").read_text()
    assert log.count("refused b: another process takes part") == 1


def test_ctrl_c_at_the_server_keeps_the_last_round_and_the_sites_end_in_peace(
    federation: Federation,
) -> None:
    federation.write(sites=["a", "b"])
    server, sites = federation.server(), [federation.site("a"), federation.site("b")]
    for site in sites:
        site.reached(1)
        site.go()
    for site in sites:
        site.reached(2)
    server.send_signal(signal.SIGINT)
    for site in sites:
        site.go()
    assert server.wait() == 130
    assert [site.process.wait() for site in sites] == [0, 0]
    assert list(federation.models()) == ["round-0000.safetensors", "round-0001.safetensors"]
    final = load_file(federation.run / "final" / "model.safetensors")
    assert np.array_equal(final["w"], federation.mean(1, "a", "b"))


def test_ctrl_c_at_a_site_is_known_at_once(federation: Federation) -> None:
    people = {"round_deadline": "1h", "idle_timeout": "1h"}  # neither of them ends the round
    federation.write(1, sites=["a", "b"], min_results=1, **people)
    server, a, b = federation.server(), federation.site("a"), federation.site("b")
    a.reached(1)
    b.reached(1)
    a.go()
    federation.until(lambda states: states["a"].state == "delivered")
    b.process.send_signal(signal.SIGINT)
    assert b.process.wait() == -signal.SIGINT
    assert server.wait() == 0
    assert federation.participants() == [[], ["a"]]
