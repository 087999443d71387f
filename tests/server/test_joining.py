"""How long sites that never joined are waited for, and what the log says of a wait."""

from __future__ import annotations

import logging
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedcore import protocol
from fedcore.clock import ManualClock
from fedcore.server.host import Host
from fedcore.server.rounds.actions import EndRun, SendTask, StartCollect
from fedcore.server.rounds.participation import Roster
from fedcore.server.rounds.rounds import Rounds
from fedcore.server.rounds.tasks import Scoring
from fedcore.server.rounds.waiting import WaitingLog
from fedcore.server.service import Server

from ..support.arriving import Arriving, says
from ..support.runs import run, run_config, site
from .playing import ahead, join_all, machine, part, update

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)


def deliver(rounds: Rounds, *sites: str, round_: int = 1) -> list[object]:
    return [a for name in sites for a in rounds.ready(name, round_, update(name))]


def test_a_site_that_never_joined_is_waited_for_up_to_the_join_timeout_once() -> None:
    rounds = machine(["a", "b", "c"], quorum=2, join_timeout=10)
    assert rounds.tick(50) == []
    assert rounds.joined("a", "a", 60) == [SendTask("a", "train", 1)]
    assert rounds.joined("b", "b", 61) == [SendTask("b", "train", 1)]
    assert deliver(rounds, "a", "b") == [*ahead("a"), *ahead("b")]
    assert rounds.tick(69.9) == []
    assert rounds.tick(70) == [StartCollect(1, (part("a"), part("b")))]
    rounds.committed(1, 71)
    assert deliver(rounds, "a", "b", round_=2)[-1] == StartCollect(2, (part("a"), part("b")))


def test_an_update_after_the_join_timeout_closes_the_round_without_the_absent() -> None:
    rounds = machine(["a", "b", "c"], quorum=2, join_timeout=10)
    join_all(rounds, "a", "b")
    assert rounds.tick(10) == []
    assert deliver(rounds, "a", "b") == [*ahead("a"), StartCollect(1, (part("a"), part("b")))]


def test_a_site_that_joins_late_takes_part_and_is_waited_for_like_any_other() -> None:
    rounds = machine(["a", "b", "c"], quorum=2, join_timeout=10)
    join_all(rounds, "a", "b")
    deliver(rounds, "a")
    assert rounds.tick(10) == []
    assert rounds.joined("c", "c", 20) == [SendTask("c", "train", 1)]
    assert deliver(rounds, "b") == ahead("b")
    assert deliver(rounds, "c") == [StartCollect(1, (part("a"), part("b"), part("c")))]


def test_fewer_than_the_quorum_are_waited_for_until_the_deadline() -> None:
    rounds = machine(["a", "b", "c"], quorum=3, join_timeout=10)
    join_all(rounds, "a", "b")
    deliver(rounds, "a", "b")
    assert rounds.tick(10) == []
    assert rounds.lacking == 1
    (end,) = rounds.tick(100)
    assert isinstance(end, EndRun)
    assert "1 never joined" in end.message


def test_a_site_that_missed_a_deadline_and_never_joined_is_not_waited_for_again() -> None:
    rounds = machine(["a", "b", "c"], quorum=2)
    join_all(rounds, "a", "b")
    deliver(rounds, "a", "b")
    assert rounds.tick(100) == [StartCollect(1, (part("a"), part("b")))]
    rounds.committed(1, 101)
    assert deliver(rounds, "a", "b", round_=2)[-1] == StartCollect(2, (part("a"), part("b")))


def test_a_server_started_again_after_a_round_waits_for_no_site_that_never_joined() -> None:
    rounds = machine(["a", "b", "c"], quorum=2, version=1, join_timeout=10)
    rounds.restarted(["a", "b"], [], until=15)
    for name in "ab":
        assert rounds.joined(name, name, 1) == [SendTask(name, "train", 2)]
    assert deliver(rounds, "a", "b", round_=2)[-1] == StartCollect(2, (part("a"), part("b")))


def test_a_scoring_ends_without_those_who_never_joined_if_enough_have_answered() -> None:
    def scoring(quorum: int) -> Scoring:
        rounds = Scoring(
            Roster(["a", "b", "c"], None),
            kind="infer", quorum=quorum, deadline=100, version=0, join_timeout=10,
        )  # fmt: skip
        for name in "ab":
            rounds.joined(name, name, 0)
            assert rounds.scored(name, 0) == []
        return rounds

    assert scoring(2).tick(10) == [EndRun(True, "")]
    short = scoring(3)
    assert short.tick(10) == []
    (end,) = short.tick(100)
    assert isinstance(end, EndRun)
    assert not end.ok


def test_the_rounds_of_a_run_go_on_without_a_site_that_never_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    config = run_config(
        tmp_path, sites=["a", "b", "c"], rounds=2, min_results=2, join_timeout="100ms"
    )
    server = Server(config)
    at = server.endpoint
    result, trained = run(server, lambda: site(at, "a", 1), lambda: site(at, "b", 1))
    assert (result.ok, trained) == (True, [2, 2])
    assert any("c never joined: rounds do not wait for it any more" in m for m in caplog.messages)


def test_a_site_whose_connection_was_forgotten_before_its_join_was_handled_has_its_time(
    tmp_path: Path,
) -> None:
    link, clock = Arriving(), ManualClock()
    configs = [run_config(tmp_path, sites=["a", "b"], idle_timeout="3s")]
    with closing(Host(configs, link=link, clock=clock)) as host:  # type: ignore[arg-type]
        host.start()
        link.waiting = [says("a", protocol.Join(version="0", site="a", instance="0" * 32))]
        host.step()
        for _ in range(6):
            clock.advance(0.5)
            host.step()
        assert [known.site for _, known in host.runs[0].peers] == ["a"]
        clock.advance(1.0)
        host.step()
        assert not len(host.runs[0].peers)


def test_once_a_minute_the_log_says_who_is_waited_for_and_until_when(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    rounds = Rounds(
        Roster(["a", "b", "c"], None),
        rounds=2, quorum=2, deadline=1000, version=0, join_timeout=90,
    )  # fmt: skip
    log = WaitingLog(rounds, lambda: NOON)

    def said(now: float) -> str:
        caplog.clear()
        log.look(now)
        return " ".join(caplog.messages)

    assert said(0) == said(59) == ""
    nobody = "the run waits for a first site with a model; there: nobody; never joined: a, b, c"
    assert said(60) == nobody
    rounds.joined("a", "a", 61)
    rounds.joined("b", "b", 61)
    deliver(rounds, "b")
    assert said(119) == ""
    training = "a (training; until 12:15:41)"
    assert said(120) == f"round 1 of 2 waits for c (never joined; until 12:00:31) and {training}"
    rounds.tick(151)
    assert said(152).startswith(
        "c never joined: rounds do not wait for it any more (participants.join_timeout"
    )
    assert said(180) == "round 1 of 2 waits for a (training; until 12:14:41)"
    rounds.lost("a", "silent", 181)
    assert said(240) == (
        "round 1 of 2 waits for more sites; 1 more than those there are needed (participants.min_results) while "
        "a, c are not there, or the run ends at 12:13:41"
    )


def test_many_sites_that_are_waited_for_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    rounds = machine([f"s{i:02}" for i in range(40)], quorum=2, join_timeout=90)
    rounds.joined("s00", "s00", 0)
    log = WaitingLog(rounds, lambda: NOON)
    log.look(0)
    log.look(60)
    (line,) = caplog.messages
    assert "s09, s10, 29 others (never joined; until 12:00:30)" in line
    assert "s00 (training; until 12:00:40)" in line
    count = Rounds(Roster(None, 3), rounds=1, quorum=1, deadline=100, version=0, join_timeout=90)
    count.joined("x", "x", 0)
    caplog.clear()
    other = WaitingLog(count, lambda: NOON)
    other.look(0)
    other.look(60)
    assert "2 more sites (never joined; until 12:00:30)" in caplog.messages[0]
