"""Server and sites ended by every signal at any instant and started again, under every plan: exact bytes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ..support.processes import WEIGHTS, Federation, Site

SEED: Final = 7  # of the run file, see Federation.write
WAIT: Final = 200.0
LATE: Final = 3.0  # seconds for what a joined site does after the end
SERVER_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGKILL)
SITE_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGKILL)

SCRIPT = f"""
import os
import numpy as np
import fedcore.client as fl
from fedcore.client.current import get_session

name = os.environ["FEDCORE_SITE"]
fl.init({{"w": np.zeros(SIZE, np.float32)}})
while fl.is_running():
    w = fl.receive()["w"]
    task = get_session().model
    score = {{"loss": float(np.abs(w).mean())}}
    if task.kind == "infer":
        fl.answer({{"mean": score["loss"], "site": name}}, examples={WEIGHTS}[name])
    elif task.kind == "evaluate":
        fl.send(metrics=score, examples={WEIGHTS}[name])
    else:
        noise = np.random.default_rng([task.seed, *name.encode()]).normal(size=w.size)
        fl.send({{"w": np.tanh(w + noise).astype(np.float32)}}, weight={WEIGHTS}[name], metrics=score)
"""


@dataclass(frozen=True)
class Plan:
    """A kind of run.

    Attributes:
        alike: whether the same sites take part however they are ended, so that the bytes are those of a run in
            which nothing happens; else each model is the exact mean of the sites that it names.
        absent: sites that never come.
    """

    sites: str = "ab"
    rounds: int = 4
    task: str = "train"
    alike: bool = True
    absent: str = ""
    size: int = 1_500_000  # six chunks
    people: dict[str, object] = field(default_factory=dict)
    transfer: str = ""

    @property
    def present(self) -> str:
        return "".join(name for name in self.sites if name not in self.absent)


LOSSLESS: Final = 'update = "top-k"\nlossless = true'
PLANS: Final = {
    "all": Plan(),
    "nf4": Plan(transfer='update = "nf4"'),
    "top-k": Plan(transfer=LOSSLESS),
    "sample": Plan("abc", alike=False, people={"sample": 2}),
    "quorum": Plan("abc", alike=False, people={"min_results": 2}),
    "deadline": Plan(
        "abc", rounds=3, alike=False, absent="c",
        people={"min_results": 1, "round_deadline": "8s", "join_timeout": "1h"},
    ),
    "evaluate": Plan("abc", task="evaluate", size=6_000_000),
    "infer": Plan("abc", task="infer", size=6_000_000),
    "compare": Plan("abc", task="compare"),
}  # fmt: skip
# A site by SIGTERM, then the server by SIGHUP; a site, then the server by SIGKILL.
SHORT: Final = (("nf4", 10), ("sample", 0))


@contextmanager
def federation(folder: Path, patch: pytest.MonkeyPatch, plan: Plan) -> Iterator[Federation]:
    folder.mkdir()
    patch.setenv("FEDCORE_WORK", str(folder / "work"))
    patch.setenv("FEDCORE_CONNECT_TIMEOUT", "1h")
    made = Federation(folder)
    (folder / "site.py").write_text(SCRIPT.replace("SIZE", str(plan.size)))
    initial = np.random.default_rng(3).normal(size=plan.size).astype(np.float32)
    save_file({"w": initial}, folder / "initial.safetensors")
    people = {"idle_timeout": "3s", "round_deadline": "1h", **plan.people}
    made.write(plan.rounds, "100s", sites=list(plan.sites), **people)
    text = (folder / "run.toml").read_text() + 'memory = "16MiB"\n'
    text = text.replace("[run]\n", f'[run]\ntask = "{plan.task}"\n')
    if plan.task != "train":
        text = text.replace(f"rounds = {plan.rounds}\n", "")
    if plan.task in ("evaluate", "infer"):
        text = text.replace('[selection]\nmetric = "loss"\nmode = "max"\n', "")
    text += '[model]\ninitial = "initial.safetensors"\n'
    if plan.transfer:
        text += f"[transfer]\n{plan.transfer}\n"
    (folder / "run.toml").write_text(text)
    try:
        yield made
    finally:
        made.end()


class Processes:
    """The server and the sites of a plan, of which any may be ended and is started again at once."""

    def __init__(self, made: Federation, plan: Plan) -> None:
        self.made = made
        self.server: subprocess.Popen[str] = made.server()
        self.sites: dict[str, Site] = {name: made.site(name) for name in plan.present}
        self.logged = dict.fromkeys(
            plan.present, 0
        )  # characters that earlier processes have logged
        self.ended: list[str] = []

    @property
    def log(self) -> str:
        return f"{self.ended}\n" + (self.made.folder / "server.log").read_text()

    def end(self, name: str, number: signal.Signals) -> None:
        """End one of them, unless it is at its end already, and start it again."""
        victim = self.server if name == "server" else self.sites[name].process
        if victim.poll() is not None:
            return
        self.ended.append(f"{name} by {number.name}")
        victim.send_signal(number)
        victim.wait(WAIT)
        if name == "server":
            self.server = self.made.server()
        else:
            self.logged[name] = len(self.sites[name].log.read_text())
            self.sites[name] = self.made.site(name)

    def reach(self, version: int) -> None:
        """Wait until a model is committed, or the run is over."""
        path, until = (
            self.made.run / f"models/round-{version:04d}.safetensors",
            time.monotonic() + WAIT,
        )
        while not path.exists() and self.server.poll() is None:
            assert time.monotonic() < until, self.log
            time.sleep(0.005)

    def finish(self) -> None:
        """Wait for the end of the run, which all learn of."""
        assert self.server.wait(WAIT) in (0, 2), self.log
        assert "the run is complete" in self.log, self.log
        if self.server.returncode:  # killed in its last words, after all had left
            assert "is finished; give this run another name" in self.log, self.log
        for name, site in self.sites.items():
            if self.came_late(name, site):
                site.process.kill()
                continue
            code, said = site.process.wait(WAIT), site.log.read_text()
            assert code == 0, (name, code, said, self.log)

    def came_late(self, name: str, site: Site) -> bool:
        """Whether a site that was started again found no server, and waits in vain for as long as it may."""
        if not any(ended.startswith(name) for ended in self.ended):
            return False
        until = time.monotonic() + LATE
        while site.process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)
        joined = "joined run" in site.log.read_text()[self.logged[name] :]
        return site.process.poll() is None and not joined


def update(plan: Plan, base: np.ndarray, round_: int, name: str) -> np.ndarray:
    """Return what a site sends in a round."""
    seed = SEED * 1_000_003 + round_
    noise = np.random.default_rng([seed, *name.encode()]).normal(size=plan.size)
    return np.tanh(base + noise).astype(np.float32)


def check_means(made: Federation, plan: Plan) -> None:
    """Each model is the exact mean of the sites that the summary names for it."""
    for round_, names in enumerate(made.participants()[1:], 1):
        base = made.model(round_ - 1)
        total = sum(
            WEIGHTS[name] * update(plan, base, round_, name).astype(np.float64) for name in names
        )
        mean = (total / sum(WEIGHTS[name] for name in names)).astype(np.float32)
        assert np.array_equal(made.model(round_), mean), (round_, names)


def outcome(made: Federation, plan: Plan) -> dict[str, object]:
    """Return what a run leaves behind that must not depend on who was ended when."""
    found: dict[str, object] = dict(made.models())
    for folder in ("final", "best"):
        for path in (made.run / folder).glob("*.safetensors"):
            found[folder] = load_file(path)["w"].tobytes()
    if plan.task != "train":
        results = json.loads((made.run / "results.json").read_text())
        found["results"] = json.dumps(results["models"], sort_keys=True)
    return found


def scores(outcome: dict[str, object]) -> dict[tuple[str, str], str]:
    """Take the scores out of an outcome: of a site's model, at a site."""
    models = json.loads(str(outcome.pop("results")))
    return {
        (model["from"], name): json.dumps(score, sort_keys=True)
        for model in models
        for name, score in model["sites"].items()
    }


def run(
    folder: Path, patch: pytest.MonkeyPatch, plan: Plan, seed: str = "", ends: int = 0
) -> dict[str, object]:
    with federation(folder, patch, plan) as made:
        running = Processes(made, plan)
        dice = random.Random(seed)
        for round_ in range(plan.rounds if ends else 0):
            running.reach(round_ if plan.task == "train" else 0)
            for _ in range(ends):
                time.sleep(dice.uniform(0.0, dice.choice([0.1, 0.5, 2.0])))
                name = dice.choice(["server", "server", *plan.present])
                running.end(name, dice.choice(SERVER_SIGNALS if name == "server" else SITE_SIGNALS))
        running.finish()
        print(running.ended)
        if not plan.alike:
            assert len(made.models()) == plan.rounds + 1
            check_means(made, plan)
            return {}
        return outcome(made, plan)


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        *SHORT,
        *(pytest.param(name, seed, marks=pytest.mark.slow) for name in PLANS for seed in (1, 2, 3)),
    ],
)
def test_whoever_is_ended_by_whatever_signal_the_bytes_are_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, seed: int
) -> None:
    short = (name, seed) in SHORT
    plan = replace(PLANS[name], rounds=2) if short else PLANS[name]
    ended = run(tmp_path / "ended", monkeypatch, plan, f"{name}/{seed}", ends=1 if short else 2)
    if plan.alike:
        undisturbed = run(tmp_path / "undisturbed", monkeypatch, plan)
        if plan.task == "compare":  # a site that is away while a model is scored is not waited for
            some, every = scores(ended), scores(undisturbed)
            assert some
            assert some.items() <= every.items()
        assert ended == undisturbed
