"""One local step of plain SGD at every site is one step of SGD on all data together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file

from fedcore.client.counting import ExampleCounter
from fedcore.client.torch import TorchSite
from fedcore.config import parse_run
from fedcore.server.service import Server
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

SIZES = {"north": 5, "south": 11, "west": 32}
RATE = 0.3


def net() -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))


def step(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    torch.nn.functional.cross_entropy(model(inputs), labels).backward()
    optimizer.step()


def test_one_local_step_with_all_sites_is_one_centralised_step(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(1)
    inputs = torch.randn(sum(SIZES.values()), 6, generator=random)
    labels = torch.randint(0, 3, (len(inputs),), generator=random)
    shards = zip(
        inputs.split(list(SIZES.values())), labels.split(list(SIZES.values())), strict=True
    )
    central = net().double()
    step(central, inputs.double(), labels)

    config = parse_run(
        {
            "run": {"name": "t", "rounds": 1},
            "participants": {"sites": list(SIZES), "round_deadline": "300s"},
            "server": {"listen": "tcp://127.0.0.1:0", "insecure": True},
        },
        folder=tmp_path,
    )
    server = Server(config)
    sessions = [Session(SiteSettings(server.endpoint, site)) for site in SIZES]
    models = [net() for _ in SIZES]  # not in the threads, which share one random generator

    def take_part(
        session: Session, model: torch.nn.Module, shard: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        site = TorchSite(session)
        while site.is_running():
            task = site.receive(model)
            assert task is not None
            if task.kind == "evaluate":
                site.end()
                continue
            step(model, *shard)
            counted = ExampleCounter(len(shard[0]))
            counted.add(None)
            site.submit(model, counted, {})

    with ThreadPoolExecutor(len(SIZES) + 1) as pool:
        serving = pool.submit(server.run)
        try:
            list(pool.map(take_part, sessions, models, shards))
            assert serving.result(200).ok
        finally:
            server.stop()
            for session in sessions:
                session.close()
    found = load_file(tmp_path / "runs/t/final/model.safetensors")
    for name, value in central.state_dict().items():
        start = net().state_dict()[name]
        assert not torch.equal(found[name], start), "a step was made"
        torch.testing.assert_close(found[name], value.float(), rtol=2e-6, atol=2e-7)
