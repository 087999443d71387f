"""Flower: a SuperLink, a SuperNode per site, and an app with the FedAvg strategy.

A round lasts from one call of ``configure_train`` to the next, the last one to the end of ``start``.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
from pathlib import Path

from ..processes import Family
from ..workload import TENSORS, Work
from .run import Outcome, PeerError, await_true, finish, tail, time_limit

VERSION = "1.41.0"
REQUIREMENT = f"flwr=={VERSION}"
SETTINGS = (
    "SuperLink and SuperNodes with subprocess isolation, state in memory, FedAvg with no evaluation, "
    "NumPy arrays and no import of torch in the apps, 8 concurrent pushes and pulls (default 2), "
    "no runtime installation, no telemetry"
)
_APP = Path(__file__).parent / "flower_app"


def run(python: Path, folder: Path, work: Work, family: Family) -> Outcome:
    """Run the app; it checks its own result and writes it with its times."""
    programs = python.parent
    home = folder / "home"
    home.mkdir()
    shutil.copytree(_APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    ports = _free_ports(1 + work.sites)
    link = f"127.0.0.1:{ports[0]}"
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "{link}"\ninsecure = true\n',
        encoding="utf-8",
    )
    env = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PUSHES": "8",
        "FLWR_PRIVATE_MAX_CONCURRENT_OBJ_PULLS": "8",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    server_log = folder / "superlink.log"
    start = [str(programs / "flower-superlink"), "--insecure", "--port", str(ports[0])]
    family.start([*start, "--disable-runtime-dependency-installation"], server_log, env, folder)
    await_true("the SuperLink listens", lambda: _listens(ports[0]), server_log)
    for number, port in enumerate(ports[1:], 1):
        node = [str(programs / "flower-supernode"), "--insecure", "--superlink", link]
        node += ["--node-config", f"number={number}", "--port", str(port)]
        family.start(node, folder / f"node-{port}.log", env, folder)
    result = folder / "result.json"
    values = {
        "rounds": work.rounds,
        "sites": work.sites,
        "tensors": TENSORS,
        "elements": work.elements,
    }
    settings = " ".join([*(f"{k}={v}" for k, v in values.items()), f"result='{result}'"])
    log = folder / "run.log"
    app = [str(programs / "flwr"), "run", "app", "local", "--stream", "--run-config", settings]
    finish(family.start(app, log, env, folder), log, time_limit(work.round_bytes, work.rounds))
    if not result.exists():
        raise PeerError(f"the app left no result:\n{tail(log)}")
    return outcome(json.loads(result.read_text(encoding="utf-8")), work.rounds)


def outcome(result: dict[str, object], rounds: int) -> Outcome:
    """Return the times of a checked result.

    Raises:
        PeerError: the result is wrong or rounds are missing.
    """
    if result["right"] is not True:
        raise PeerError("the result is wrong")
    marks = result["marks"]
    if not isinstance(marks, list) or len(marks) != rounds + 1:
        raise PeerError(f"the app's times are not those of {rounds} rounds: {marks}")
    seconds = [b - a for a, b in itertools.pairwise(marks)]
    return Outcome(seconds, "server app alone (flwr-serverapp)", ("flwr-serverapp",))


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
