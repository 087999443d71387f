"""Sites share the factor A of their adapters and keep B: also over a restart, and each is scored with its own."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from fedcore.client.counting import ExampleCounter
from fedcore.client.parameters import ModelParameters
from fedcore.client.personal import Kept, PersonalParameters
from fedcore.client.torch import TorchSite
from fedcore.config import parse_run
from fedcore.errors import StorageError
from fedcore.server.service import Server
from fedcore.site.session import GlobalModel, Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.local import LocalNetwork

from .tiny_models import ROWS, llama, loss, train

EXAMPLES = {"north": 3, "south": 5}
Values = dict[str, torch.Tensor]


_drawing = threading.Lock()
"""All threads draw from one generator."""


def adapted() -> Any:
    with _drawing:
        base = llama()
        torch.manual_seed(1)
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return get_peft_model(base, config)


def values(model: Any) -> Values:
    parameters = ModelParameters(model)
    return {name: parameters.tensor(name).clone() for name in parameters.names}


def rows(site: str) -> torch.Tensor:
    return ROWS[:2] if site == "north" else ROWS[2:]


class Killed(Exception):
    """Ends a site where a process would be killed."""


class Site:
    """A site's loop over one or several processes: what it holds when it scores, and after it has trained."""

    def __init__(self, network: LocalNetwork, name: str, work: Path) -> None:
        self.network, self.name, self.work = network, name, work
        self.scored: dict[int, Values] = {}
        self.trained: dict[int, Values] = {}
        self.scores: dict[int, float] = {}

    def run(self, at: Callable[[str, int], None] = lambda *_: None, *, anew: bool = False) -> None:
        """Take part with a new model, as a new process does, or with one that is made ``anew`` in each round.

        ``at`` is called at each moment of each round.
        """
        settings = SiteSettings("local", self.name, idle_timeout=200, work=self.work)
        session, model = Session(settings, self.network.dial), adapted()
        site = TorchSite(session)
        with closing(session):
            while site.is_running():
                model = adapted() if anew else model
                task = site.receive(model)
                assert task is not None
                self.scored[task.version] = values(model)
                self.scores[task.version] = loss(model, rows(self.name))
                site.score({"loss": self.scores[task.version]}, 1)
                if task.kind == "evaluate":
                    site.end()
                    continue
                train(model, rows=rows(self.name))
                self.trained[task.round] = values(model)
                at("trained", task.round)
                counted = ExampleCounter(EXAMPLES[self.name])
                counted.add(ROWS)
                site.submit(model, counted, {})
                at("submitted", task.round)


def run_sites(
    folder: Path, at: Callable[[str, int], None] = lambda *_: None, **options: bool
) -> list[Site]:
    """Run to the end; a killed site is started again at once."""
    config = parse_run(
        {
            "run": {"name": "t", "rounds": 3},
            "participants": {"sites": list(EXAMPLES), "round_deadline": "1h"},
            "server": {"insecure": True},
            "aggregation": {"lora": "share-a"},
            "selection": {"metric": "loss", "mode": "min"},
        },
        folder=folder,
    )
    torch.set_num_threads(1)
    with closing(LocalNetwork()) as network, ThreadPoolExecutor(3) as pool:
        server = Server(config, link=network.server())
        sites = [Site(network, name, folder / name) for name in EXAMPLES]

        def first() -> None:
            with contextlib.suppress(Killed):
                sites[0].run(at, **options)
                return
            sites[0].run()

        with ExitStack() as stack:
            stack.callback(server.stop)
            result = pool.submit(server.run)
            done = [pool.submit(first), pool.submit(sites[1].run)]
            for one in done:
                one.result(200)
            assert result.result(200).ok
    return sites


def split(of: Values) -> tuple[Values, Values]:
    """The factors A, and B."""
    a = {name: value for name, value in of.items() if "lora_A" in name}
    return a, {name: value for name, value in of.items() if "lora_B" in name}


def same(one: Values, other: Values) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_a_is_the_mean_of_the_sites_and_b_stays_where_it_was_trained(tmp_path: Path) -> None:
    north, south = run_sites(tmp_path)
    versions = [
        load_file(path) for path in sorted((tmp_path / "runs/t/models").glob("*.safetensors"))
    ]
    assert len(versions) == 4
    assert all(same(split(one)[1], split(versions[0])[1]) for one in versions), "the first model's"
    for round_ in (1, 2, 3):
        ours, theirs = split(north.trained[round_])[0], split(south.trained[round_])[0]
        for name, a in split(versions[round_])[0].items():
            mean = (3 * ours[name].double() + 5 * theirs[name].double()) / 8
            assert torch.equal(a, mean.float())
        for site in (north, south):
            a, b = split(site.scored[round_])
            assert same(a, split(versions[round_])[0])
            assert same(b, split(site.trained[round_])[1]), "scored and trained with its own B"
    assert not same(split(north.trained[3])[1], split(south.trained[3])[1])


def test_a_model_that_is_made_anew_in_each_round_gets_the_sites_own_b(tmp_path: Path) -> None:
    wanted, found = run_sites(tmp_path / "one"), run_sites(tmp_path / "two", anew=True)
    for one, other in zip(found, wanted, strict=True):
        assert one.scores == other.scores
        assert same(one.trained[3], other.trained[3])


def test_a_round_that_moves_b_alone_is_no_update_of_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While B is 0, the first step has no gradient for A."""
    monkeypatch.setitem(globals(), "train", functools.partial(train, steps=1))
    run_sites(tmp_path)
    assert "training changed no tensor" not in caplog.text
    monkeypatch.setitem(globals(), "train", lambda *_, **__: None)
    run_sites(tmp_path / "idle")
    assert "training changed no tensor" in caplog.text


@pytest.mark.parametrize("moment", ["trained", "submitted"])
@pytest.mark.parametrize("round_", [1, 2])
def test_a_site_that_is_killed_goes_on_with_its_own_b_to_the_same_bytes(
    moment: str, round_: int, tmp_path: Path
) -> None:
    wanted = run_sites(tmp_path / "whole")
    killed: list[int] = []

    def at(now: str, when: int) -> None:
        if (now, when) == (moment, round_) and not killed:
            killed.append(when)
            raise Killed

    found = run_sites(tmp_path / "killed", at)
    assert killed == [round_]
    for one, other in zip(found, wanted, strict=True):
        assert one.scores == other.scores
        assert same(one.trained[3], other.trained[3])
    assert not list((tmp_path / "killed/north").rglob("*.safetensors")), (
        "nothing is left of a run that is over"
    )


@pytest.fixture
def task() -> GlobalModel:
    return GlobalModel("train", 1, 3, 0, 0, (), {})


def personal(model: Any) -> tuple[PersonalParameters, Kept]:
    kept: Kept = {}
    return PersonalParameters(model, None, kept), kept


def test_a_work_folder_without_room_costs_the_kept_b_and_not_the_round(
    task: GlobalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(*_: Any) -> None:
        raise StorageError("no space left on device")

    monkeypatch.setattr("fedcore.client.personal.create_model", full)
    parameters, kept = personal(adapted())
    parameters.keep(task, tmp_path)
    assert list(kept) == [1]
    assert not list(tmp_path.iterdir())
    assert "factor B is not kept on disk" in caplog.text


def test_a_b_that_is_not_finite_is_no_sites_own(task: GlobalModel, tmp_path: Path) -> None:
    model = adapted()
    parameters, kept = personal(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    parameters.keep(task, tmp_path)
    assert not kept
    assert not list(tmp_path.iterdir())
