"""A simulation runs real processes, tells why it failed, and leaves no process behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedcore.config import load_run_file
from fedcore.errors import ConfigError
from fedcore.monitor.ask import find_server, read_summary
from fedcore.simulation.processes import SimulationResult, simulate

from ..support.scripts import ADD_ONE

RunFile = Callable[..., Path]
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(path: Path) -> SimulationResult:
    return simulate(path, load_run_file(path))


def test_a_whole_run_with_real_processes(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDCORE_WORK")
    path = run_file()
    result = run(path)
    assert (result.status, result.message, result.failed) == (0, "", {})
    reply = read_summary(result.folder)
    assert (reply.phase, reply.best_version) == ("done", 3)
    assert [v.metrics["loss"] for v in reply.versions] == [0, 1, 2, 3]
    assert {p.name for p in (result.folder / "logs").glob("*.log")} == {
        "a.log",
        "b.log",
        "server.log",
    }
    assert find_server(result.folder) is None
    assert not (result.folder / "sites").exists(), "nothing is kept there"


def test_a_failing_site_is_reported_with_its_last_lines(run_file: RunFile) -> None:
    result = run(
        run_file("import os\nprint('working as', os.environ['FEDCORE_SITE'])\nraise SystemExit(3)")
    )
    assert result.status == 1
    assert "ended with status 3" in result.message
    assert "working as " in result.message


def test_what_a_site_said_is_the_first_and_only_error(
    run_file: RunFile, fedcore: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    path = run_file("raise SystemExit('no data here')")
    path.write_text(path.read_text().replace('sites = ["a", "b"]', 'sites = ["a"]'))
    done = fedcore("simulate", path)
    assert done.returncode == 1
    assert done.stderr == "error: site a ended with status 1:\n    no data here\n"
    assert "error" not in done.stdout.casefold()
    assert "waiting for 1 site" in done.stdout, "the server's log"


def test_each_simulation_has_its_own_logs_and_the_last_ones_are_kept(run_file: RunFile) -> None:
    path = run_file("raise SystemExit('first')")
    first = run(path)
    (path.parent / "train.py").write_text("raise SystemExit('second')")
    second = run(path)
    assert "first" in first.message
    assert "second" in second.message
    assert "first" not in second.message
    for name in ("a", "b"):
        assert (second.folder / "logs" / f"{name}.log").read_text() in ("second\n", "")
        assert (second.folder / "logs" / f"{name}.log.1").read_text() in ("first\n", "")
    assert (second.folder / "logs/server.log").read_text().count("listening on") == 1


def test_a_script_that_is_not_there_is_named_with_where_it_is_looked_for(run_file: RunFile) -> None:
    path = run_file()
    path.write_text(path.read_text().replace('"train.py"', '"trian.py"'))
    with pytest.raises(ConfigError, match=r"trian\.py does not exist.*from the run file's folder"):
        run(path)


def test_the_run_goes_on_while_enough_sites_are_left(run_file: RunFile) -> None:
    dying = """
        import os, signal
        if os.environ["FEDCORE_SITE"] == "c" and fl.system_info()["round"] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        fl.send("""
    script = ADD_ONE.replace("\n        fl.send(", dying)
    people = 'sites = ["a", "b", "c"]\nmin_results = 2\nround_deadline = "60s"\nidle_timeout = "2s"'
    result = run(run_file(script, people))
    assert result.status == 0, result.message
    assert "site c was ended by signal SIGKILL" in result.failed["c"]
    assert [v.participants for v in read_summary(result.folder).versions][1:] == [
        ["a", "b", "c"],
        ["a", "b"],
        ["a", "b"],
    ]


def test_a_simulation_is_encrypted_with_keys_that_are_thrown_away(
    run_file: RunFile, tmp_path: Path
) -> None:
    tell = """
    import os, pathlib
    from fedcore.security.keys import load_kit
    kit = load_kit(pathlib.Path(os.environ["FEDCORE_KIT"]))
    said = f"{os.environ['FEDCORE_KIT']} {kit.name} {kit.credentials.pair.public}"
    (pathlib.Path(FOLDER) / f"{kit.name}.said").write_text(said)
    """
    script = textwrap.dedent(tell.replace("FOLDER", repr(str(tmp_path)))) + textwrap.dedent(ADD_ONE)
    seen = []
    for _ in range(2):
        result = run(run_file(script, rounds=1))
        assert result.status == 0, result.message
        for name in "ab":
            home, told, public = (tmp_path / f"{name}.said").read_text().split(" ", 2)
            assert told == name
            assert not Path(home).exists()
            seen.append(public)
        shutil.rmtree(result.folder)
    assert len(set(seen)) == 4


def test_what_a_script_does_after_the_run_is_waited_for(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcore.simulation.processes.END_SECONDS", 0.3)
    after = """
    import pathlib, threading
    threading.Event().wait(1)
    pathlib.Path(f"{fl.system_info()['site']}.txt").write_text("saved")
    """
    result = run(
        run_file(
            f"import os\nos.chdir({str(tmp_path)!r})\n" + textwrap.dedent(ADD_ONE + after), rounds=1
        )
    )
    assert result.status == 0
    assert {p.name for p in tmp_path.glob("*.txt")} == {"a.txt", "b.txt"}


def test_a_server_that_fails_is_reported(run_file: RunFile) -> None:
    people = 'sites = ["a", "b"]\nround_deadline = "5s"'
    script = ADD_ONE.replace(
        "while", "import os, time\n    while os.environ['FEDCORE_SITE'] == 'a' and"
    )
    result = run(
        run_file(script + "\n    if os.environ['FEDCORE_SITE'] == 'b': time.sleep(100)", people)
    )
    assert result.status == 1
    assert "the server ended with status 1" in result.message
    assert "not delivered: b" in result.message


def test_a_server_that_cannot_start_is_reported(
    run_file: RunFile, fedcore: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    path = run_file()
    path.write_text(path.read_text() + '[model]\ninitial = "nothing.safetensors"\n')
    done = fedcore("simulate", path)
    assert done.returncode == 1
    assert "nothing.safetensors does not exist" in done.stderr
    assert "Traceback" not in done.stderr


def test_sites_share_the_cores_unless_told_otherwise(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_file(
        "import os\nprint('threads', os.environ['OMP_NUM_THREADS'])\nraise SystemExit(1)"
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert "threads 4" in run(path).message
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "threads 3" in run(path).message


ENDLESS = (
    ADD_ONE
    + """
        import os, pathlib, subprocess, sys
        if "child" not in globals():
            sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
            child, daemon = subprocess.Popen(sleep), subprocess.Popen(sleep, start_new_session=True)
            pids = f"{os.getpid()} {child.pid} {daemon.pid}"
            pathlib.Path(os.environ["PIDS"], os.environ["FEDCORE_SITE"]).write_text(pids)
"""
)


def _heed_signals() -> None:
    """Jobs that a shell starts in the background inherit an ignored SIGINT, those of nohup an ignored SIGHUP."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def endless(
    run_file: RunFile, tmp_path: Path
) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A simulation under way in a process of its own, and the processes of its sites and theirs."""
    pids = tmp_path / "pids"
    pids.mkdir()
    parent = subprocess.Popen(
        [
            sys.executable,
            "-P",
            "-m",
            "fedcore",
            "simulate",
            str(run_file(ENDLESS, rounds=1_000_000)),
        ],
        env={**os.environ, "PIDS": str(pids)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=_heed_signals,  # noqa: PLW1509
    )
    wait_until(lambda: len([p for p in pids.iterdir() if p.read_text()]) == 2)
    started = [int(word) for path in pids.iterdir() for word in path.read_text().split()]
    server = int((tmp_path / "runs" / "t" / ".lock").read_text())
    try:
        yield parent, [server, *started]
    finally:
        parent.kill()
        parent.wait()


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.parametrize("number", ENDING)
def test_ctrl_c_and_its_like_end_everything_with_the_last_round_on_disk(
    endless: tuple[subprocess.Popen[bytes], list[int]], tmp_path: Path, number: signal.Signals
) -> None:
    """Also what a site has started in a session of its own."""
    parent, started = endless
    assert all(map(alive, started))
    parent.send_signal(number)
    assert parent.wait(200) == 130
    wait_until(lambda: not any(map(alive, started)))
    summary = json.loads((tmp_path / "runs" / "t" / "summary.json").read_text())
    assert (summary["ok"], summary["message"]) == (False, "stopped on request")


def test_kill_9_leaves_no_process_behind(
    endless: tuple[subprocess.Popen[bytes], list[int]],
) -> None:
    parent, started = endless
    assert all(map(alive, started))
    parent.kill()
    wait_until(lambda: not any(map(alive, started)))


def test_a_finished_script_in_an_unfinished_run_is_explained(
    run_file: RunFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedcore.simulation.processes.UNFINISHED_SECONDS", 1.0)
    result = run(run_file("print('nothing to do')"))
    assert result.status == 1
    assert "while fl.is_running()" in result.message
