"""Start a server and its sites as real processes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .config import RunConfig
from .errors import ConfigError, FedcoreError

__all__ = ["SimulationResult", "simulate"]

_START_SECONDS: Final = 60.0
_END_SECONDS: Final = 10.0


@dataclass(frozen=True)
class SimulationResult:
    """How a simulation ended: the server's exit status, and why it failed if it did."""

    status: int
    message: str
    folder: Path


def simulate(
    run_file: Path,
    config: RunConfig,
    *,
    overrides: Sequence[str] = (),
    commands: Mapping[str, Sequence[str]] | None = None,
    tick: Callable[[str], None] | None = None,
) -> SimulationResult:
    """Run a whole run on loopback: the server and one process per site, nothing faked.

    Args:
        run_file: the run file, which the server reads itself.
        config: what it says.
        overrides: ``section.key=value`` texts for the server.
        commands: what to start for each site; the run file's ``[simulate] script`` if None.
        tick: called about five times a second with the server's address.

    Raises:
        ConfigError: the run file names no script, or one that is not there.
        FedcoreError: the server did not start; the text holds the end of its log.
    """
    starts = commands if commands is not None else site_commands(config)
    folder = config.run_folder
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    endpoint_file = logs / "endpoint"
    endpoint_file.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "fedcore", "server", str(run_file)]
    command += ["--endpoint-file", str(endpoint_file), "--set", "server.listen=tcp://127.0.0.1:0"]
    for override in overrides:
        command += ["--set", override]
    children: dict[str, subprocess.Popen[bytes]] = {}
    try:
        children["server"] = _start(command, {}, logs / "server.log")
        address = _await_endpoint(children["server"], endpoint_file, logs / "server.log")
        for site, start in starts.items():
            env = {"FEDCORE_SERVER": address, "FEDCORE_SITE": site, **_site_env(config, site)}
            children[site] = _start(start, env, logs / f"{site}.log")
        return _watch(children, address, logs, folder, tick)
    finally:
        _end(children)


def site_commands(config: RunConfig) -> dict[str, list[str]]:
    """Return the command of each site as the run file has it."""
    if config.simulate.script is None:
        raise ConfigError(
            "simulate.script: missing; it names the training script that each site runs"
        )
    script = config.folder / config.simulate.script
    if not script.is_file():
        raise ConfigError(f"simulate.script: {script} does not exist")
    commands = {}
    for site in config.site_names:
        own = config.simulate.site.get(site)
        arguments = [*config.simulate.args, *(own.args if own else [])]
        commands[site] = [sys.executable, str(script), *arguments]
    return commands


def _site_env(config: RunConfig, site: str) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // max(1, len(config.site_names)))
    own = config.simulate.site.get(site)
    return {"OMP_NUM_THREADS": str(threads), **config.simulate.env, **(own.env if own else {})}


def _start(command: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as out:
        return subprocess.Popen(
            list(command),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which ends the children in order
        )


def _await_endpoint(server: subprocess.Popen[bytes], path: Path, log: Path) -> str:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until:
        if path.exists():
            return path.read_text(encoding="utf-8")
        if server.poll() is not None:
            raise FedcoreError(f"the server did not start:\n{tail(log)}")
        time.sleep(0.02)
    raise FedcoreError(f"the server did not start within {_START_SECONDS:g} s:\n{tail(log)}")


def _watch(
    children: Mapping[str, subprocess.Popen[bytes]],
    address: str,
    logs: Path,
    folder: Path,
    tick: Callable[[str], None] | None,
) -> SimulationResult:
    server = children["server"]
    while server.poll() is None:
        if tick is not None:
            tick(address)
        sites = {name: child for name, child in children.items() if name != "server"}
        if all(child.poll() is not None for child in sites.values()):
            failed = [name for name, child in sites.items() if child.returncode != 0]
            if failed:
                name = failed[0]
                status = sites[name].returncode
                text = f"site {name} ended with status {status}:\n{tail(logs / f'{name}.log')}"
                return SimulationResult(1, text, folder)
        time.sleep(0.2)
    message = "" if server.returncode == 0 else f"the server failed:\n{tail(logs / 'server.log')}"
    return SimulationResult(server.returncode, message, folder)


def _end(children: Mapping[str, subprocess.Popen[bytes]]) -> None:
    """Give the sites a moment to leave by themselves, then end what is still there."""
    until = time.monotonic() + _END_SECONDS
    for name, child in children.items():
        if name == "server" and child.poll() is None:
            child.send_signal(signal.SIGINT)
    for child in children.values():
        try:
            child.wait(max(0.1, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def tail(log: Path, lines: int = 15) -> str:
    """Return the last lines of a log."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:]) or "    (no output)"
