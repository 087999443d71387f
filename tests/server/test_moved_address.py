"""A site whose address changes, or whose packets are dropped for a while, is back within seconds.

The site is a process in a network namespace, so these run as root, where the system allows it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedcore.server.service import Server

from ..support.runs import run_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BACK_SECONDS = 15.0  # what it takes is about 6; this machine may be busy
SYN_SENT = "02"
SITE = """
import sys
import numpy as np
import fedcore.client as fl

fl.init({"w": np.zeros(1000, np.float32)})
while fl.is_running():
    w = fl.receive()["w"]
    if fl.is_evaluate():
        fl.send(metrics={"loss": 1.0})
        continue
    print("training", flush=True)
    sys.stdin.readline()
    fl.send({"w": w + 1}, weight=3, metrics={"loss": 1.0})
"""


class Network:
    """A namespace with one address, at which a site's process can run."""

    def __init__(self) -> None:
        self.name = f"fc{os.getpid()}"
        self.near, self.far = f"fn{os.getpid()}", f"ff{os.getpid()}"
        self.subnet = f"10.{200 + os.getpid() % 50}.{os.getpid() // 50 % 250}"
        self._do("netns", "add", self.name)
        try:
            self._do("link", "add", self.near, "type", "veth", "peer", "name", self.far)
            self._do("link", "set", self.far, "netns", self.name)
            self._do("addr", "add", f"{self.subnet}.1/24", "dev", self.near)
            self._do("link", "set", self.near, "up")
            self._inside("addr", "add", f"{self.subnet}.2/24", "dev", self.far)
            self._inside("link", "set", self.far, "up")
        except BaseException:
            self.close()
            raise

    def move(self) -> None:
        """Give the site another address; packets of and to the first one vanish."""
        self._inside("addr", "del", f"{self.subnet}.2/24", "dev", self.far)
        self._inside("addr", "add", f"{self.subnet}.3/24", "dev", self.far)

    def drop(self, on: bool) -> None:
        """Let all packets vanish in both directions, without a word to either side; or let them pass again.

        Each side takes the other to have a network card that is not there.
        """
        gone = ("lladdr", "02:00:00:00:00:01", "nud", "permanent") if on else ()
        verb = "replace" if on else "del"
        self._do("neigh", verb, f"{self.subnet}.2", "dev", self.near, *gone)
        self._inside("neigh", verb, f"{self.subnet}.1", "dev", self.far, *gone)

    def _do(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    def _inside(self, *arguments: str) -> None:
        self._do("-n", self.name, *arguments)

    def close(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", self.near], check=False, capture_output=True)


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        made = Network()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    yield made
    made.close()


@pytest.fixture
def served(network: Network, tmp_path: Path) -> Iterator[tuple[Server, subprocess.Popen[str]]]:
    """A server at the namespace's gateway, and a site in the namespace that is in its training."""
    config = run_config(tmp_path, sites=["a"], rounds=1, idle_timeout="60s", round_deadline="90s")
    listen = {"listen": f"tcp://{network.subnet}.1:0", "insecure_network": True}
    server = Server(config.model_copy(update={"server": config.server.model_copy(update=listen)}))
    thread = threading.Thread(target=server.run)
    thread.start()
    site = subprocess.Popen(
        ["ip", "netns", "exec", network.name, sys.executable, "-P", "-c", SITE],
        env={
            **os.environ, "FEDCORE_SERVER": server.endpoint, "FEDCORE_SITE": "a",
            "FEDCORE_INSECURE": "1", "FEDCORE_INSECURE_NETWORK": "1",
        },
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert site.stdout is not None
        assert site.stdout.readline() == "training\n"
        yield server, site
    finally:
        site.kill()
        site.communicate()
        server.stop()
        thread.join()


def back(server: Server, since_ms: float) -> float:
    """Wait until the site is heard again; returns after how many seconds."""
    began = time.monotonic()
    (peer,) = (peer for peer, _ in server.runs[0].peers)
    while (server.link.exchange.last_heard(peer) or 0) <= since_ms:
        assert time.monotonic() - began < 60, "it never came back"
        time.sleep(0.05)
    return time.monotonic() - began


def dialled_in_vain(site: subprocess.Popen[str], times: int) -> None:
    """Wait until a site has dialled so often without an answer, each time from another port."""
    ports: set[str] = set()
    began = time.monotonic()
    while len(ports) < times:
        assert time.monotonic() - began < 60, f"it dialled from {ports} alone"
        for line in Path(f"/proc/{site.pid}/net/tcp").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            if state == SYN_SENT:
                ports.add(local)
        time.sleep(0.05)


@pytest.mark.parametrize("trouble", ["moved", "dropped"])
def test_a_site_that_packets_do_not_reach_is_back_within_seconds(
    trouble: str, network: Network, served: tuple[Server, subprocess.Popen[str]], tmp_path: Path
) -> None:
    server, site = served
    if trouble == "moved":
        network.move()
    else:
        network.drop(True)
        dialled_in_vain(site, 2)
        network.drop(False)
    assert back(server, time.monotonic() * 1000 + 10) < BACK_SECONDS
    said, _ = site.communicate("\n", timeout=200)
    assert site.returncode == 0
    assert "training" not in said, "it trained once"
    final = load_file(tmp_path / "runs/t/final/model.safetensors")["w"]
    assert np.array_equal(final, np.ones(1000, np.float32))
