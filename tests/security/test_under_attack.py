"""A server under attack while three honest sites train: what it costs a round, and that nothing else changes.

Quiet and attacked rounds take turns in one run. A round is ``FEDCORE_ATTACK_TRAIN`` seconds of training, in which
the sites are silent as real ones are, and the exchange of a model of ``FEDCORE_ATTACK_MIB`` MiB with each of the
sites. The attackers run on the same machine, at the lowest priority: what they compute themselves is theirs.
Measured are a round's seconds and the server's processor seconds in it, the attack's own included. What else runs
on the machine makes rounds slower, too. So the fastest attacked round is compared with the slowest quiet one, and
only if there are enough of both.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedcore import protocol
from fedcore.security.keys import Role, load_kit
from fedcore.security.provision import Project, Provisioned, provision
from fedcore.transport.link import Control, SiteLink

from ..support.fuzzer import anonymous_bytes
from ..support.links import wait
from ..support.ports import free_address

ROUNDS = int(os.environ.get("FEDCORE_ATTACK_ROUNDS", "12"))
TRAIN = float(os.environ.get("FEDCORE_ATTACK_TRAIN", "10"))
MIB = int(os.environ.get("FEDCORE_ATTACK_MIB", "32"))
STRANGERS = 1000
STEPS = {"a": (1, 1), "b": (2, 1), "c": (4, 2)}  # what is added in a round, and the weight
MEAN_STEP = 2.75
MAX_GROWTH = 24 << 20
ENOUGH_ROUNDS = 8
UNDER_WAY = 0.2  # processor seconds that an attack has cost the server when the round begins
PATIENCE = 600  # seconds

pytestmark = [pytest.mark.slow, pytest.mark.timeout(ROUNDS * (3 * TRAIN + 60) + PATIENCE)]

SITE = f"""
import sys, time
import numpy as np
import fedcore.client as fl
from fedcore.client.current import get_session

step, weight = map(int, sys.argv[1:])
fl.init({{"w": np.zeros({MIB << 18}, np.float32)}})
while fl.is_running():
    w = fl.receive()["w"]
    score = {{"loss": 1.0}}
    if fl.is_evaluate():
        fl.send(metrics=score)
        continue
    print(get_session().model.round, flush=True)
    time.sleep(float(sys.stdin.readline()))
    fl.send({{"w": w + np.float32(step)}}, weight=weight, metrics=score)
"""


class Process:
    """A child that answers lines with lines."""

    def __init__(self, folder: Path, *command: object, **environment: str) -> None:
        self.log = folder / f"{len(list(folder.glob('*.log')))}.log"
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-P", *map(str, command)],
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def say(self, line: object) -> None:
        assert self.child.stdin is not None
        self.child.stdin.write(f"{line}\n")
        self.child.stdin.flush()

    def hear(self) -> str:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        assert line, self.log.read_text()[-4000:]
        return line.strip()

    def ask(self, line: str) -> str:
        self.say(line)
        return self.hear()


@dataclass
class World:
    folder: Path
    kits: Provisioned
    address: str
    server: subprocess.Popen[bytes]
    processes: list[Process]

    def site(self, name: str) -> Process:
        (self.folder / "site.py").write_text(SITE)
        kit = str(self.kits.kits[name])
        self.processes.append(
            Process(self.folder, self.folder / "site.py", *STEPS[name], FEDCORE_KIT=kit)
        )
        return self.processes[-1]

    def attacker(self, script: str, *arguments: object) -> Process:
        self.processes.append(Process(self.folder, Path(__file__).parent / script, *arguments))
        return self.processes[-1]

    def busy_seconds(self) -> float:
        """Return the processor seconds that the server has used."""
        fields = Path(f"/proc/{self.server.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    address = free_address()
    kits = provision(Project(address, dict.fromkeys([*STEPS, "d"], Role.SITE)), tmp_path / "kits")
    (tmp_path / "run.toml").write_text(
        f'[run]\nname = "t"\nrounds = {ROUNDS}\n'
        f"[participants]\nsites = {json.dumps([*STEPS, 'd'])}\nmin_results = 3\n"
        f'round_deadline = "{TRAIN + PATIENCE:g}s"\n'
        f'[server]\nlisten = "{address}"\nkeys = "kits/server"\nkeep_versions = {ROUNDS + 1}\n'
    )
    with (tmp_path / "server.log").open("wb") as log:
        command = "from fedcore.cli.app import server_main; server_main()"
        server = subprocess.Popen(
            [sys.executable, "-P", "-c", command, str(tmp_path / "run.toml")],
            stdout=log,
            stderr=log,
        )
    found = World(tmp_path, kits, address, server, [])
    try:
        yield found
    finally:
        for child in (server, *(process.child for process in found.processes)):
            child.kill()
            child.wait()


@dataclass
class Figures:
    """Of each kind of round: its seconds, the server's processor seconds, and its memory at the end."""

    seconds: list[float]
    busy: list[float]
    memory: list[int]


def leave(world: World) -> None:
    """Let site d join and leave, so that no round waits for it."""
    credentials = load_kit(world.kits.kits["d"]).credentials
    link = SiteLink(world.address, uuid.uuid4().bytes, credentials)
    try:
        link.send(protocol.Join(version="test", site="d", instance="0" * 32))
        wait(link, lambda m: isinstance(m, Control) and b"welcome" in m.body)
        link.send(protocol.Leave(reason="nothing to add"))
        link.send(protocol.Alive())
        wait(link, lambda m: isinstance(m, Control) and b"rejoin" in m.body)
    finally:
        link.close()


def wait_for_attack(world: World) -> None:
    """Wait until the server works for the attack: the sites are silent meanwhile."""
    enough, until = world.busy_seconds() + UNDER_WAY, time.monotonic() + PATIENCE
    while world.busy_seconds() < enough:
        assert time.monotonic() < until, (world.folder / "server.log").read_text()[-4000:]
        time.sleep(0.05)


def measure(world: World, attacker: Process) -> dict[bool, Figures]:
    sites = [world.site(name) for name in STEPS]
    figures = {attacked: Figures([], [], []) for attacked in (False, True)}
    for site in sites:
        assert site.hear() == "1"
    leave(world)
    for round_ in range(1, ROUNDS):
        attacked = round_ % 2 == 0
        if attacked:
            assert attacker.ask("on") == "on"
            wait_for_attack(world)
        began, busy = time.monotonic(), world.busy_seconds()
        for site in sites:
            site.say(TRAIN)
        for site in sites:
            assert site.hear() == str(round_ + 1)
        found = figures[attacked]
        found.seconds.append(time.monotonic() - began)
        found.busy.append(world.busy_seconds() - busy)
        found.memory.append(anonymous_bytes(world.server.pid))
        if attacked:
            assert attacker.ask("off")
    for site in sites:
        site.say(0)
    assert world.server.wait(PATIENCE) == 0, (world.folder / "server.log").read_text()[-4000:]
    assert [site.child.wait() for site in sites] == [0] * 3
    return figures


def report(name: str, figures: dict[bool, Figures]) -> dict[str, float]:
    quiet, attacked = figures[False], figures[True]
    seconds = [statistics.median(found.seconds) for found in (quiet, attacked)]
    busy = [statistics.median(found.busy) for found in (quiet, attacked)]
    found = {
        "quiet_s": seconds[0],
        "attacked_s": seconds[1],
        "slower": seconds[1] / seconds[0] - 1,
        "slower_at_least": min(attacked.seconds) / max(quiet.seconds) - 1,
        "quiet_busy_s": busy[0],
        "attacked_busy_s": busy[1],
        "share_of_a_core": (busy[1] - busy[0]) / seconds[1],
        "grown_mib": (max(attacked.memory) - max(quiet.memory)) / (1 << 20),
    }
    print(f"\n{name}:", json.dumps({key: round(value, 4) for key, value in found.items()}))
    print("MiB after each attacked round:", [used >> 20 for used in attacked.memory])
    return found


def assert_honest(world: World) -> None:
    """The models have the bits that the honest sites' updates give, and nobody else is in them."""
    summary = json.loads((world.folder / "runs/t/summary.json").read_text())
    assert [list(v["participants"]) for v in summary["versions"]] == [[], *[[*STEPS]] * ROUNDS]
    for round_ in range(ROUNDS + 1):
        model = load_file(world.folder / f"runs/t/models/round-{round_:04d}.safetensors")["w"]
        assert np.array_equal(model, np.full(MIB << 18, MEAN_STEP * round_, np.float32))


def test_a_thousand_strangers_that_knock_do_not_slow_a_round_by_5_percent(world: World) -> None:
    host, _, port = world.address.removeprefix("tcp://").rpartition(":")
    key = load_kit(world.kits.kits["a"]).credentials.server_key
    attacker = world.attacker("knocking.py", host, port, key, STRANGERS)
    found = report("a thousand strangers", measure(world, attacker))
    assert_honest(world)
    log = (world.folder / "server.log").read_text()
    assert "not on the allow-list" in log
    assert ROUNDS < ENOUGH_ROUNDS or found["slower_at_least"] < 0.05
    assert found["grown_mib"] < MAX_GROWTH >> 20
    assert len(log) < 1 << 20


def test_hostile_input_without_and_with_a_key_changes_no_bit_and_slows_no_round_by_5_percent(
    world: World,
) -> None:
    attacker = world.attacker("fuzzing.py", world.address, world.kits.kits["d"], 1)
    found = report("a fuzzer", measure(world, attacker))
    assert_honest(world)
    log = (world.folder / "server.log").read_text()
    assert "d sent a bad control message" in log or "dropped a frame from d" in log
    assert ROUNDS < ENOUGH_ROUNDS or found["slower_at_least"] < 0.05
    assert found["grown_mib"] < MAX_GROWTH >> 20
    assert len(log) < 1 << 20
