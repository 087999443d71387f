"""Which run a script takes part in, and what it is told where it takes no part at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

import fedcore.client as fl
from fedcore.errors import ConfigError, RefusedError
from fedcore.security.keys import load_kit
from fedcore.security.provision import load_project, make_key, provision
from fedcore.server.service import Server
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

from ..support.runs import run, run_config, site

ADDRESS = "tcp://127.0.0.1:7733"


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    fl.shutdown()


@pytest.mark.parametrize("wanted", ["t", "id"])
def test_a_site_of_the_run_that_it_wants_takes_part_and_any_other_is_refused(
    tmp_path: Path, wanted: str
) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=1, min_results=1))
    right = server.runs[0].store.run_id if wanted == "id" else wanted

    def sites() -> int:
        other = SiteSettings(server=server.endpoint, site="b", run="last-year")
        with closing(Session(other)) as session:
            said = r"serves run 't', and not run 'last-year', which site 'b' wants.*FEDCORE_RUN"
            with pytest.raises(RefusedError, match=said) as refused:
                session.is_running()
            assert refused.value.code == "other-run"
        with closing(Session(SiteSettings(server=server.endpoint, site="b", run=right))) as session:
            assert session.is_running()
            assert session.run == "t"
            with pytest.raises(
                ConfigError, match="takes part in run 't' already, and not in 'last-year'"
            ):
                session.want_run("last-year")
        return site(server.endpoint, "a", 1)

    result, _ = run(server, sites)
    assert result.ok


def test_the_run_is_the_kits_unless_the_environment_names_another(tmp_path: Path) -> None:
    project = tmp_path / "project.toml"
    project.write_text(f'[project]\nserver = "{ADDRESS}"\nsites = ["a"]\nrun = "this-year"\n')
    kit = provision(load_project(project), tmp_path / "kits").kits["a"]
    make_key(tmp_path / "next", kit, "", "", "")
    assert load_kit(kit).run == load_kit(tmp_path / "next").run == "this-year"
    env = {"FEDCORE_KIT": str(kit), "FEDCORE_WORK": str(tmp_path)}
    assert SiteSettings.from_environment(env).run == "this-year"
    assert SiteSettings.from_environment({**env, "FEDCORE_RUN": "other"}).run == "other"
    with pytest.raises(ConfigError, match=r"FEDCORE_RUN: name 'a b'"):
        SiteSettings.from_environment({**env, "FEDCORE_RUN": "a b"})
    project.write_text(f'[project]\nserver = "{ADDRESS}"\nsites = ["a"]\nrun = 3\n')
    with pytest.raises(ConfigError, match=r"project\.run: name 3"):
        load_project(project)


def test_a_script_of_another_run_than_its_settings_name_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (("SERVER", ADDRESS), ("SITE", "a"), ("INSECURE", "1"), ("RUN", "this")):
        monkeypatch.setenv(f"FEDCORE_{name}", value)
    with pytest.raises(
        ConfigError, match=r"the script wants run 'that' \(run=\.\.\.\), and FEDCORE_RUN"
    ):
        fl.init(run="that")
    with pytest.raises(ConfigError, match="run=: name 'a b'"):
        fl.init(run="a b")
    fl.shutdown()
    fl.init(run="this")


SCRIPT = """
import sys
import fedcore.client as fl

fl.init(run="t")
{body}
"""
NO_PART = "so it took no part in"


def exits(body: str, address: str = ADDRESS) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT.format(body=body)],
        env={
            **os.environ, "FEDCORE_SERVER": address, "FEDCORE_SITE": "b", "FEDCORE_INSECURE": "1",
        },
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_a_script_without_the_loop_is_warned_when_it_exits() -> None:
    status, said = exits("")
    assert (status, said.count(NO_PART)) == (0, 1)
    assert "fedcore b: the script ended without asking for a task" in said
    assert "`while fl.is_running():`" in said


@pytest.mark.parametrize("body", ["fl.shutdown()", "raise ValueError('mine')"])
def test_a_script_that_leaves_or_fails_is_not_warned(body: str) -> None:
    assert NO_PART not in exits(body)[1]


def test_a_script_that_ends_before_it_takes_up_a_task_is_warned_and_names_its_run(
    tmp_path: Path,
) -> None:
    server = Server(run_config(tmp_path, sites=["a", "b"], rounds=1, min_results=1))

    def scripts() -> int:
        status, said = exits("assert fl.is_running()", server.endpoint)
        assert status == 0
        assert "fedcore b: joined run t at" in said
        assert (
            "fedcore b: the script ended before it took up a task, so it took no part in run t"
            in said
        )
        train = "while fl.is_running():\n    w = fl.receive()\n    fl.send(w, weight=1)"
        assert exits(train + "\n    break", server.endpoint)[1].count(NO_PART) == 0
        return site(server.endpoint, "a", 1)

    result, _ = run(server, scripts)
    assert result.ok
