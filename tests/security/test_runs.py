"""Whole runs over encrypted links: names, roles, and a key that is revoked in the middle of a round."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from fedcore import protocol
from fedcore.config import parse_run
from fedcore.errors import ConfigError, RefusedError, TransferTimeout
from fedcore.monitor.ask import ask_status, find_server
from fedcore.protocol import control_frames
from fedcore.security.keys import KeyPair, Role, edited, load_kit
from fedcore.security.provision import Project, Provisioned, admit, make_key, provision, revoke
from fedcore.server.access import Access
from fedcore.server.service import Server
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.link import Control, now_ms

from ..support.links import DEADLINE, Links, wait
from ..support.secured_runs import (
    PARTIES,
    SPECS,
    answer,
    join,
    models,
    running,
    server_of,
    settings,
    site,
)

pytestmark = pytest.mark.timeout(600)


def test_a_run_over_encrypted_links_gives_the_same_models(
    tmp_path: Path, kits: Provisioned
) -> None:
    server = server_of(tmp_path)
    with running(server) as (pool, result):
        sites = [
            pool.submit(site, kits.kits[name], server.endpoint, step)
            for name, step in (("a", 1), ("b", 3))
        ]
        assert [done.result(200) for done in sites] == [2, 2]
        assert result.result(200).ok
    assert models(tmp_path) == [0, 2, 4]


def test_a_key_revoked_in_mid_round_ends_its_part_and_the_round_goes_on(
    tmp_path: Path, kits: Provisioned, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_of(tmp_path, sites=["a", "b", "c"], min_results=2)
    reached, over = threading.Event(), threading.Event()

    def hold(round_: int) -> None:
        if round_ == 2:
            reached.set()
            assert over.wait(DEADLINE)

    with running(server) as (pool, result):
        honest = [
            pool.submit(site, kits.kits[name], server.endpoint, step)
            for name, step in (("a", 1), ("b", 3))
        ]
        gone = pool.submit(site, kits.kits["c"], server.endpoint, 8, hold)
        assert reached.wait(DEADLINE)
        assert revoke(kits.server, "c") == 0
        assert [done.result(200) for done in honest] == [2, 2]
        assert result.result(200).ok
        over.set()
        with pytest.raises(RefusedError, match="key was revoked"):
            gone.result(200)
    assert models(tmp_path) == [0, 4, 6]
    assert "c is taken out of the run: its key was revoked" in caplog.text


def test_a_revoked_key_does_not_come_back_and_a_new_one_of_the_name_does(
    tmp_path: Path, kits: Provisioned
) -> None:
    server = server_of(tmp_path)
    with running(server) as (pool, result):
        first = Session(settings(kits.kits["a"], server.endpoint))
        assert first.is_running()
        revoke(kits.server, "a")
        with pytest.raises(RefusedError, match="revoked"):
            train_on(first)
        first.close()
        with pytest.raises(RefusedError, match="does not admit this key"):
            site(kits.kits["a"], server.endpoint, 1)
        fresh = tmp_path / "fresh"
        key = make_key(fresh, kits.kits["a"], "", "", "").credentials.pair.public
        admit(kits.server, "a", Role.SITE, key)
        until_admitted(server, key)
        sites = [
            pool.submit(site, kit, server.endpoint, step)
            for kit, step in ((fresh, 1), (kits.kits["b"], 3))
        ]
        assert [done.result(200) for done in sites] == [2, 2]
        assert result.result(200).ok


def test_a_revoked_key_is_not_heard_on_the_connection_that_it_still_has(
    waiting: Server, kits: Provisioned, links: Links, caplog: pytest.LogCaptureFixture
) -> None:
    link = links.site(waiting.endpoint, load_kit(kits.kits["a"]).credentials)
    link.send(join("a"))
    assert wait(link, lambda m: isinstance(m, Control))
    revoke(kits.server, "a")
    told = wait(link, lambda m: isinstance(m, Control) and b"revoked" in m.body)
    assert isinstance(told, Control)
    assert protocol.decode_from_server(told.body).type == "refused"
    for _ in range(3):
        link.send(join("a"))
    answer(links, waiting, kits.kits["b"], join("b"))
    assert link.recv(0.3) is None
    assert "a is taken out of the run" in caplog.text


def test_a_key_whose_role_was_changed_and_changed_back_is_heard_again(
    waiting: Server, kits: Provisioned, links: Links
) -> None:
    key = load_kit(kits.kits["a"]).credentials.pair.public
    door = waiting.link.door
    assert door is not None
    for role in (Role.OBSERVER, Role.SITE):
        with edited(kits.server / "allow.toml") as cell:  # in one step: the key is always listed
            cell[0] = cell[0].revoke("a").admit("a", role, key)
        deadline = time.monotonic() + DEADLINE
        while door.allowed.keys[key].role != role:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert isinstance(answer(links, waiting, kits.kits["a"], join("a")), protocol.Welcome)


def test_what_a_key_declared_keeps_nobody_out_once_it_is_revoked(
    waiting: Server, kits: Provisioned, links: Links
) -> None:
    def declare(name: str, tokenizer: str) -> Any:
        link = links.site(waiting.endpoint, load_kit(kits.kits[name]).credentials)
        link.send(join(name))
        link.send(protocol.Declare(tensors=SPECS, fingerprints={"tokenizer": tokenizer * 64}))
        decided = (b'"accepted"', b'"refused"')
        told = wait(
            link, lambda m: isinstance(m, Control) and any(kind in m.body for kind in decided)
        )
        assert isinstance(told, Control)
        return protocol.decode_from_server(told.body)

    assert declare("a", "1").type == "accepted"
    refused = declare("b", "2")
    assert (refused.code, "tokenizer of site 'b'" in refused.message) == ("unlike", True)
    revoke(kits.server, "a")
    deadline = time.monotonic() + DEADLINE
    while waiting.access.knows("a"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert declare("b", "2").type == "accepted"


def test_a_connection_that_was_silent_and_is_one_too_many_is_cut_though_the_door_sleeps(
    waiting: Server, kits: Provisioned, links: Links, caplog: pytest.LogCaptureFixture
) -> None:
    link = links.site(waiting.endpoint, load_kit(kits.kits["a"]).credentials)
    link.send(join("a"))
    assert wait(link, lambda m: isinstance(m, Control))
    door, exchange = waiting.link.door, waiting.link.exchange
    assert door is not None
    until = time.monotonic() + DEADLINE
    while door.connections.unproved:
        assert time.monotonic() < until
        time.sleep(0.02)
    ((peer, _),) = list(waiting.runs[0].peers)
    exchange.forget(peer)  # as if it had been silent for long
    for number in range(32):
        other = peer.partition(b"\0")[0] + b"\0%d" % number
        exchange.deliver(now_ms(), other, *control_frames(protocol.Alive()))
    while "is not heard any more" not in caplog.text:
        link.send(protocol.Alive())
        assert time.monotonic() < until
        time.sleep(0.02)
    assert "more than 32 connections at once: the others are cut" in caplog.text


def test_a_run_goes_on_under_another_key_of_the_server(tmp_path: Path, kits: Provisioned) -> None:
    reached = threading.Barrier(3, timeout=DEADLINE)

    def leave(round_: int) -> None:
        if round_ == 2:
            reached.wait()
            raise KeyboardInterrupt

    server = server_of(tmp_path, rounds=3)
    with running(server) as (pool, result):
        sites = [
            pool.submit(site, kits.kits[name], server.endpoint, step, leave)
            for name, step in (("a", 1), ("b", 3))
        ]
        reached.wait()
        server.stop()
        assert not result.result(200).ok
        for done in sites:
            with pytest.raises(KeyboardInterrupt):
                done.result(200)
    assert models(tmp_path) == [0, 2]
    new = provision(Project("tcp://127.0.0.1:7733", PARTIES), tmp_path / "new")
    server = server_of(tmp_path, rounds=3, keys="new/server")
    with running(server) as (pool, result):
        with pytest.raises((RefusedError, TransferTimeout)):  # the old server's key
            Session(settings(kits.kits["a"], server.endpoint, connect_timeout=1)).is_running()
        sites = [
            pool.submit(site, new.kits[name], server.endpoint, step)
            for name, step in (("a", 1), ("b", 3))
        ]
        assert [done.result(200) for done in sites] == [2, 2]
        assert result.result(200).ok
    assert models(tmp_path) == [0, 2, 4, 6]


def train_on(session: Session) -> None:
    """Take part in rounds until something is raised."""
    while True:
        session.begin(SPECS, {}, lambda _: bytes(20_000))
        session.submit(lambda _: bytes(20_000), 1)
        session.is_running()


def until_admitted(server: Server, key: str) -> None:
    deadline = time.monotonic() + DEADLINE
    door = server.link.door
    assert door is not None
    while key not in door.allowed.keys:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_keys_of_one_name_are_one_site(tmp_path: Path, kits: Provisioned, links: Links) -> None:
    key = make_key(tmp_path / "next", kits.kits["a"], "", "", "").credentials.pair.public
    admit(kits.server, "a", Role.SITE, key)
    server = server_of(tmp_path, sites=["a"])
    with running(server) as (_, result):
        held = Session(settings(kits.kits["a"], server.endpoint))
        assert held.is_running()
        refused = answer(links, server, tmp_path / "next", join("a"))
        assert isinstance(refused, protocol.Refused)
        assert "another process takes part as 'a'" in refused.message
        held.close()
        assert site(tmp_path / "next", server.endpoint, 1) == 2
        assert result.result(200).ok


def test_a_site_that_says_anothers_name_is_refused(
    waiting: Server, kits: Provisioned, links: Links
) -> None:
    refused = answer(links, waiting, kits.kits["a"], join("b"))
    assert isinstance(refused, protocol.Refused)
    assert (refused.code, "key is that of a" in refused.message) == ("name", True)
    assert isinstance(answer(links, waiting, kits.kits["b"], join("b")), protocol.Welcome)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eye", join("eye")),
        ("ops", join("ops")),
        ("eye", protocol.Score(version=0, metrics={}, examples=1)),
        ("a", protocol.StatusRequest()),
        ("a", protocol.MetricsRequest()),
    ],
    ids=[
        "observer joins",
        "operator joins",
        "observer scores",
        "site looks on",
        "site reads metrics",
    ],
)
def test_a_role_may_say_its_own_messages_alone(
    waiting: Server, kits: Provisioned, links: Links, name: str, message: protocol.FromSite
) -> None:
    refused = answer(links, waiting, kits.kits[name], message)
    assert isinstance(refused, protocol.Refused)
    assert refused.code == "role"
    assert " which cannot " in refused.message


@pytest.mark.parametrize("name", ["eye", "ops"])
def test_observers_and_operators_see_how_the_run_stands(
    waiting: Server, kits: Provisioned, name: str
) -> None:
    credentials = load_kit(kits.kits[name]).credentials
    assert ask_status(waiting.endpoint, DEADLINE, credentials).run == "t"


def test_the_servers_own_user_needs_no_kit_beside_the_run_folder(waiting: Server) -> None:
    folder = waiting.config.run_folder
    (folder / "endpoint").write_text(waiting.endpoint)
    target = find_server(folder)
    assert target is not None
    assert ask_status(target.address, DEADLINE, target.credentials).run == "t"
    assert (folder / "local" / "secret.key").stat().st_mode & 0o777 == 0o600
    done = subprocess.run(
        [sys.executable, "-P", "-m", "fedcore", "status", str(folder), "--json", "--timeout=200"],
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "FEDCORE_KIT"},
    )
    assert done.returncode == 0, done.stderr
    waiting.stop()
    deadline = time.monotonic() + DEADLINE
    while (folder / "local").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_servers_own_key_is_written_nowhere_but_in_the_run_folder(
    tmp_path: Path, kits: Provisioned
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs/t").mkdir(parents=True)
    (tmp_path / "runs/t/local").symlink_to(tmp_path / "elsewhere")
    server = server_of(tmp_path)
    try:
        assert list((tmp_path / "elsewhere").iterdir()) == []
        assert load_kit(tmp_path / "runs/t/local").name == "run-folder"
    finally:
        server.stop()
        server.run()


def test_a_damaged_allow_list_leaves_the_old_one_in_force(
    waiting: Server, kits: Provisioned, links: Links, caplog: pytest.LogCaptureFixture
) -> None:
    (kits.server / "allow.toml").write_text("[[key")
    deadline = time.monotonic() + DEADLINE
    while "the allow-list stays as it was" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert isinstance(answer(links, waiting, kits.kits["a"], join("a")), protocol.Welcome)


@pytest.mark.parametrize(
    ("server", "said"),
    [
        ({}, "server.keys: missing"),
        ({"insecure": True, "listen": "tcp://0.0.0.0:0"}, "insist with insecure_network = true"),
        ({"insecure": True, "listen": "tcp://*:0"}, "insist with insecure_network = true"),
        ({"insecure": True, "keys": "kits/server"}, "give either keys or insecure = true"),
        ({"keys": "nowhere"}, "does not exist; `fedcore provision project.toml` makes"),
        ({"keys": "kits"}, "holds the kits of a project; name the server's"),
        ({"keys": "kits/north"}, "is the kit of a site, an observer or an operator"),
        ({"keys": "kits/north/kit.toml"}, "is a file; name the folder"),
        ({"keys": "."}, "is no server's kit: it holds no allow.toml"),
    ],
)
def test_a_server_is_in_plain_text_only_if_it_is_asked_for(
    tmp_path: Path, server: dict[str, Any], said: str
) -> None:
    values = {"run": {"name": "t", "rounds": 1}, "participants": {"count": 1}}
    provision(Project("tcp://h:1", {"north": Role.SITE}), tmp_path / "kits")
    with pytest.raises(ConfigError, match=re.escape(said)):
        Server(parse_run({**values, "server": server}, folder=tmp_path))


def test_the_door_is_wide_enough_for_all_sites_at_one_address(
    tmp_path: Path, kits: Provisioned
) -> None:
    values = {
        "run": {"name": "t", "rounds": 1},
        "participants": {"count": 5000},
        "server": {"keys": "kits/server"},
    }
    secured = Access(parse_run(values, folder=tmp_path)).secured
    assert secured is not None
    assert min(secured.limits.connections, secured.limits.per_network) >= 2 * 5000


def test_a_secret_that_others_can_read_stops_the_server(tmp_path: Path, kits: Provisioned) -> None:
    (kits.server / "secret.key").chmod(0o644)
    with pytest.raises(ConfigError, match="can be read or written by others"):
        server_of(tmp_path)


def test_an_unknown_key_ends_a_script_at_once_with_what_to_do(
    waiting: Server, kits: Provisioned
) -> None:
    known = load_kit(kits.kits["a"]).credentials
    unknown = SiteSettings(
        waiting.endpoint,
        "a",
        type(known)(known.server_key, KeyPair.generate()),
        connect_timeout=1e9,
    )
    with pytest.raises(RefusedError, match="fedcore admit"):
        Session(unknown).is_running()
