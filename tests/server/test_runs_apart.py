"""Runs on one port are apart: a peer of one gets nothing of another, and learns nothing of it."""

from __future__ import annotations

import functools
import logging
import threading
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedcore import protocol
from fedcore.monitor.ask import StatusClient, ask_status
from fedcore.security.keys import load_kit
from fedcore.security.provision import Project, provision
from fedcore.server.host import WHICH_RUN
from fedcore.server.run import Run
from fedcore.transport.link import SiteLink

from ..support.several_runs import (
    DEADLINE,
    MODELS,
    PARTIES,
    UNKNOWN,
    Answers,
    Lines,
    Peer,
    run_file,
    serving,
    site,
    wait_for,
)


def test_a_peer_of_one_run_gets_neither_sets_nor_status_nor_names_of_another(
    tmp_path: Path,
) -> None:
    release, trains = threading.Event(), threading.Event()

    def hold(_: int) -> None:
        trains.set()
        assert release.wait(DEADLINE)

    people = {"sites": ["a", "b", "spy"], "min_results": 2, "join_timeout": "1s"}
    one_file = run_file(tmp_path, "one", people=people)
    with serving(one_file, run_file(tmp_path, "two")) as (host, pool, ended):
        at, (one, two) = host.endpoint, host.runs
        sites = [pool.submit(site, at, "one", name, hold) for name in ("a", "b")]
        sites += [pool.submit(site, at, "two", name, hold) for name in ("b", "c")]
        assert trains.wait(DEADLINE)
        wait_for(lambda: all(run.versions.set_id for run in host.runs))
        with closing(SiteLink(at, uuid.uuid4().bytes)) as link:
            peer = Peer(link)
            for name, run in (("x", "one"), ("spy", "two"), ("spy", "three"), ("spy", None)):
                peer.send(protocol.Join(version="0", site=name, run=run, instance="0" * 32))
                refused = peer.await_message(protocol.Refused)
                assert (refused.code, refused.message) == ("other-run", WHICH_RUN)
            requests = (
                protocol.StatusRequest(),
                protocol.MetricsRequest(),
                protocol.Command(action="pause"),
            )
            for request in requests:
                peer.send(request)
                assert peer.await_message(protocol.Refused).message == WHICH_RUN
            assert [peer.pulls(run) for run in (one, two)] == [UNKNOWN] * 2
            peer.send(protocol.Join(version="0", site="spy", run="one", instance="0" * 32))
            assert peer.await_message(protocol.Welcome).run == "one"
            assert [peer.pulls(run) for run in (one, two)] == ["", UNKNOWN]
            link.run_id = two.store.run_id  # as one that has guessed it
            for request in (*requests, protocol.Declare(tensors=[("w", "F32", [700])])):
                peer.send(request)
                peer.await_message(protocol.Rejoin)
            link.run_id = None
            peer.send(protocol.Declare(tensors=[("no", "F32", [1])]))
            assert peer.await_message(protocol.Refused).code == "layout"
            peer.send(protocol.Join(version="0", site="spy", run="one", instance="0" * 32))
            peer.await_message(protocol.Welcome)
            assert not [text for text in ("two", two.store.run_id) if text in str(peer.received)]
            peer.send(protocol.StatusRequest())
            assert peer.await_message(protocol.StatusReply).run == "one"
            peer.send(protocol.Leave(reason="it has seen enough"))
        status = ask_status(f"{at}#{two.store.run_id}", DEADLINE)
        assert (status.run, [s.site for s in status.sites]) == ("two", ["b", "c"])
        with StatusClient(f"{at}#{two.store.run_id}") as client:
            assert client.training(DEADLINE) == []
        release.set()
        assert [done.result(DEADLINE) for done in sites] == [3] * 4
        assert all(result.ok for result in ended.result(DEADLINE))


def answer_of(address: str, kit: Path, message: protocol.FromSite, run: Run | None = None) -> Any:
    """Say something to a server with the key of a kit, within a run or none; returns the answer."""
    with closing(SiteLink(address, uuid.uuid4().bytes, load_kit(kit).credentials)) as link:
        link.run_id = None if run is None else run.store.run_id
        peer = Peer(link)
        peer.send(message)
        return peer.await_message(Answers)


def test_a_sites_key_gets_nothing_of_a_run_that_it_is_not_in(tmp_path: Path) -> None:
    kits = provision(Project("tcp://127.0.0.1:7733", PARTIES), tmp_path / "kits").kits
    keyed = {"insecure": False, "keys": "kits/server"}
    with serving(*(run_file(tmp_path, name, **keyed) for name in MODELS)) as (host, _, _):
        one, two = host.runs
        first_answer = functools.partial(answer_of, host.endpoint)
        for run in (None, one, two):
            refused = first_answer(kits["a"], protocol.StatusRequest(), run)
            assert refused.code == "role"
            assert "two" not in refused.message
        join = protocol.Join(version="0", site="a", run="two", instance="0" * 32)
        refused = first_answer(kits["a"], join)
        assert (refused.code, refused.message) == ("other-run", WHICH_RUN)
        for name in ("eye", "ops"):  # the host's own people see all of its runs
            assert first_answer(kits[name], protocol.StatusRequest()).message == WHICH_RUN
            for run in (one, two):
                status = first_answer(kits[name], protocol.StatusRequest(), run)
                assert status.run == run.config.run.name
        for run in (one, two):  # and the key in a run folder is for that run
            folder = run.store.folder
            status = first_answer(folder / "local", protocol.StatusRequest())
            assert status.run == run.config.run.name
            reply = first_answer(folder / "local", protocol.Command(action="pause"))
            assert (reply.ok, reply.run_id) == (True, run.store.run_id)
        with closing(
            SiteLink(
                host.endpoint, uuid.uuid4().bytes, load_kit(one.store.folder / "local").credentials
            )
        ) as link:
            link.run_id = two.store.run_id
            Peer(link).send(protocol.StatusRequest())
            assert Peer(link).await_message(protocol.Rejoin)


def test_a_server_of_one_of_two_runs_tells_a_site_of_the_other_nothing_of_it(
    tmp_path: Path,
) -> None:
    kits = provision(Project("tcp://127.0.0.1:7733", PARTIES), tmp_path / "kits").kits
    keyed = {"insecure": False, "keys": "kits/server"}
    people = {"sites": ["anna", "bert", "b"]}
    with serving(run_file(tmp_path, "one", people=people, **keyed)) as (host, _, _):
        (one,) = host.runs

        def joins(name: str, run: str | None) -> Any:
            join = protocol.Join(version="0", site=name, run=run, instance="0" * 32)
            return answer_of(host.endpoint, kits[name], join)

        for wanted, code in (("two", "other-run"), ("one", "unknown-site"), (None, "unknown-site")):
            refused = joins("c", wanted)
            assert refused.code == code
            for text in ("anna", "bert", one.store.run_id, *(["'one'"] if wanted != "one" else [])):
                assert text not in refused.message
        assert "serves run 'one', and not run 'two'" in joins("b", "two").message


def test_lines_about_a_peer_are_in_the_log_of_its_run_and_others_in_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fedcore.server")
    logs = {name: Lines(name) for name in MODELS}
    logger = logging.getLogger("fedcore.server")
    for handler in logs.values():
        logger.addHandler(handler)
    try:
        with (
            serving(run_file(tmp_path, "one"), run_file(tmp_path, "two")) as (host, _, _),
            closing(SiteLink(host.endpoint, uuid.uuid4().bytes)) as link,
        ):
            peer = Peer(link)
            peer.send(protocol.Join(version="0", site="x", run="one", instance="0" * 32))
            peer.await_message(protocol.Refused)
            peer.send(protocol.Join(version="0", site="c", run="two", instance="0" * 32))
            peer.await_message(protocol.Welcome)
            peer.send(protocol.Problem(message="lightning"))
            peer.send(protocol.Ready.model_construct(round=1, sets=[], weight=1))  # it needs a set
            peer.await_message(protocol.Refused)
    finally:
        for handler in logs.values():
            logger.removeHandler(handler)
    found = {name: "\n".join(handler.lines) for name, handler in logs.items()}
    assert all("refused x: this server has several runs" in text for text in found.values())
    for text in ("c joined", "lightning", "c sent a"):
        assert (text in found["one"], text in found["two"]) == (False, True), text
