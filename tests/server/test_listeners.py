"""Listeners get what happens in a run, and neither delay nor disturb it."""

from __future__ import annotations

import json
import logging
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedcore import events
from fedcore.config import RunConfig, parse_run
from fedcore.errors import ConfigError
from fedcore.server import listeners as module
from fedcore.server.listeners import MOST_WAITING, Listeners
from fedcore.server.loading import load_function
from fedcore.server.service import Server
from fedcore.server.timing import Timing

from ..support.runs import run, run_config, site


class Heard:
    """A listener of tests: what it got, and a gate that it waits at."""

    def __init__(self) -> None:
        self.events: list[events.Event] = []
        self.gate = threading.Event()
        self.gate.set()
        self.busy = threading.Event()

    def __call__(self, event: events.Event) -> None:
        self.busy.set()
        assert self.gate.wait(200)
        self.events.append(event)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    found = Heard()
    monkeypatch.setattr(module, "test_listener", found, raising=False)
    yield found
    found.gate.set()


NAME = "fedcore.server.listeners:test_listener"


def joined(site: str) -> events.SiteJoined:
    return events.SiteJoined(site=site)


def test_events_arrive_in_order_and_say_of_which_run_they_are(heard: Heard) -> None:
    listeners = Listeners([NAME], ("t", "id"), lambda: 7.0)
    for name in "abc":
        listeners.emit(joined(name))
    listeners.close(30)
    assert heard.events == [joined(name) for name in "abc"]
    assert {(e.run, e.run_id, e.time) for e in heard.events} == {("t", "id", 7.0)}


def test_a_slow_listener_delays_nobody_and_misses_the_oldest_events(
    heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    heard.gate.clear()
    listeners = Listeners([NAME])
    listeners.emit(joined("first"))
    assert heard.busy.wait(200)
    for i in range(MOST_WAITING + 10):
        listeners.emit(joined(f"s{i}"))
    heard.gate.set()
    listeners.close(30)
    assert len(heard.events) == 1 + MOST_WAITING
    assert heard.events[1] == joined("s10")
    assert heard.events[-1] == joined(f"s{MOST_WAITING + 9}")
    assert [r.getMessage().partition("test_listener ")[2] for r in caplog.records] == [
        "is slow: it misses events of the run",
        "has missed 10 events",
    ]


def test_a_listener_whose_thread_cannot_start_misses_events_and_disturbs_nobody(
    heard: Heard, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    listeners = Listeners([NAME])
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        for name in "ab":
            listeners.emit(joined(name))
    listeners.emit(joined("c"))
    listeners.close(30)
    assert heard.events == [joined("c")]
    assert [r.getMessage().partition("test_listener ")[2] for r in caplog.records] == [
        "misses events of the run: its thread can't start: RuntimeError: can't start new thread",
        "has missed 2 events",
    ]


def test_a_listener_that_hangs_at_the_end_is_not_waited_for(
    heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    heard.gate.clear()
    listeners = Listeners([NAME])
    for name in "abc":
        listeners.emit(joined(name))
    assert heard.busy.wait(200)
    listeners.close(0)
    assert "has missed 2 events" in caplog.text


class Wordless(Exception):
    def __str__(self) -> str:
        raise ValueError


@pytest.mark.parametrize(
    "error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), Wordless()]
)
def test_what_a_listener_raises_is_logged_once_and_the_next_event_comes(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    got = []

    def listener(event: events.Event) -> None:
        got.append(event)
        raise error

    monkeypatch.setattr(module, "test_listener", listener, raising=False)
    listeners = Listeners([NAME])
    for name in "abc":
        listeners.emit(joined(name))
    listeners.close(30)
    assert got == [joined(name) for name in "abc"]
    (line,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert type(error).__name__ in line.getMessage()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("no_such_module_here:f", "cannot import 'no_such_module_here'.*PYTHONPATH"),
        ("broken_listener:f", "cannot import 'broken_listener'.*ZeroDivisionError"),
        ("json:no_such_function", "json has no function 'no_such_function'"),
        ("asyncio:start_server", "is an async function; expected a plain one"),
        ("json:__name__", "is no function"),
    ],
)
def test_a_listener_that_cannot_be_loaded_is_named(
    name: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_listener.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=text):
        load_function(name, "server.listeners")


def test_a_function_that_would_never_be_awaited_or_whose_module_exits_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waits_for_ever.py").write_text("async def listener(event): ...\n")
    (tmp_path / "exits_at_once.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="is an async function"):
        load_function("waits_for_ever:listener", "server.listeners")
    with pytest.raises(ConfigError, match="SystemExit: 3"):
        load_function("exits_at_once:listener", "server.listeners")


# --- in a run ---


def kinds(heard: Heard) -> list[str]:
    return [type(event).__name__ for event in heard.events]


def config(tmp_path: Path, listeners: list[str], **more: Any) -> RunConfig:
    plain = run_config(tmp_path, sites=["a", "b"], rounds=1, **more)
    server = plain.server.model_copy(update={"listeners": listeners})
    return plain.model_copy(update={"server": server})


def test_a_listener_gets_what_happens_in_a_run_in_its_order(heard: Heard, tmp_path: Path) -> None:
    server = Server(config(tmp_path, [NAME]))
    result, _ = run(
        server, lambda: site(server.endpoint, "a", 1), lambda: site(server.endpoint, "b", 3)
    )
    assert result.ok
    found = kinds(heard)
    assert (found[0], found[-1]) == ("RunStarted", "RunEnded")
    assert {e.run for e in heard.events} == {"t"}
    joins = {e.site for e in heard.events if isinstance(e, events.SiteJoined)}
    commits = [e for e in heard.events if isinstance(e, events.VersionCommitted)]
    scores = {(e.version, e.site) for e in heard.events if isinstance(e, events.ScoreReceived)}
    assert joins == {"a", "b"}
    assert [(e.version, sorted(e.participants)) for e in commits] == [(0, []), (1, ["a", "b"])]
    assert scores == {(version, name) for version in (0, 1) for name in "ab"}
    rounds = [e.round for e in heard.events if isinstance(e, events.RoundStarted)]
    assert rounds == [0, 1]
    assert [e.version for e in heard.events if isinstance(e, events.BestChanged)][-1] == 1
    ended = heard.events[-1]
    assert isinstance(ended, events.RunEnded)
    assert (ended.outcome, ended.version, ended.best_version) == ("complete", 1, 1)


def test_an_event_comes_after_the_journal_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, found = tmp_path / "runs/t/run.sqlite", []

    def listener(event: events.Event) -> None:
        if isinstance(event, events.VersionCommitted):
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
                query = "SELECT COUNT(*) FROM versions WHERE version = ?"
                found.append(db.execute(query, (event.version,)).fetchone()[0])

    monkeypatch.setattr(module, "test_listener", listener, raising=False)
    server = Server(config(tmp_path, [NAME]))
    run(server, lambda: site(server.endpoint, "a", 1), lambda: site(server.endpoint, "b", 3))
    assert found == [1, 1]


def test_a_listener_that_hangs_or_raises_changes_no_byte_of_the_models(
    heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(event: events.Event) -> None:
        raise RuntimeError(type(event).__name__)

    monkeypatch.setattr(module, "failing_listener", failing, raising=False)
    heard.gate.clear()
    digests = []
    for name, listeners in (
        ("without", []),
        ("with", [NAME, "fedcore.server.listeners:failing_listener"]),
    ):
        server = Server(config(tmp_path / name, listeners), timing=Timing(listeners=0))
        at = server.endpoint
        result, _ = run(server, lambda at=at: site(at, "a", 1), lambda at=at: site(at, "b", 3))
        assert result.ok
        model = tmp_path / name / "runs/t/models/round-0001.safetensors"
        digests.append(model.read_bytes())
    assert digests[0] == digests[1]
    assert heard.busy.is_set()


def test_a_run_file_whose_listener_cannot_be_loaded_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot import 'no_such_module_here'"):
        Server(config(tmp_path, ["no_such_module_here:f"]))
    assert not (tmp_path / "runs").exists()
    with pytest.raises(
        ConfigError, match=r"listeners.*'package\.module:function', got 'os\.system'"
    ):
        parse_run({"server": {"listeners": ["os.system"]}}, folder=tmp_path)


def test_the_listener_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs/listeners.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(# run_log.*?)```", page, re.DOTALL)
    (tmp_path / "run_log.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    server = Server(config(tmp_path, ["run_log:listener"]))
    run(server, lambda: site(server.endpoint, "a", 1), lambda: site(server.endpoint, "b", 3))
    lines = [json.loads(line) for line in (tmp_path / "run-log.jsonl").read_text().splitlines()]
    assert lines[0]["event"] == "RunStarted"
    assert {"version": 1, "sites": ["a", "b"]}.items() <= [n for n in lines if "version" in n][
        -1
    ].items()


def test_every_event_is_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs/listeners.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert named == {*events.__all__} - {"Event", "Listener"}
