"""Start a server and its sites as real processes on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedcore.config import RunConfig
from fedcore.errors import BusyError, ConfigError, FedcoreError, StorageError
from fedcore.monitor.ask import is_served
from fedcore.security.keys import SECRET_ENV, Role
from fedcore.security.provision import SERVER_FOLDER, Project, provision

from . import watchdog as _watchdog

__all__ = ["SimulationResult", "simulate", "site_commands", "tail"]

_START_SECONDS: Final = 60.0
END_SECONDS: Final = 3.0
UNFINISHED_SECONDS: Final = 10.0
_AFTER_SECONDS: Final = 600.0
_CHECK_SECONDS: Final = 0.1
_STOPPED: Final = 130
_SERVER: Final = "server"
_KEYS: Final = "keys"
_WORK: Final = "sites"


@dataclass(frozen=True)
class SimulationResult:
    """How a simulation ended.

    Attributes:
        status: 0, or the exit status of what failed.
        message: why it failed, with the last lines of the log of what failed; empty if it did not.
        folder: the run folder.
        failed: sites that failed, with the end of their logs; the run may be complete without them.
    """

    status: int
    message: str
    folder: Path
    failed: Mapping[str, str] = field(default_factory=dict)


def simulate(
    run_file: Path,
    config: RunConfig,
    *,
    overrides: Sequence[str] = (),
    commands: Mapping[str, Sequence[str]] | None = None,
    tick: Callable[[], None] | None = None,
) -> SimulationResult:
    """Run a whole run on loopback: the server and one process per site, nothing faked.

    Server and sites get keys that are thrown away at the end, unless the run file asks for plain text.

    A site that fails does not end the run while enough others are left for ``participants.min_results``. When
    the run is complete, the scripts get ten minutes for what they do after it.
    Whatever ends this process, Ctrl-C, an error or ``kill -9``, ends all the others too, and what they have
    started in sessions of their own.

    Args:
        run_file: the run file, which the server reads itself.
        config: what it says.
        overrides: ``section.key=value`` texts for the server.
        commands: what to start for each site; the run file's ``[simulate] script`` if None.
        tick: called about ten times a second.

    Raises:
        ConfigError: the run file names no script, or one that is not there.
        FedcoreError: the server did not start; the text holds the end of its log.
    """
    starts = commands if commands is not None else site_commands(config)
    folder = config.run_folder
    if is_served(folder):
        raise BusyError(
            f"a server works on {folder} already; stop it, or give this run another name"
        )
    logs = folder / "logs"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write run folder {folder}: {error.strerror}") from None
    endpoint_file = logs / "endpoint"
    endpoint_file.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "fedcore", "server", str(run_file)]
    command += ["--endpoint-file", str(endpoint_file)]
    keys = None if config.server.insecure else folder.absolute() / _KEYS
    # A site that fell silent here is dead: nobody is to be told of the end later.
    given = [*overrides, "server.listen=tcp://127.0.0.1:0", "server.linger=1ms"]
    if keys is not None:
        given.append(f"server.keys={_toml_text(keys / SERVER_FOLDER)}")
    for override in given:
        command += ["--set", override]
    before = _summary_time(folder)
    with (
        _keys(keys, config.site_names),
        _removed_if_empty(folder / _WORK),
        _Children(logs) as children,
    ):
        children.start(_SERVER, command, {})
        address = _await_endpoint(children, endpoint_file)
        for site, start in starts.items():
            env = {"FEDCORE_SERVER": address, "FEDCORE_SITE": site, **_site_env(config, site)}
            env["FEDCORE_RUN"] = config.run.name
            env["FEDCORE_KIT"] = "" if keys is None else str(keys / site)
            env["FEDCORE_INSECURE"] = "1" if keys is None else "0"
            children.start(site, start, env)
        return _watch(
            children,
            folder,
            quorum=config.participants.quorum,
            tick=(lambda: None) if tick is None else tick,
            over=lambda: _summary_time(folder) != before,
        )


@contextlib.contextmanager
def _keys(folder: Path | None, sites: Sequence[str]) -> Iterator[None]:
    """Keep keys for a server and its sites in ``folder`` while the block runs."""
    if folder is None:
        yield
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a simulation that was killed
    try:
        # Every process is told the real address once the server listens.
        provision(Project("tcp://127.0.0.1:7733", dict.fromkeys(sites, Role.SITE)), folder)
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove ``folder`` after the block if nothing is kept there."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not there, or not empty
            folder.rmdir()


def _toml_text(path: Path) -> str:
    return json.dumps(str(path), ensure_ascii=False)  # a basic string of TOML


def _summary_time(folder: Path) -> int:
    """The server writes the summary when the run is over, then says goodbye to the sites for a moment."""
    summary = folder / "summary.json"
    return summary.stat().st_mtime_ns if summary.exists() else 0


def site_commands(config: RunConfig) -> dict[str, list[str]]:
    """Return the command of each site as the run file has it.

    Raises:
        ConfigError: the run file names no script, or one that is not there.
    """
    if config.simulate.script is None:
        raise ConfigError(
            "simulate.script: missing; it names the training script that each site runs"
        )
    script = config.folder / config.simulate.script
    if not script.is_file():
        raise ConfigError(
            f"simulate.script: {script} does not exist; it is a path from the run file's folder"
        )
    commands = {}
    for site in config.site_names:
        own = config.simulate.site.get(site)
        arguments = [*config.simulate.args, *(own.args if own else [])]
        commands[site] = [sys.executable, str(script), *arguments]
    return commands


def _site_env(config: RunConfig, site: str) -> dict[str, str]:
    """The sites share the cores, unless the environment or the run file says how many threads to use."""
    threads = max(1, (os.cpu_count() or 1) // max(1, len(config.site_names)))
    own = config.simulate.site.get(site)
    return {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "FEDCORE_WORK": os.environ.get("FEDCORE_WORK", str(config.run_folder / _WORK)),
        **config.simulate.env,
        **(own.env if own else {}),
    }


class _Children:
    """The processes of a simulation. None of them outlives the ``with`` block, nor this process."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._mark = uuid.uuid4().hex
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._watchdog = subprocess.Popen(
            [sys.executable, "-P", str(Path(_watchdog.__file__))],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        self._tell(f"={self._mark}")

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._end()
        finally:
            _watchdog.end_marked(self._mark)
            assert self._watchdog.stdin is not None
            self._watchdog.stdin.close()
            self._watchdog.wait()

    @property
    def server(self) -> subprocess.Popen[bytes]:
        return self._children[_SERVER]

    @property
    def sites(self) -> dict[str, subprocess.Popen[bytes]]:
        return {name: child for name, child in self._children.items() if name != _SERVER}

    def log(self, name: str) -> Path:
        """Where a process's output goes."""
        return self._logs / f"{name}.log"

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start a process in a group of its own, with its output in a new log; the last one is kept beside it."""
        log = self.log(name)
        with contextlib.suppress(FileNotFoundError):
            log.replace(log.with_name(f"{log.name}.1"))
        with log.open("wb") as out:
            child = subprocess.Popen(
                list(command),
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONUNBUFFERED": "1",
                    SECRET_ENV: "",
                    _watchdog.MARK: self._mark,
                    **env,
                },
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others in order
            )
        self._children[name] = child
        self._tell(f"+{child.pid}")

    def _tell(self, line: str) -> None:
        assert self._watchdog.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._watchdog.stdin.write(f"{line}\n".encode())
            self._watchdog.stdin.flush()

    def _end(self) -> None:
        """Give the server and the sites a moment to leave by themselves, then end what is still there."""
        if _SERVER in self._children and self.server.poll() is None:
            self.server.send_signal(signal.SIGINT)
        until = time.monotonic() + END_SECONDS
        try:
            for child in self._children.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(max(0.1, until - time.monotonic()))
        finally:  # a second Ctrl-C ends the wait
            for child in self._children.values():
                _watchdog.end_group(child.pid, signal.SIGKILL)  # and what a site has started itself
                child.wait()
                self._tell(f"-{child.pid}")


def _await_endpoint(children: _Children, path: Path) -> str:
    until = time.monotonic() + _START_SECONDS
    log = children.log(_SERVER)
    while time.monotonic() < until:
        if path.exists():
            return path.read_text(encoding="utf-8")
        if children.server.poll() is not None:
            raise FedcoreError(f"the server did not start:\n{tail(log)}")
        time.sleep(0.02)
    raise FedcoreError(f"the server did not start within {_START_SECONDS:g} s:\n{tail(log)}")


def _watch(
    children: _Children,
    folder: Path,
    *,
    quorum: int,
    tick: Callable[[], None],
    over: Callable[[], bool],
) -> SimulationResult:
    """Wait for the server to end, or for too few sites to be left for a round."""
    sites, server = children.sites, children.server
    failed: dict[str, str] = {}
    idle_since: float | None = None
    while server.poll() is None:
        tick()
        ended = {name: site.returncode for name, site in sites.items() if site.poll() is not None}
        for name, status in ended.items():
            if status != 0 and name not in failed:
                failed[name] = _failure(children, name, status)
        if failed and len(sites) - len(failed) < quorum and not over():
            return SimulationResult(1, next(iter(failed.values())), folder, failed)
        if len(ended) < len(sites) or over():
            idle_since = None
        elif idle_since is None:
            idle_since = time.monotonic()
        elif time.monotonic() - idle_since > UNFINISHED_SECONDS:
            text = (
                "all sites have ended but the run is not over; does the training script loop with "
                "`while fl.is_running()` until it ends?"
            )
            return SimulationResult(1, text, folder, failed)
        time.sleep(_CHECK_SECONDS)
    if server.returncode == 0:
        failed |= _await_sites(children)
        return SimulationResult(0, "", folder, failed)
    if server.returncode == _STOPPED:
        return SimulationResult(_STOPPED, "the run was stopped by an operator", folder, failed)
    text = f"the server {_how(server.returncode)}:\n{tail(children.log(_SERVER))}"
    return SimulationResult(1, "\n".join([*failed.values(), text]), folder, failed)


def _await_sites(children: _Children) -> dict[str, str]:
    """Let the scripts end by themselves after the run; return the failures among them."""
    until = time.monotonic() + _AFTER_SECONDS
    failed = {}
    for name, site in children.sites.items():
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = site.wait(max(0.1, until - time.monotonic()))
            if status != 0:
                failed[name] = _failure(children, name, status)
    return failed


def _failure(children: _Children, name: str, status: int) -> str:
    return f"site {name} {_how(status)}:\n{tail(children.log(name))}"


def _how(status: int) -> str:
    if status < 0:
        return f"was ended by signal {signal.Signals(-status).name}"
    return f"ended with status {status}"


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log, indented."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (no output)"
