"""The liars experiment in small: what liars send, and what rules make of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks.experiments.liars import ATTACKS, LiarSettings, Lies, rules, run_liars
from benchmarks.experiments.peft import Source
from benchmarks.experiments.reports import liars_report
from benchmarks.experiments.summary import liar_rows
from fedcore.errors import ConfigError

from ..support.texts import texts

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = LiarSettings(
    layers=2, frozen=1, max_tokens=8, train_rows=15, test_rows=5, rounds=2, steps=2, batch_size=2,
    sites=5, liars=1,
)  # fmt: skip


def lies(sites: int = 10, honest: int = 8, size: int = 50) -> Lies:
    dice = torch.Generator().manual_seed(3)
    updates = torch.randn(honest, size, generator=dice) + 1
    own, wrong, noise = torch.randn(3, size, generator=dice)
    return Lies(updates, own, wrong, sites, noise)


def test_each_rule_meets_each_attack_and_what_was_trained_is_kept(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, some = Source(encoder, texts(), "made up"), ("none", "labels flipped", "collusion")
    monkeypatch.setattr("benchmarks.experiments.liars.ATTACKS", {k: ATTACKS[k] for k in some})
    found = run_liars(tmp_path, SETTINGS, source, [0], lambda _: None)
    assert {(r["attack"], r["rule"]) for r in found} == {(a, r) for a in some for r in rules(1)}
    assert all(len(result["accuracy"]) == 3 for result in found)

    liars_report(tmp_path, found, SETTINGS, source)
    assert "| multi-krum, mixed |" in (tmp_path / "liars.md").read_text()
    written = json.loads((tmp_path / "liars.json").read_text())
    assert len(written["rows"]) == len(found)

    monkeypatch.setattr("benchmarks.experiments.liars.Heads", None)  # nothing is trained again
    assert run_liars(tmp_path, SETTINGS, source, [0], lambda _: None) == found
    other = dataclasses.replace(SETTINGS, rate=1.0)
    with pytest.raises(ConfigError, match="made with other settings"):
        run_liars(tmp_path, other, source, [0], lambda _: None)


def test_a_little_is_enough_stays_within_what_honest_sites_send() -> None:
    told = lies()
    sent = ATTACKS["a little is enough"](told)
    # 10 sites, 2 liars: s = 6 - 2 supporters are needed of 8, and the normal quantile of 4/8 is 0.
    torch.testing.assert_close(sent, told.honest.mean(0))
    many = lies(sites=24, honest=19)  # s = 13 - 5: the quantile of 11/19
    z = (many.honest.mean(0) - ATTACKS["a little is enough"](many)) / many.honest.std(0)
    torch.testing.assert_close(z, torch.full_like(z, 0.1992), rtol=0, atol=2e-4)


def test_the_inner_product_turns_the_mean_of_all_round() -> None:
    told = lies()
    sent = ATTACKS["inner product"](told)
    mean = (told.honest.sum(0) + 2 * sent) / 10
    torch.testing.assert_close(mean, -0.2 * told.honest.mean(0))


def test_other_lies_are_what_their_names_say() -> None:
    told = lies()
    assert torch.equal(ATTACKS["none"](told), told.own)
    assert torch.equal(ATTACKS["sign flipped"](told), -told.own)
    assert torch.equal(ATTACKS["scaled by 100"](told), 100 * told.own)
    assert torch.equal(ATTACKS["labels flipped"](told), told.mislabelled)
    together = ATTACKS["collusion"](told)
    torch.testing.assert_close(together.norm(), told.honest.norm(dim=1).median())
    last = ATTACKS["last tenth"](told)
    assert torch.equal(last[:45], told.own[:45])
    assert torch.equal(last[45:], -100 * told.own[45:])


def test_intervals_are_students_over_the_seeds() -> None:
    results = [
        {"rule": rule, "attack": "none", "seed": seed, "accuracy": [0.0, value]}
        for rule, values in (("mean", (0.5, 0.7)), ("median", (0.6, 0.6)))
        for seed, value in enumerate(values)
    ]
    mean, median = liar_rows(results)
    assert mean["accuracy"]["mean"] == pytest.approx(0.6)
    assert mean["accuracy"]["half_interval"] == pytest.approx(12.706 * 0.1)
    assert mean["lead"]["values"] == [0.0, 0.0]
    assert median["lead"]["values"] == pytest.approx([0.1, -0.1])
