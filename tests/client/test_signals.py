"""SIGTERM and SIGHUP at a site: it leaves as by Ctrl-C, and whoever handles them already goes on doing so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore.site.signals import end_in_order, let_go

from ..support.processes import Federation, heed_signals

pytestmark = pytest.mark.timeout(600)

NUMBERS = [signal.SIGTERM, signal.SIGHUP]


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    made = Federation(tmp_path)
    yield made
    made.end()


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """Leave this process's handlers as they were."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_site_ended_by_a_signal_leaves_at_once(
    federation: Federation, number: signal.Signals
) -> None:
    federation.write(1, sites=["a", "b"], min_results=1, idle_timeout="40s")
    server, a, b = federation.server(), federation.site("a"), federation.site("b")
    a.reached(1)
    b.reached(1)
    a.go()
    federation.until(lambda states: states["a"].state == "delivered")
    b.process.send_signal(number)
    assert b.process.wait() == 128 + number
    assert server.wait() == 0
    assert federation.participants() == [[], ["a"]]
    log = (federation.folder / "server.log").read_text()
    assert f"b left: its process was ended by {number.name}" in log


def first_process(unshare: int) -> int:
    """Return the process that is the first of its namespace."""
    children = Path(f"/proc/{unshare}/task/{unshare}/children")
    until = time.monotonic() + 200
    while not (found := children.read_text().split()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return int(found[0])


def test_a_site_that_is_the_first_process_of_a_container_hears_sigterm(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrap = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*wrap, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine does not let us make a namespace")
    federation.write(1, sites=["a"], idle_timeout="40s")
    server = federation.server()
    start = subprocess.Popen

    def wrapped(command: list[str], **options: object) -> subprocess.Popen[str]:
        return start([*wrap, *command], **options)  # type: ignore[call-overload, no-any-return]

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", wrapped)
        a = federation.site("a")
    a.reached(1)
    os.kill(first_process(a.process.pid), signal.SIGTERM)
    assert a.process.wait(200) == 128 + signal.SIGTERM
    federation.until(lambda states: states["a"].state == "left")
    server.kill()


def test_a_handler_of_the_script_is_left_alone() -> None:
    def own(*_: object) -> None:
        """Do nothing."""

    signal.signal(signal.SIGTERM, own)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_in_order()
    assert signal.getsignal(signal.SIGTERM) is own
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    let_go()
    assert signal.getsignal(signal.SIGTERM) is own


def test_a_handler_that_calls_the_one_before_it_decides_when_the_script_ends() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_in_order()
    before = signal.getsignal(signal.SIGTERM)
    assert callable(before)
    heard = []

    def in_front(number: int, frame: object) -> None:
        heard.append(number)
        before(number, frame)

    signal.signal(signal.SIGTERM, in_front)
    signal.raise_signal(signal.SIGTERM)
    assert heard == [signal.SIGTERM]
    signal.signal(signal.SIGTERM, before)
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 143


def test_workers_that_a_script_forks_keep_the_default_action() -> None:
    script = """
import os, signal, sys
from fedcore.site.signals import end_in_order
end_in_order()
if (child := os.fork()) == 0:
    os._exit(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-P", "-c", script]
    assert subprocess.run(command, check=False, preexec_fn=heed_signals).returncode == 0
