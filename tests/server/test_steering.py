"""An operator pauses, resumes, evaluates and stops a run; nobody else does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedcore import protocol
from fedcore.cli.app import app
from fedcore.errors import StorageError
from fedcore.monitor.ask import StatusClient
from fedcore.security.keys import Role, load_kit
from fedcore.security.provision import Project, Provisioned, provision
from fedcore.server.ending import Ending
from fedcore.server.rounds.actions import (
    Action,
    EndRun,
    Participant,
    PullAhead,
    SendTask,
    StartCollect,
)
from fedcore.server.rounds.participation import Delivery, Roster
from fedcore.server.rounds.rounds import Phase, Rounds
from fedcore.server.rounds.steering import steer
from fedcore.server.storage.past import read_past
from fedcore.server.storage.store import Store

from ..support.links import DEADLINE, Links
from ..support.secured_runs import answer, models, running, server_of, site

pytestmark = pytest.mark.timeout(600)


def joined(version: int | None = 0, rounds: int = 2, sample: int | None = None) -> Rounds:
    found = Rounds(
        Roster(["a", "b"], None),
        rounds=rounds,
        quorum=sample or 2,
        deadline=100,
        version=version,
        sample=sample,
    )
    for name in ("a", "b"):
        found.joined(name, name, 0)
    return found


def close_round(rounds: Rounds) -> list[Action]:
    for name in ("a", "b"):
        actions = rounds.ready(name, rounds.round, Delivery("0" * 32, 1))
    assert isinstance(actions[-1], StartCollect)
    rounds.reduced()
    return rounds.committed(rounds.round, 1)


def tasks(actions: list[Action]) -> list[tuple[str, str, int]]:
    return [(a.site, a.kind, a.round) for a in actions if isinstance(a, SendTask)]


def test_a_paused_run_ends_its_round_and_begins_no_other_until_it_is_resumed() -> None:
    rounds = joined()
    reply, actions = steer(rounds, "pause", 0)
    assert (reply.message, actions) == ("paused after round 1, which is under way", [])
    assert close_round(rounds) == []
    assert rounds.version == 1
    assert rounds.tick(1000) == []
    assert rounds.deadline is None
    assert tasks(rounds.joined("a", "again", 1001)) == []
    reply, actions = steer(rounds, "resume", 1002)
    assert tasks(actions) == [("a", "train", 2), ("b", "train", 2)]


def test_updates_that_come_while_a_run_is_held_wait_until_it_is_resumed() -> None:
    rounds = joined()
    steer(rounds, "pause", 0)
    close_round(rounds)
    early = Delivery("1" * 32, 1)
    assert rounds.ready("a", 2, early) + rounds.ready("b", 2, early) == []
    assert rounds.lost("b", "gone", 2) + rounds.joined("b", "again", 3) == []
    assert rounds.tick(1000) == []
    actions = steer(rounds, "resume", 1001)[1]
    assert tasks(actions) == [("b", "train", 2)], "what another process offered counts no longer"
    assert actions[1:] == [PullAhead(2, Participant("a", early.set_id, 1))]
    steer(rounds, "pause", 1002)
    (collect,) = rounds.ready("b", 2, early)
    assert isinstance(collect, StartCollect), "the round is under way"


def test_a_round_whose_updates_are_all_there_closes_when_the_run_is_resumed() -> None:
    rounds = joined()
    steer(rounds, "pause", 0)
    close_round(rounds)
    for name in ("a", "b"):
        assert rounds.ready(name, 2, Delivery("1" * 32, 1)) == []
    (collect,) = steer(rounds, "resume", 5)[1]
    assert isinstance(collect, StartCollect)
    assert not rounds.held


def test_a_pause_taken_back_in_the_same_round_changes_nothing() -> None:
    rounds = joined()
    steer(rounds, "pause", 0)
    assert steer(rounds, "resume", 0)[1] == []
    assert tasks(close_round(rounds)) == [("a", "train", 2), ("b", "train", 2)]


def test_a_run_paused_before_its_first_model_asks_nobody_for_it() -> None:
    rounds = joined(version=None)
    steer(rounds, "pause", 0)
    assert steer(rounds, "evaluate", 0)[0].message.startswith("there is no model yet")
    assert rounds.declared("a", 0) + rounds.declared("b", 0) == []
    assert tasks(steer(rounds, "resume", 1)[1]) == [("a", "initial", 0)]


def test_a_paused_run_chooses_no_sample() -> None:
    rounds = joined(sample=1)
    steer(rounds, "pause", 0)
    rounds.ready("a", 1, Delivery("0" * 32, 1))
    rounds.ready("b", 1, Delivery("0" * 32, 1))
    rounds.reduced()
    assert rounds.committed(1, 1) == []
    assert rounds.tick(50) == []
    assert len(tasks(steer(rounds, "resume", 51)[1])) == 1


def test_a_held_run_has_its_last_model_scored_on_request_and_goes_on_afterwards() -> None:
    rounds = joined(rounds=1)
    assert not steer(rounds, "evaluate", 0)[0].ok
    steer(rounds, "pause", 0)
    assert not steer(rounds, "evaluate", 0)[0].ok
    close_round(rounds)
    reply, actions = steer(rounds, "evaluate", 1)
    assert (reply.message, tasks(actions)) == (
        "2 sites now score model 1; --wait shows the result",
        [("a", "evaluate", 1), ("b", "evaluate", 1)],
    )
    assert rounds.scored("a", 1) + rounds.scored("b", 1) == []
    assert rounds.phase is Phase.EVALUATING
    assert steer(rounds, "resume", 2)[1] == [EndRun(True, "")]
    assert not steer(rounds, "pause", 3)[0].ok


@pytest.fixture
def kits(tmp_path: Path) -> Provisioned:
    parties = {"a": Role.SITE, "eye": Role.OBSERVER, "ops": Role.OPERATOR}
    return provision(Project("tcp://127.0.0.1:7733", parties), tmp_path / "kits")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_an_operator_steers_a_run_over_the_port(
    tmp_path: Path, kits: Provisioned, capsys: pytest.CaptureFixture[str]
) -> None:
    server = server_of(tmp_path, sites=["a"], rounds=3)
    credentials = load_kit(kits.kits["ops"]).credentials
    reached, go = threading.Event(), threading.Event()

    def hold(round_: int) -> None:
        reached.set()
        assert go.wait(DEADLINE)

    with (
        running(server) as (pool, result),
        StatusClient(server.endpoint, credentials) as operator,
    ):
        trained = pool.submit(site, kits.kits["a"], server.endpoint, 1, hold)
        assert reached.wait(DEADLINE)
        reply = operator.command("pause", DEADLINE)
        assert (reply.ok, reply.message) == (True, "paused after round 1, which is under way")
        asked = operator.ask(DEADLINE)
        assert (asked.phase, asked.eta) == ("paused", None)
        go.set()
        until(lambda: operator.ask(DEADLINE).versions[-1].version == 1)
        assert operator.command("evaluate", DEADLINE).message == (
            "1 site now scores model 1; --wait shows the result"
        )
        until(lambda: operator.ask(DEADLINE).versions[-1].metrics == {"loss": 1.0})
        app(
            ["evaluate", server.endpoint, "--wait", "--kit", str(kits.kits["ops"])],
            standalone_mode=False,
        )
        assert capsys.readouterr().out == (
            "all sites that are there have scored model 1\nmodel 1: scored by 1 site, loss 1\n"
        )
        found = operator.ask(DEADLINE)
        assert (found.message, found.versions[-1].version) == ("paused: no other round begins", 1)
        assert (found.phase, found.eta) == ("paused", None)
        assert operator.command("resume", DEADLINE).ok
        assert trained.result(200) == 3
        assert result.result(200).ok
    assert models(tmp_path) == [0, 1, 2, 3]


def test_an_operator_stops_a_run_as_ctrl_c_does(tmp_path: Path, kits: Provisioned) -> None:
    server = server_of(tmp_path, sites=["a"])
    credentials = load_kit(kits.kits["ops"]).credentials
    with (
        running(server) as (_, result),
        StatusClient(server.endpoint, credentials) as operator,
    ):
        assert operator.command("stop", DEADLINE).ok
        assert (result.result(200).ending, result.result(200).message) == (
            "stopped",
            "stopped on request",
        )


def test_a_stop_that_cannot_be_written_is_an_error_and_the_run_goes_on(
    tmp_path: Path, kits: Provisioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Store) -> None:
        raise StorageError("cannot write /srv/run.sqlite: database or disk is full")

    monkeypatch.setattr(Store, "ask_stop", full)
    server = server_of(tmp_path, sites=["a"])
    credentials = load_kit(kits.kits["ops"]).credentials
    with (
        running(server) as (_, result),
        StatusClient(server.endpoint, credentials) as operator,
    ):
        reply = operator.command("stop", DEADLINE)
        assert not reply.ok
        assert "cannot write to its disk" in reply.message
        assert "/srv" not in reply.message
        assert operator.ask(DEADLINE).phase == "waiting"
        assert not result.done()


@pytest.mark.parametrize("killed_in", ["end", "say_goodbye"])
def test_a_run_whose_stop_was_answered_ends_also_if_the_server_is_killed(
    tmp_path: Path, kits: Provisioned, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    server = server_of(tmp_path, sites=["a"])
    address = server.endpoint
    credentials = load_kit(kits.kits["ops"]).credentials
    with ThreadPoolExecutor(2) as pool, monkeypatch.context() as patch:
        patch.setattr(Ending, killed_in, kill)
        result = pool.submit(server.run)
        with StatusClient(address, credentials) as operator:
            assert operator.command("stop", DEADLINE).ok
        assert isinstance(result.exception(60), Killed)
    assert "an operator has stopped the run" in read_past(tmp_path / "runs/t").message
    assert server_of(tmp_path, sites=["a"]).run().ending == "stopped"
    server = server_of(tmp_path, sites=["a"])
    with (
        running(server) as (_, result),
        StatusClient(server.endpoint, credentials) as operator,
    ):
        assert operator.ask(DEADLINE).phase == "waiting"  # it goes on with the run
        assert not result.done()


@pytest.mark.parametrize("name", ["a", "eye"])
@pytest.mark.parametrize("action", ["pause", "resume", "stop", "evaluate"])
def test_nobody_but_an_operator_steers(
    tmp_path: Path, kits: Provisioned, links: Links, name: str, action: protocol.Steer
) -> None:
    server = server_of(tmp_path, sites=["a"])
    with running(server) as (_, result):
        refused = answer(links, server, kits.kits[name], protocol.Command(action=action))
        assert isinstance(refused, protocol.Refused)
        assert refused.code == "role"
        role = "a site" if name == "a" else "an observer"
        assert f"{name} is {role}, which cannot " in refused.message
        assert refused.message.endswith("; use an operator's kit")
        assert not result.done()


@pytest.fixture
def links() -> Iterator[Links]:
    found = Links()
    yield found
    found.close()
