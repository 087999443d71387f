"""Lines of progress: what they say, when they are drawn, and that nobody sees them off a terminal."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedcore.site.progress import Bar, State, TerminalHandler

SITE = """
import sys
import numpy as np
import fedcore.client as fl

fl.init({"w": np.zeros(1000, np.float32)})
while fl.is_running():
    w = fl.receive()["w"]
    if fl.is_train() and sys.argv[1] == "held":
        sys.stdin.readline()
    fl.send({"w": w + 1}, weight=1, metrics={"loss": 1.0})
"""
RUN = """
[run]
name = "t"
rounds = 1
[participants]
sites = ["a", "b"]
[server]
listen = "tcp://127.0.0.1:0"
insecure = true
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def look(monkeypatch: pytest.MonkeyPatch, terminal: io.StringIO) -> io.StringIO:
    """Put ``terminal`` in the place of stderr; within a test, as capturing renews stderr before each."""
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("FEDCORE_PROGRESS", raising=False)
    return terminal


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def half(clock: Clock) -> State:
    return State("global model 3", int(clock.now * 50e6), 200_000_000, in_bytes=True)


def test_a_transfer_of_more_than_a_second_shows_its_rate_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, screen = Clock(), look(monkeypatch, Terminal())
    with Bar("north", lambda: half(clock), clock) as bar:
        bar.tick()
        clock.now = 0.9
        bar.tick()
        assert screen.getvalue() == ""
        clock.now = 2.0
        bar.tick()
        assert "fedcore north: global model 3" in plain(screen.getvalue())
        assert "100.0 of 200.0 MB, 50.0 MB/s, 2 s left" in plain(screen.getvalue())
        TerminalHandler().handle(logging.makeLogRecord({"msg": "round 2 is committed"}))
        assert "\nround 2 is committed" in "\n" + plain(screen.getvalue()).replace("\r", "\n")
    assert screen.getvalue().endswith("\x1b[2K")  # the line is erased at the end


def test_what_is_drawn_stays_while_there_is_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, screen = Clock(), look(monkeypatch, Terminal())
    states = [State("round 2 of 4", 1, 4, in_bytes=False), None]
    with Bar("north", lambda: states[0], clock) as bar:
        clock.now = 7.0
        bar.tick()
        before = screen.getvalue()
        bar.tick()
        del states[0]
        clock.now = 9.0
        bar.tick()
        assert screen.getvalue() == before


def test_a_wait_shows_the_rounds_and_the_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, screen = Clock(), look(monkeypatch, Terminal())
    with Bar("north", lambda: State("round 2 of 4", 1, 4, in_bytes=False), clock) as bar:
        clock.now = 7.5
        bar.tick()
    shown = plain(screen.getvalue())
    assert re.search(r"fedcore north: round 2 of 4 ━━━━━╺?━* 7 s", shown.replace("╸", "━")), shown


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_drawn_off_a_terminal_or_when_turned_off(
    monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    stream = look(monkeypatch, Terminal() if terminal else io.StringIO())
    if terminal:
        monkeypatch.setenv("FEDCORE_PROGRESS", "0")
    clock = Clock()
    with Bar("north", lambda: half(clock), clock) as bar:
        clock.now = 2.0
        bar.tick()
    assert stream.getvalue() == ""


def test_a_site_on_a_terminal_shows_that_it_waits_and_erases_it(tmp_path: Path) -> None:
    (tmp_path / "site.py").write_text(SITE)
    (tmp_path / "run.toml").write_text(RUN)
    endpoint = tmp_path / "endpoint"
    command = [sys.executable, "-P"]
    server = subprocess.Popen(
        [*command, "-m", "fedcore", "server", "run.toml", "--endpoint-file", str(endpoint)],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    while not endpoint.exists():
        assert server.poll() is None
    env = {**os.environ, "FEDCORE_SERVER": endpoint.read_text(), "FEDCORE_INSECURE": "1"}
    env |= {"TERM": "xterm", "COLUMNS": "120"}
    env.pop("FEDCORE_PROGRESS", None)
    outer, inner = os.openpty()
    started = [server]
    try:
        free = subprocess.Popen(
            [*command, "site.py", "free"],
            cwd=tmp_path,
            env={**env, "FEDCORE_SITE": "a"},
            stdout=subprocess.DEVNULL,
            stderr=inner,
        )
        started.append(free)
        held = subprocess.Popen(
            [*command, "site.py", "held"],
            cwd=tmp_path,
            env={**env, "FEDCORE_SITE": "b"},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(held)
        os.close(inner)
        seen = b""
        while "round 1 of 1, waiting for the other sites" not in plain(seen.decode()):
            seen += os.read(outer, 4096)
        _, off_the_terminal = held.communicate(b"\n", timeout=200)
        assert free.wait(200) == server.wait(200) == 0
        while "the run is complete" not in seen.decode():
            seen += os.read(outer, 4096)
    finally:
        for process in started:
            process.kill()
            process.wait()
        os.close(outer)
    last_draw = seen.rindex(b"waiting for the other sites")
    assert b"\x1b[2K" in seen[last_draw:]
    assert "fedcore a: round 1 of 1 is committed (2 sites)" in plain(seen.decode())
    assert b"\x1b" not in off_the_terminal
    assert b"fedcore b: round 1 of 1 is committed (2 sites)\n" in off_the_terminal
