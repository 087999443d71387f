"""Sites whose adapters differ in rank and scale train one model, score all of it, and what comes out opens."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from fedcore.client.by_method import model_parameters
from fedcore.client.counting import ExampleCounter
from fedcore.client.parameters import ModelParameters
from fedcore.client.torch import TorchSite
from fedcore.config import parse_run
from fedcore.errors import ConfigError, LayoutError, RefusedError
from fedcore.server.service import Server
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.local import LocalNetwork

from .tiny_models import ROWS, llama, loss, train

LORA: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
SITES: dict[str, dict[str, Any]] = {
    "low": {"r": 2, "lora_alpha": 4},
    "high": {"r": 8, "lora_alpha": 4, "rank_pattern": {"down_proj": 3}},
    "stable": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "negative": {"r": 3, "lora_alpha": -3, "lora_dropout": 0.1},
}
EXAMPLES = {site: 3 + 2 * number for number, site in enumerate(SITES)}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "a head that is saved whole": {"modules_to_save": ["lm_head"]},
    "biases of B": {"lora_bias": True},
}


def adapted(**options: Any) -> Any:
    base = llama()
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**{**LORA, **options}))


class Site:
    """One site's loop: score what it is given, train, send. It keeps what it scored."""

    def __init__(self, network: LocalNetwork, name: str, options: Mapping[str, Any]) -> None:
        self.session = Session(SiteSettings("local", name, idle_timeout=200), network.dial)
        self.name, self.model = name, adapted(**options)
        self.scores: dict[int, float] = {}

    def run(self) -> None:
        site = TorchSite(self.session)
        with closing(self.session):
            while site.is_running():
                task = site.receive(self.model)
                assert task is not None
                self.scores[task.version] = loss(self.model)
                site.score({"loss": self.scores[task.version]}, 1)
                if task.kind == "evaluate":
                    site.end()
                    continue
                train(self.model, steps=2, rows=ROWS[:2] if self.name == "low" else ROWS)
                counted = ExampleCounter(EXAMPLES[self.name])
                counted.add(ROWS)
                site.submit(self.model, counted, {})


def run_sites(
    folder: Path, sites: Mapping[str, Mapping[str, Any]], **aggregation: Any
) -> list[Site]:
    config = parse_run(
        {
            "run": {"name": "t", "rounds": 3},
            "participants": {"sites": list(sites), "round_deadline": "1h"},
            "server": {"insecure": True},
            "aggregation": {"lora": "exact", "max_rank": 8, **aggregation},
            "selection": {"metric": "loss", "mode": "min"},
        },
        folder=folder,
    )
    with closing(LocalNetwork()) as network, ThreadPoolExecutor(len(sites) + 1) as pool:
        server = Server(config, link=network.server())
        with ExitStack() as stack:
            stack.callback(server.stop)
            result = pool.submit(server.run)
            torch.set_num_threads(1)
            taking = [Site(network, name, options) for name, options in sites.items()]
            done = [pool.submit(site.run) for site in taking]
            for one in done:
                one.result(200)
            assert result.result(200).ok
    return taking


def opened(folder: Path) -> Any:
    return PeftModel.from_pretrained(llama(), str(folder))


@pytest.mark.parametrize("case", CASES)
def test_sites_of_any_rank_score_one_model_which_opens_to_that_score(
    case: str, tmp_path: Path
) -> None:
    sites = {name: {**options, **CASES[case]} for name, options in SITES.items()}
    found = run_sites(tmp_path, sites)
    scores = [site.scores for site in found]
    assert [sorted(one) for one in scores] == [[0, 1, 2, 3]] * len(sites)
    for version in range(4):
        values = [one[version] for one in scores]
        assert max(values) - min(values) < 1e-4, f"all score the whole of version {version}"
    assert abs(scores[0][0] - scores[0][3]) > 1e-2
    best = min(range(4), key=lambda version: sum(one[version] for one in scores))
    for folder, version in (("best", best), ("final", 3)):
        model = opened(tmp_path / "runs/t" / folder)
        assert loss(model) == pytest.approx(scores[0][version], abs=1e-4)
    tensors = load_file(tmp_path / "runs/t/final/adapter_model.safetensors")
    ranks = {len(t) for name, t in tensors.items() if name.endswith("lora_A.weight")}
    assert ranks == {8}


def test_the_model_of_an_adapter_keeps_its_own_tensors_and_checkpoint(tmp_path: Path) -> None:
    site = run_sites(tmp_path, {"low": SITES["low"]})[0]
    names = {spec[0] for spec in ModelParameters(site.model).specs}
    site.model.save_pretrained(tmp_path / "own")
    kept = load_file(tmp_path / "own/adapter_model.safetensors")
    assert kept.keys() == names
    assert {len(t) for name, t in kept.items() if "lora_A" in name} == {2}


def test_a_rank_above_the_highest_is_refused_where_it_is_too_high(tmp_path: Path) -> None:
    with pytest.raises(
        (LayoutError, RefusedError), match=r"has rank 8, and aggregation.max_rank is 4"
    ):
        run_sites(tmp_path, {"high": {"r": 8}}, max_rank=4)


@pytest.mark.parametrize(
    ("options", "reason"), [({"use_dora": True}, "DoRA"), ({"lora_alpha": 0}, "alpha of 0")]
)
def test_an_adapter_whose_products_do_not_add_up_is_refused(
    options: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        run_sites(tmp_path, {"low": {"r": 2, **options}})


def test_a_model_moves_to_its_global_values_in_half_precision() -> None:
    model = adapted(r=2).to(torch.bfloat16)
    parameters = model_parameters(model, None, ("exact", 8), {})
    assert {dtype for name, dtype, _ in parameters.specs if "lora" in name} == {"F32"}
    assert (
        len(parameters.read(parameters.names[0]))
        == 4 * parameters.tensor(parameters.names[0]).numel()
    )
