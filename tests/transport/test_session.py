"""A site's session against a server that this file plays word by word over a real socket."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from fedcore import protocol as p
from fedcore._core import Layout
from fedcore.errors import (
    ClosedError,
    ConfigError,
    LayoutError,
    ProtocolError,
    TransferTimeout,
    WeightError,
)
from fedcore.layout import layout_hash
from fedcore.security.keys import Role, load_kit
from fedcore.security.provision import Project, provision
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport import link as transport
from fedcore.transport.link import ServerLink

from ..support.stage import DEADLINE, LAYOUT, SPECS, Stage, begun_round, fill, limit, same, stage


def test_a_whole_round_and_the_last_evaluation(pump: str) -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        assert server.expect(p.Join).site == "north"
        server.welcome()
        server.task("train", 1, server.publish(1.5))
        assert running.result(DEADLINE) is True

        begun = call(session.begin, SPECS, {"config.json": "{}"}, fill(0))
        server.accept()
        model = begun.result(DEADLINE)
        assert (model.kind, model.round, model.version, model.rounds) == ("train", 1, 0, 2)
        assert all(same(view, 1.5) for view in model.tensors.values())
        assert model.tensors["head.bias"].readonly
        assert session.begin(SPECS, {}, fill(0)) is model

        session.score({"loss": 0.25}, 10)
        session.score({"loss": 9.0}, 10)
        score = server.expect(p.Score)
        assert (score.version, score.metrics, score.examples) == (0, {"loss": 0.25}, 10)

        session.submit(fill(2.5), 7, {"train_loss": 1.0})
        ready = server.expect(p.Ready)
        assert (ready.round, ready.weight, ready.metrics) == (1, 7, {"train_loss": 1.0})
        assert same(server.pull(ready), 2.5)
        server.say(p.Commit(version=1, included=True, participants=["north"]))

        server.task("evaluate", 2, server.publish(3.5))
        assert call(session.is_running).result(DEADLINE) is True
        model = call(session.begin, SPECS, {}, fill(0)).result(DEADLINE)
        assert (model.kind, model.version) == ("evaluate", 2)
        session.score({"loss": 0.125}, 10)
        assert server.expect(p.Score).version == 2
        running = call(session.is_running)
        server.say(p.Finish(ok=True, outcome="complete", best_version=2))
        assert running.result(DEADLINE) is False
        assert not [m for m in server.heard if isinstance(m, p.Score)]


def test_the_first_site_publishes_the_initial_model(pump: str) -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.welcome(has_model=False)
        assert running.result(DEADLINE) is True  # the script must be able to show its model
        begun = call(session.begin, SPECS, {}, fill(4.5))
        server.accept()
        server.say(p.Task(kind="initial", round=0, rounds=2, version=0))
        ready = server.expect(p.Ready)
        assert (ready.round, ready.weight, ready.model.layout) == (0, 1, layout_hash(LAYOUT))
        assert same(server.pull(ready), 4.5)
        server.say(p.Commit(version=0, included=True, participants=["north"]))
        server.task("train", 1, server.publish(4.5))
        assert begun.result(DEADLINE).kind == "train"


def test_no_server_gets_an_update_past_the_bound_under_round_0() -> None:
    with stage(clip=0.5) as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.welcome()
        server.task("submit", 0, server.publish(1))
        running.result(DEADLINE)
        begun = call(session.begin, SPECS, {}, fill(0))
        server.accept()
        begun.result(DEADLINE)
        session.submit(fill(2), 3, {})
        change = np.frombuffer(server.pull(server.expect(p.Ready)), np.float32) - np.float64(1)
        assert 0 < np.linalg.norm(change) <= 0.5


def test_no_server_gets_a_trained_model_past_the_bound_as_a_first_one() -> None:
    with stage(clip=0.5) as (server, session, call):
        begun_round(server, session, call)
        session.submit(fill(2), 3, {})
        server.expect(p.Ready)
        server.say(p.Task(kind="initial", round=0, rounds=2, version=0))
        assert call(session.is_running).result(DEADLINE) is True
        with pytest.raises(ProtocolError, match="initial model after training.*FEDCORE_CLIP"):
            call(session.begin, SPECS, {}, fill(2)).result(DEADLINE)
        assert not [m for m in server.heard if isinstance(m, p.Ready)]


def test_a_restarted_server_gets_everything_again(pump: str) -> None:
    with stage() as (server, session, call):
        begun_round(server, session, call)
        session.submit(fill(2), 3, {})
        first = server.expect(p.Ready)

        server.say(p.Rejoin())
        server.expect(p.Join)
        server.welcome()
        server.accept()
        again = server.expect(p.Ready)
        assert again == first
        assert same(server.pull(again), 2)


def test_a_site_at_work_lets_a_restarted_server_know_it(
    pump: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p, "REPEAT_SECONDS", 0.2)
    with stage() as (server, session, call):
        begun_round(server, session, call)
        server.expect(p.Alive)
        server.say(p.Rejoin())
        assert server.expect(p.Join).site == "north"


def test_a_site_is_back_within_the_time_that_a_restarted_server_gives_it() -> None:
    redial = transport.RECONNECT_MS[1] / 1000
    assert redial + p.REPEAT_SECONDS + 1 < p.RETURN_SECONDS


def test_a_model_that_vanished_is_pulled_under_its_new_id(pump: str) -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.welcome()
        server.task("train", 1, uuid.uuid4().hex)  # nobody publishes this one
        running.result(DEADLINE)
        begun = call(session.begin, SPECS, {}, fill(0))
        server.accept()
        server.task("train", 1, server.publish(6))
        assert same(begun.result(DEADLINE).tensors["head.weight"], 6)


def test_what_is_said_in_another_run_changes_nothing(pump: str) -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.welcome()
        server.say(p.Finish(ok=False, outcome="failed", message="another", run_id="0" * 32))
        server.say(p.Task(kind="train", round=2, rounds=9, version=1, run_id="0" * 32))
        server.task("train", 1, server.publish(0))
        assert running.result(DEADLINE) is True
        assert session.system_info()["round"] == 1


def test_a_layout_that_differs_is_a_layout_error(pump: str) -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.welcome()
        server.task("train", 1, server.publish(0))
        running.result(DEADLINE)
        begun = call(session.begin, SPECS, {}, fill(0))
        server.expect(p.Declare)
        server.say(p.Refused(code="layout", message="tensor 'x': north has F32 [2]"))
        with pytest.raises(LayoutError, match=r"north has F32 \[2\]"):
            begun.result(DEADLINE)


def test_a_site_takes_tensors_of_its_own_names_dtypes_and_shapes_alone() -> None:
    other = Layout([("__class__", "F64", [999]), ("head.bias", "I32", [1])], 4096)
    with stage() as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.welcome()
        server.task("train", 1, server.publish(3), other)
        running.result(DEADLINE)
        begun = call(session.begin, SPECS, {}, fill(0))
        server.accept()
        model = begun.result(DEADLINE)
        assert {name: len(data) for name, data in model.tensors.items()} == {
            "head.weight": 8000,
            "head.bias": 200,
        }
        assert [tuple(spec)[:2] for spec in model.specs] == [
            (name, dtype) for name, dtype, _ in sorted(SPECS)
        ]


def test_a_server_that_accepts_another_layout_is_not_worked_with() -> None:
    other = Layout([("head.weight", "F32", [2000])], 4096)
    with stage() as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.welcome()
        server.task("train", 1, server.publish(0))
        running.result(DEADLINE)
        begun = call(session.begin, SPECS, {}, fill(0))
        server.expect(p.Declare)
        server.say(p.Accepted(layout_hash=layout_hash(other)))
        with pytest.raises(ProtocolError, match="another layout"):
            begun.result(DEADLINE)


@pytest.mark.parametrize("kind", ["train", "submit", "evaluate", "infer"])
def test_a_task_that_needs_a_model_and_names_none_is_an_error_that_says_so(kind: Any) -> None:
    with stage() as (server, session, call):
        call(session.is_running)
        server.expect(p.Join)
        server.welcome()
        server.say(p.Task(kind=kind, round=1, rounds=2, version=0))
        begun = call(session.begin, SPECS, {}, fill(0))
        server.accept()
        with pytest.raises(ProtocolError, match=f"task '{kind}' of round 1 without a model"):
            begun.result(DEADLINE)


@pytest.mark.parametrize("included", [1, None])
def test_the_next_task_of_a_restarted_server_tells_whether_the_last_update_counts(
    included: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with stage() as (server, session, call):
        begun_round(server, session, call)
        session.submit(fill(2.5), 7)
        server.expect(p.Ready)
        running = call(session.is_running)
        server.say(p.Rejoin())  # the server was killed after the commit, before it said so
        server.expect(p.Join)
        server.welcome()
        task = p.Task(kind="train", round=2, rounds=2, version=1, included=included)
        server.say(task)
        assert running.result(DEADLINE) is True
        server.accept()
        session.log({"loss": 0.5})
        server.expect(p.Log)
        assert not [m for m in server.heard if isinstance(m, p.Ready) and m.round == 1]
    said = "round 1 is committed, with this site's update"
    assert (said in caplog.text) is (included == 1)
    assert ("does not count" in caplog.text) is (included is None)


@pytest.mark.parametrize("settled", [False, True])
def test_a_site_whose_server_is_gone_after_the_last_round_says_what_it_knows(
    settled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.welcome()
        server.task("train", 2, server.publish(1))
        assert running.result(DEADLINE) is True
        begun = call(session.begin, SPECS, {}, fill(0))
        server.accept()
        begun.result(DEADLINE)
        session.submit(fill(2.5), 7)
        server.pull(server.expect(p.Ready))
        if settled:
            server.say(p.Commit(version=2, included=True, participants=["north"]))
            while session.connection.machine.included != 2:
                server.link.recv(0.01)
        limit(session, idle_timeout=1.0)
        running = call(session.is_running)
        server.link.close()
        assert running.result(DEADLINE) is False
        assert session.outcome == "unknown"
    known = (
        "round 2 counts" if settled else "round 2 was sent whole; whether it counts is not known"
    )
    assert f"how the run ended is not known: {server.link.endpoint} has been silent" in caplog.text
    assert known in caplog.text


def test_a_server_that_falls_silent_is_given_up_after_the_idle_timeout(pump: str) -> None:
    link = ServerLink("tcp://127.0.0.1:0")
    server = Stage(link)
    session = Session(SiteSettings(server=link.endpoint, site="north"))
    with ThreadPoolExecutor(1) as pool:
        try:
            running = pool.submit(session.is_running)
            server.expect(p.Join)
            server.welcome()
            link.close()
            limit(session, idle_timeout=1.0)
            with pytest.raises(TransferTimeout, match="silent for 1 s"):
                running.result(DEADLINE)
        finally:
            session.close()


def test_a_site_that_is_late_goes_on_with_the_round_that_came_meanwhile() -> None:
    with stage() as (server, session, call):
        begun_round(server, session, call)
        connection = session.connection
        machine = connection.machine
        server.task("train", 2, server.publish(2))
        with connection.changed:
            arrived = connection.changed.wait_for(
                lambda: machine.task is not None and machine.task.round == 2, DEADLINE
            )
        assert arrived
        session.log({"train_loss": 1.0})
        assert server.expect(p.Log).round == 1
        session.submit(fill(0), 1, {})
        assert server.expect(p.Ready).round == 1
        assert call(session.is_running).result(DEADLINE)
        assert call(session.begin, SPECS, {}, fill(0)).result(DEADLINE).round == 2


@pytest.mark.parametrize("weight", [0, -1, 1 << 64, 2.5, True, "3"])
def test_a_weight_out_of_range_is_refused(weight: object) -> None:
    with stage() as (server, session, call):
        begun_round(server, session, call)
        with pytest.raises(WeightError, match=r"from 1 to 2\*\*64 - 1"):
            session.submit(fill(0), weight, {})  # type: ignore[arg-type]


def test_a_round_without_an_update_is_an_error_and_no_endless_loop() -> None:
    with stage() as (server, session, call):
        begun_round(server, session, call)
        with pytest.raises(ClosedError, match="no update was sent"):
            session.is_running()


def test_a_loop_that_never_takes_its_task_is_told_so() -> None:
    with stage() as (server, session, call):
        running = call(session.is_running)
        server.expect(p.Join)
        server.welcome()
        server.task("train", 1, server.publish(1))
        assert running.result(DEADLINE) is True
        with pytest.raises(ClosedError, match="without touching the current task"):
            session.is_running()


def test_a_model_that_changes_between_rounds_is_named() -> None:
    with stage() as (server, session, call):
        begun_round(server, session, call)
        with pytest.raises(LayoutError, match="head.bias"):
            session.begin([SPECS[0], ("head.bias", "F32", [51])], {}, fill(0))


def test_submitting_outside_a_task_is_an_error() -> None:
    with stage() as (_, session, _), pytest.raises(ClosedError, match="there is no current task"):
        session.submit(fill(0), 1, {})


def test_a_site_that_ends_says_so() -> None:
    with stage() as (server, session, call):
        begun_round(server, session, call)
        session.close()
        assert server.expect(p.Leave).reason == "the site's process ended"


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({}, "FEDCORE_SERVER and FEDCORE_SITE not set"),
        ({"FEDCORE_SERVER": "tcp://h:1"}, "FEDCORE_SITE not set"),
        ({"FEDCORE_SERVER": "http://h:1", "FEDCORE_SITE": "a"}, "expected tcp://HOST:PORT"),
        ({"FEDCORE_SERVER": "tcp://h:1", "FEDCORE_SITE": "a/b"}, "FEDCORE_SITE: name .a/b."),
        (
            {
                "FEDCORE_SERVER": "tcp://[::1]:1",
                "FEDCORE_SITE": "a",
                "FEDCORE_INSECURE": "1",
                "FEDCORE_CONNECT_TIMEOUT": "soon",
            },
            "FEDCORE_CONNECT_TIMEOUT",
        ),
        ({"FEDCORE_SERVER": "tcp://127.0.0.1:1", "FEDCORE_SITE": "a"}, "FEDCORE_KIT not set"),
        (
            {"FEDCORE_SERVER": "tcp://192.0.2.1:1", "FEDCORE_SITE": "a", "FEDCORE_INSECURE": "1"},
            "insist with FEDCORE_INSECURE_NETWORK=1",
        ),
        (
            {"FEDCORE_SERVER": "tcp://h:1", "FEDCORE_SITE": "north\n"},
            "FEDCORE_SITE: name 'north.n': .*white space or a line break",
        ),
        (
            {"FEDCORE_SERVER": "tcp://h:1\n", "FEDCORE_SITE": "a"},
            "FEDCORE_SERVER: address 'tcp://h:1.n': .*ends in white space",
        ),
        ({"FEDCORE_SERVER": "tcp://h:99999", "FEDCORE_SITE": "a"}, "a port from 1 to 65535"),
        ({"FEDCORE_KIT": "nowhere"}, "nowhere does not exist.*`fedcore provision` made"),
    ],
)
def test_settings_that_are_wrong_say_what_to_set(environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SiteSettings.from_environment(environ)


def test_a_kit_folder_names_server_site_and_keys(tmp_path) -> None:
    made = provision(Project("tcp://h:1", {"north": Role.SITE}), tmp_path).kits["north"]
    found = SiteSettings.from_environment({"FEDCORE_KIT": str(made)})
    assert (found.server, found.site) == ("tcp://h:1", "north")
    assert found.credentials == load_kit(made).credentials
    elsewhere = {"FEDCORE_KIT": str(made), "FEDCORE_SERVER": "tcp://g:2"}
    assert SiteSettings.from_environment(elsewhere).server == "tcp://g:2"
    with pytest.raises(ConfigError, match="is that of 'north'"):
        SiteSettings.from_environment({"FEDCORE_KIT": str(made), "FEDCORE_SITE": "south"})


def test_plain_text_to_another_machine_is_insisted_on_twice() -> None:
    environ = {"FEDCORE_SERVER": "tcp://192.0.2.1:1", "FEDCORE_SITE": "a", "FEDCORE_INSECURE": "1"}
    found = SiteSettings.from_environment({**environ, "FEDCORE_INSECURE_NETWORK": "1"})
    assert found.credentials is None


def test_metrics_of_every_step_go_out_a_few_times_a_second_and_the_last_before_the_update() -> None:
    with stage() as (server, session, call):
        begun_round(server, session, call)
        for step in range(5000):
            session.log({"train_loss": float(step), f"other-{step}": 1.0}, step=step)
        session.submit(fill(0), 1, {})
        said = []
        while not said or said[-1].metrics["train_loss"] != 4999.0:
            said.append(server.expect(p.Log))
        server.expect(p.Ready)
        assert 20 <= len(said) < 500
        assert said[-1].step == 4999
        assert max(len(message.metrics) for message in said) <= p.MAX_METRICS


def test_a_metric_with_a_name_that_no_message_has_costs_neither_the_others_nor_the_update() -> None:
    with stage() as (server, session, call):
        begun_round(server, session, call)
        for step in range(100):
            session.log({"n" * 500: 1.0, "": 2.0, "loss": float(step)}, step=step)
        session.submit(fill(0), 1, {})
        said = server.expect(p.Log)
        assert said.metrics == {"n" * p.MAX_NAME: 1.0, "unnamed": 2.0, "loss": 0.0}
        while said.metrics["loss"] != 99.0:
            said = server.expect(p.Log)
        server.expect(p.Ready)
