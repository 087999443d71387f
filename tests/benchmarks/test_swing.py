"""The swing experiment in small: a random encoder, made-up texts, three sites of which one trains in a round."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.experiments.__main__ import main
from benchmarks.experiments.federation import Stride
from benchmarks.experiments.peft import Lab, Source
from benchmarks.experiments.reports import swing_report
from benchmarks.experiments.summary import swing_rows
from benchmarks.experiments.swing import WAYS, SwingSettings, Way, load_topics, run_way, run_ways
from fedcore.errors import ConfigError

from ..support.texts import texts

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = SwingSettings(
    layers=2, frozen=1, max_tokens=8, train_rows=15, test_rows=5, rounds=4, steps=5, batch_size=4,
    sites=3, sampled=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(encoder: Path) -> Source:
    return Source(encoder, texts(), "made up")


def test_every_way_takes_as_many_steps_and_is_scored_at_the_same_places(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run_ways(tmp_path, SETTINGS, source, [0, 1], lambda _: None)
    assert list(found) == list(WAYS)
    for name, results in found.items():
        assert [result["seed"] for result in results] == [0, 1]
        for result in results:
            assert len(result["accuracy"]) == 5
            assert result["rounds"] * result["steps_per_round"] == 20
            assert result["sampled"] == (3 if name == "more sites" else 1)
            assert sum(result["rows"]) == 60
    assert found["short rounds"][0]["rounds"] == 20

    swing_report(tmp_path, found, SETTINGS, source)
    assert (tmp_path / "swing.png").read_bytes().startswith(b"\x89PNG")
    assert "| short rounds | 2 | 1 | 20 of 1 |" in (tmp_path / "swing.md").read_text()
    written = json.loads((tmp_path / "swing.json").read_text())
    assert [row["way"] for row in written["rows"]] == list(WAYS)

    monkeypatch.setattr("benchmarks.experiments.swing.Lab", None)  # nothing is trained again
    assert run_ways(tmp_path, SETTINGS, source, [0, 1], lambda _: None) == found
    other = dataclasses.replace(SETTINGS, alpha=1.0)
    with pytest.raises(ConfigError, match="made with other settings"):
        run_ways(tmp_path, other, source, [0], lambda _: None)


def test_the_mean_of_models_is_scored_and_training_goes_on_from_the_last(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[list[torch.Tensor]] = []

    def note(model: Any, rows: Any) -> tuple[float, torch.Tensor]:
        trained = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        scored.append(trained)
        return 0.0, torch.ones(len(rows))

    monkeypatch.setattr("benchmarks.experiments.classifier.accuracy", note)
    lab = Lab(SETTINGS, source, 0)
    run_way(lab, SETTINGS, Way())
    plain, scored[:] = list(scored), []
    run_way(lab, SETTINGS, Way(average=2))
    assert len(plain) == len(scored) == 5
    for number in range(1, 5):
        for of_two, before, last in zip(
            scored[number], plain[number - 1], plain[number], strict=True
        ):
            torch.testing.assert_close(of_two, (before + last) / 2)
    assert not torch.equal(plain[1][0], plain[2][0])


def test_momentum_carries_a_share_of_the_last_step() -> None:
    stride = Stride(0.75)
    begin = {"w": torch.tensor([0.0])}
    first = stride.take(begin, {"w": torch.tensor([4.0])})
    assert first["w"].item() == 1.0
    second = stride.take(first, {"w": torch.tensor([5.0])})  # 0.75 of 1, and 0.25 of 4
    assert second["w"].item() == 2.75
    assert Stride(0.0).take(begin, {"w": torch.tensor([4.0])})["w"].item() == 4.0


def test_a_move_is_counted_in_the_second_half_alone() -> None:
    about = {"rounds": 6, "steps_per_round": 10, "sampled": 2}
    one = {**about, "seed": 0, "accuracy": [0.0, 0.9, 0.1, 0.5, 0.75, 0.5, 0.625]}
    two = {**about, "seed": 1, "accuracy": [0.0, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5]}
    (row,) = swing_rows({"plain": [one, two]})
    assert row["move"]["values"] == pytest.approx([0.625 / 3, 0.0])
    assert row["drop"]["values"] == [0.25, 0.0]
    assert row["last"]["values"] == [0.625, 0.5]
    assert row["mean"]["values"] == pytest.approx([0.59375, 0.5])


def test_messages_come_with_their_topics(tmp_path: Path) -> None:
    for side in ("train", "test"):
        text = f"Category\tText\nd\tstring\nclass\t\n\nsci.space\ta rocket to {side}\nrec.autos\t\n"
        (tmp_path / f"20newsgroups-{side}.tab").write_text(text)
    found = load_topics(tmp_path)
    assert [(text.text, text.label) for text in found] == [
        ("a rocket to train", "sci.space"),
        ("a rocket to test", "sci.space"),
    ]


@pytest.mark.slow
def test_the_quick_form_runs_with_real_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["x", "swing", "--quick", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "| mean of 5 models | 1 | 2 | 4 of 5 |" in capsys.readouterr().out
