"""An update that an earlier process of the site has trained, offered to a server played word by word."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcore import protocol as p

from ..support.stage import DEADLINE, SPECS, Stage, begun_round, fill, same, stage


def files(root: Path) -> set[str]:
    return {path.name for path in root.rglob("*") if path.is_file()} - {"lock"}


def leave_an_update(root: Path, run_id: str) -> p.Ready:
    """Train the first round in a process that ends before anything comes of it."""
    with stage(work=root) as (server, session, call):
        server.run_id = run_id
        begun_round(server, session, call)
        session.score({"loss": 0.25}, 10)
        session.submit(fill(2.5), 7, {"train_loss": 1.0})
        ready = server.expect(p.Ready)
    assert files(root) == {"update.json", "update.safetensors"}
    return ready


def rejoin(server: Stage, run_id: str) -> None:
    server.run_id = run_id
    server.expect(p.Join)
    server.welcome()


RUN = "5" * 32


def test_it_is_offered_again_for_its_round_and_the_script_goes_on_with_the_next(
    tmp_path: Path, pump: str
) -> None:
    left = leave_an_update(tmp_path, RUN)
    with stage(work=tmp_path) as (server, session, call):
        running = call(session.is_running)
        rejoin(server, RUN)
        server.task("train", 1, server.publish(1))
        assert server.expect(p.Ready) == left
        assert [m for m in server.heard if isinstance(m, p.Score)] == [
            p.Score(run_id=RUN, version=0, metrics={"loss": 0.25}, examples=10)
        ]
        assert same(server.pull(left), 2.5)
        server.say(p.Commit(version=1, included=True, participants=["north"]))
        server.task("train", 2, server.publish(2))
        assert running.result(DEADLINE) is True
        assert files(tmp_path) == {"update.safetensors"}, "its record goes with the commit"

        begun = call(session.begin, SPECS, {}, fill(0))
        server.accept()
        assert begun.result(DEADLINE).round == 2
        session.submit(fill(4.5), 7)
        again = server.expect(p.Ready, lambda ready: ready.round == 2)
        assert same(server.pull(again), 4.5)
        server.say(p.Finish(ok=True, outcome="complete"))
        assert call(session.is_running).result(DEADLINE) is False
    assert not tmp_path.exists() or files(tmp_path) == set()


def test_a_server_that_is_started_again_meanwhile_is_told_of_it_too(
    tmp_path: Path, pump: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave_an_update(tmp_path, RUN)
    monkeypatch.setattr(p, "REPEAT_SECONDS", 60.0)
    with stage(work=tmp_path) as (server, session, call):
        call(session.is_running)
        rejoin(server, RUN)
        server.task("train", 1, server.publish(1))
        assert server.expect(p.Ready) == left
        server.say(p.Rejoin())
        server.expect(p.Join)
        server.welcome()
        assert server.expect(p.Ready) == left
        server.say(p.Finish(ok=True, outcome="complete"))


def test_one_that_is_dropped_goes(tmp_path: Path) -> None:
    leave_an_update(tmp_path, RUN)
    with stage(work=tmp_path) as (server, session, call):
        running = call(session.is_running)
        rejoin(server, RUN)
        server.task("train", 1, server.publish(1))
        server.expect(p.Ready)
        server.say(p.Dropped(round=1, message="the round had closed"))
        server.task("train", 2, server.publish(2))
        assert running.result(DEADLINE) is True
        assert files(tmp_path) == {"update.safetensors"}


@pytest.mark.parametrize(("run_id", "round_"), [(RUN, 2), ("6" * 32, 1)], ids=["round", "run"])
def test_one_for_something_else_is_removed_and_the_script_trains(
    tmp_path: Path, run_id: str, round_: int
) -> None:
    leave_an_update(tmp_path, RUN)
    with stage(work=tmp_path) as (server, session, call):
        running = call(session.is_running)
        rejoin(server, run_id)
        server.task("train", round_, server.publish(1))
        assert running.result(DEADLINE) is True
        begun = call(session.begin, SPECS, {}, fill(0))
        server.accept()
        assert begun.result(DEADLINE).round == round_
        assert files(tmp_path) == {"update.safetensors"}, "only room for the next one"
        assert not [m for m in server.heard if isinstance(m, p.Ready)]


def test_a_run_that_is_given_up_leaves_it_for_the_next_start(tmp_path: Path) -> None:
    with stage(work=tmp_path) as (server, session, call):
        begun_round(server, session, call)
        session.submit(fill(2.5), 7)
        server.expect(p.Ready)
        server.say(p.Finish(ok=False, outcome="stopped", message="stopped on request"))
        assert call(session.is_running).result(DEADLINE) is False
    assert files(tmp_path) == {"update.json", "update.safetensors"}
