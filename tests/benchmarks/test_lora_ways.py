"""The LoRA experiment in small: what each way makes of the sites' factors, and that it runs to a report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.experiments.lora import RANKS, SPLITS, LoraSettings, run_lora
from benchmarks.experiments.lora_ways import WAYS, Factors, averaging_error
from benchmarks.experiments.peft import Source
from benchmarks.experiments.reports import lora_report
from fedcore.errors import ConfigError

from ..support.texts import texts

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = LoraSettings(
    layers=2, frozen=1, max_tokens=8, train_rows=25, test_rows=5, rounds=2, steps=1, batch_size=2,
    sites=5, most=16, rates=(1e-2,),
)  # fmt: skip
OUTPUTS, INPUTS = 12, 15


def drawn(rank: int, seed: int) -> Factors:
    dice = torch.Generator().manual_seed(seed)
    return {
        "layer": (
            torch.randn(OUTPUTS, rank, generator=dice),
            torch.randn(rank, INPUTS, generator=dice),
        )
    }


def start(rank: int) -> Factors:
    return {name: (b * 0, a) for name, (b, a) in drawn(rank, 0).items()}


def product(factors: Factors) -> torch.Tensor:
    b, a = factors["layer"]
    return b @ a


def test_exact_adds_the_mean_of_the_differences_at_any_ranks() -> None:
    server = WAYS["exact"].server(start(3), most=8)
    whole = torch.zeros(OUTPUTS, INPUTS)
    for round_ in (1, 2):
        given = {site: server.begin(site, rank, round_) for site, rank in enumerate((1, 3))}
        for sent in given.values():
            torch.testing.assert_close(
                product(dict(sent.factors)) + sent.rest.get("layer", torch.tensor(0.0)), whole
            )
        made = {site: drawn(rank, 10 * round_ + site) for site, rank in enumerate((1, 3))}
        server.end([1, 3], made)
        whole = whole + sum(
            share * (product(made[site]) - product(dict(given[site].factors)))
            for site, share in ((0, 0.25), (1, 0.75))
        )
        torch.testing.assert_close(server.whole(0)["layer"], whole, atol=1e-4, rtol=1e-4)


def test_zero_forgets_what_no_site_has_the_rank_for() -> None:
    server = WAYS["zero"].server(start(2), most=4)
    server.end([1, 1], {0: drawn(2, 1), 1: drawn(2, 2)})
    sent = server.begin(0, 1, 2)
    server.end([1], {0: dict(sent.factors)})
    assert torch.linalg.matrix_rank(server.whole(0)["layer"]) == 1


def test_alternate_trains_b_first_and_then_a() -> None:
    server = WAYS["alternate"].server(start(2), most=4)
    before = start(2)["layer"][1]
    assert server.begin(0, 2, 1).halves == {"B"}
    server.end([1], {0: drawn(2, 1)})
    sent = server.begin(0, 2, 2)
    assert sent.halves == {"A"}
    assert torch.equal(sent.factors["layer"][1], before)
    assert torch.equal(sent.factors["layer"][0], drawn(2, 1)["layer"][0])


def test_share_a_leaves_b_at_its_site() -> None:
    server = WAYS["share-a"].server(start(2), most=4)
    for site in (0, 1):
        server.begin(site, 2, 1)
    server.end([1, 1], {0: drawn(2, 1), 1: drawn(2, 2)})
    a = (drawn(2, 1)["layer"][1] + drawn(2, 2)["layer"][1]) / 2
    torch.testing.assert_close(server.whole(1)["layer"], drawn(2, 2)["layer"][0] @ a)


def test_averaging_loses_nothing_where_sites_have_one_a() -> None:
    made = [drawn(2, 1), drawn(2, 2)]
    same = [{"layer": (one["layer"][0], made[0]["layer"][1])} for one in made]
    assert averaging_error([1, 2], same) < 1e-7
    assert averaging_error([1, 2], made) > 0.1


def test_a_site_sends_what_it_trains_and_gets_the_rank_that_is_kept() -> None:
    both = {name: way.traffic(10, 20, 4, 16) for name, way in WAYS.items()}
    assert both == {
        "factors": (480, 480),
        "freeze-a": (160, 160),
        "alternate": (240, 240),
        "share-a": (320, 320),
        "zero": (480, 1920),
        "exact": (480, 1920),
    }


def test_each_way_meets_each_split_and_rank_and_what_was_trained_is_kept(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, splits = Source(encoder, texts(), "made up"), SPLITS[1:]
    monkeypatch.setattr("benchmarks.experiments.lora.SPLITS", splits)
    found = run_lora(tmp_path, SETTINGS, source, [0], lambda _: None)
    assert [(r["split"], r["ranks"], r["way"]) for r in found] == [
        (split, ranks, way) for split in splits for ranks in RANKS for way in WAYS
    ]
    assert all(len(result["accuracy"]) == 3 for result in found)

    lora_report(tmp_path, found, SETTINGS, source)
    assert "| mixed | exact |" in (tmp_path / "lora.md").read_text()
    assert len(json.loads((tmp_path / "lora.json").read_text())["rows"]) == len(found)

    monkeypatch.setattr("benchmarks.experiments.lora.Lab", None)  # nothing is trained again
    assert run_lora(tmp_path, SETTINGS, source, [0], lambda _: None) == found
    other = dataclasses.replace(SETTINGS, most=8)
    with pytest.raises(ConfigError, match="made with other settings"):
        run_lora(tmp_path, other, source, [0], lambda _: None)
