"""Server and sites killed by SIGKILL at any instant and started again: the models have the same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .test_crashes import SITE, Federation, Site

ROUNDS = 5
FLOATS = 1_500_000  # six chunks
TRANSFERS = {
    "raw": "",
    "nf4": '[transfer]\nupdate = "nf4"\n',
    "top-k": '[transfer]\nupdate = "top-k"\nlossless = true\n',
}
WAIT = 120.0


@contextmanager
def federation(folder: Path, patch: pytest.MonkeyPatch, transfer: str) -> Iterator[Federation]:
    folder.mkdir()
    patch.setenv("FEDCORE_WORK", str(folder / "work"))
    made = Federation(folder)
    (folder / "site.py").write_text(SITE.replace("300_000", f"{FLOATS:_}"))
    made.write(ROUNDS, sites=["a", "b"], idle_timeout="1s", round_deadline="1h")
    with (folder / "run.toml").open("a") as file:
        file.write(f'memory = "16MiB"\n{TRANSFERS[transfer]}')
    try:
        yield made
    finally:
        made.end()


class Processes:
    """The server and two sites, of which any may be killed and is started again at once."""

    def __init__(self, made: Federation) -> None:
        self.made = made
        self.server: subprocess.Popen[str] = made.server()
        self.sites: dict[str, Site] = {name: self._site(name) for name in "ab"}
        self.kills = dict.fromkeys(("server", "a", "b"), 0)

    def _site(self, name: str) -> Site:
        site = self.made.site(name)
        site.go(2 * ROUNDS)
        return site

    @property
    def log(self) -> str:
        return (self.made.folder / "server.log").read_text()

    def kill(self, name: str) -> None:
        """Kill one of them, unless it is at its end already."""
        victim = self.server if name == "server" else self.sites[name].process
        if victim.poll() is not None:
            return
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        self.kills[name] += 1
        if name == "server":
            self.server = self.made.server()
        else:
            self.sites[name] = self._site(name)

    def reach(self, version: int) -> None:
        """Wait until a model is committed."""
        path, until = (
            self.made.run / f"models/round-{version:04d}.safetensors",
            time.monotonic() + WAIT,
        )
        while not path.exists():
            assert time.monotonic() < until, self.log
            time.sleep(0.005)

    def finish(self) -> None:
        """Wait for the end of the run."""
        code = self.server.wait(WAIT)
        finished = "is finished; give this run another name" in self.log  # killed in its last words
        assert code == 0 or finished, self.log


def run(
    folder: Path, patch: pytest.MonkeyPatch, transfer: str, seed: int | None, kills: int = 0
) -> dict[str, bytes]:
    with federation(folder, patch, transfer) as made:
        running = Processes(made)
        dice = random.Random(seed)
        for round_ in range(ROUNDS if kills else 0):
            running.reach(round_)
            for _ in range(kills):
                time.sleep(dice.uniform(0.0, dice.choice([0.1, 0.3, 1.0])))
                running.kill(dice.choice(["server", "a", "b"]))
        running.finish()
        print(running.kills)
        models = made.models()
        assert len(models) == ROUNDS + 1
        models["final"] = (made.run / "final" / "model.safetensors").read_bytes()
        return models


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("transfer", "seed"),
    [
        ("nf4", 0),
        *(
            pytest.param(transfer, seed, marks=pytest.mark.slow)
            for transfer in TRANSFERS
            for seed in (1, 2, 3)
        ),
    ],
)
def test_whoever_is_killed_whenever_the_models_have_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transfer: str, seed: int
) -> None:
    undisturbed = run(tmp_path / "undisturbed", monkeypatch, transfer, None)
    assert run(tmp_path / "killed", monkeypatch, transfer, seed, kills=2) == undisturbed
