"""The experiments in small: a random encoder, a random causal model, a few made-up texts."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.experiments.__main__ import main
from benchmarks.experiments.confirm import confirm
from benchmarks.experiments.dictionaries import DEVIL, FOLDOC
from benchmarks.experiments.federation import load_state, mean, state_of
from benchmarks.experiments.figures import draw_steady
from benchmarks.experiments.peft import (
    STEADY,
    Cell,
    Lab,
    Settings,
    Source,
    cells,
    run_cell,
    run_cells,
    shares,
)
from benchmarks.experiments.sentiment import Text, make_pool, vader_rows
from benchmarks.experiments.summary import peft_rows, steady_rows, swing
from fedcore.errors import ConfigError

from ..support.texts import SOURCES, texts

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Settings(
    layers=2, frozen=1, train_rows=12, test_rows=5, rounds=2, steps=5, batch_size=4, max_tokens=8
)


@pytest.fixture(scope="module")
def source(encoder: Path) -> Source:
    return Source(encoder, texts(), "made up")


def test_no_document_is_on_both_sides_and_every_source_gives_as_many_rows() -> None:
    pool = make_pool(texts(), 12, 5, 0)
    assert [text.source for text in pool.train] == [s for s in SOURCES for _ in range(12)]
    assert len(pool.test) == 20
    assert not {t.group for t in pool.train} & {t.group for t in pool.test}
    assert pool != make_pool(texts(), 12, 5, 1)
    with pytest.raises(ConfigError, match="source movie: 36 training and 5 test rows wanted"):
        make_pool(texts(), 36, 5, 0)


def test_middling_ratings_are_left_out_and_sentences_keep_their_document() -> None:
    lines = "3_1\t2.5\tGood &amp; fine\n3_2\t0.4\tSo so\n4\t-0.5\tBad\n"
    assert list(vader_rows(io.StringIO(lines), "nyt")) == [
        Text("Good & fine", "positive", "nyt", "nyt/3"),
        Text("Bad", "negative", "nyt", "nyt/4"),
    ]


def test_the_sites_hold_every_row_once_whatever_the_split() -> None:
    pool = make_pool(texts(), 12, 5, 0)
    for split in ("natural", "10", "0.3"):
        held = shares(pool, split, 0, 4)
        assert len(held) == 4
        assert sorted(row for rows in held.values() for row in rows) == list(range(48))
        assert all(len(rows) >= 4 for rows in held.values())
    assert {pool.train[row].source for row in shares(pool, "natural", 0, 4)["nyt"]} == {"nyt"}


@pytest.mark.parametrize("method", ["lora", "p-tuning", "ia3"])
def test_every_method_trains_its_adapter_and_the_head_alone(source: Source, method: str) -> None:
    lab = Lab(SETTINGS, source, 0)
    parts = (lab.encoder.embeddings, lab.encoder.lower, lab.encoder.upper)
    pretrained = [parameter for part in parts for parameter in part.parameters()]
    before = [parameter.clone() for parameter in pretrained]
    result, last = run_cell(lab, Cell(method, "natural", 0), lambda _: None)
    assert all(map(torch.equal, before, pretrained))
    begin = state_of(lab.model(method))
    assert begin.keys() == last.keys()
    assert any("classifier" in name for name in begin)
    assert all(not torch.equal(begin[name], last[name]) for name in begin)
    assert set(result["curves"]) == {*SOURCES, "federated"}
    assert all(len(curve["accuracy"]) == 3 for curve in result["curves"].values())


def test_the_lower_layers_states_give_what_the_whole_encoder_gives(source: Source) -> None:
    rows = {}
    for frozen in (0, 1):
        lab = Lab(dataclasses.replace(SETTINGS, frozen=frozen), source, 0)
        model = lab.model("lora").eval()
        head = [p for n, p in model.named_parameters() if "classifier" in n and p.requires_grad]
        with torch.no_grad():
            for parameter in head:
                parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))
            rows[frozen] = model(**lab.rows("test").batch(range(7))).logits
    assert rows[0].abs().max() > 1e-3
    torch.testing.assert_close(rows[0], rows[1])


def test_one_site_with_all_rows_is_what_it_is_alone(source: Source) -> None:
    """The mean of one update is that update: a federation of one trains as a machine of its own."""
    one = dataclasses.replace(source, texts=[dataclasses.replace(t, source="one") for t in texts()])
    lab = Lab(dataclasses.replace(SETTINGS, train_rows=20), one, 0)
    result, _ = run_cell(lab, Cell("lora", "natural", 0), lambda _: None)
    assert result["curves"]["federated"] == result["curves"]["one"]


def test_the_mean_counts_rows_and_is_rounded_once() -> None:
    states = [{"a": torch.tensor([0.1, 1.0])}, {"a": torch.tensor([0.2, 4.0])}]
    exact = (states[0]["a"].double() * 1 + states[1]["a"].double() * 2) / 3
    assert torch.equal(mean(states, [1, 2])["a"], exact.float())
    layer = torch.nn.Linear(2, 1, bias=False)
    load_state(layer, {"weight": torch.ones(1, 2)})
    assert torch.equal(state_of(layer)["weight"], torch.ones(1, 2))
    with pytest.raises(ValueError, match="other tensors"):
        load_state(layer, {"bias": torch.ones(1)})


def test_what_steadies_changes_the_run_and_momentum_carries_half_of_the_last_step(
    source: Source,
) -> None:
    lab = Lab(SETTINGS, source, 0)
    found = {}
    for steady in STEADY:
        result, found[steady] = run_cell(lab, Cell("lora", "0.3", 0, steady), lambda _: None)
        assert len(result["curves"]["federated"]["accuracy"]) == (
            11 if steady == "short rounds" else 3
        )
    flat = {k: torch.cat([t.ravel() for t in state.values()]) for k, state in found.items()}
    for steady in STEADY:
        assert steady == "plain" or not torch.equal(flat[steady], flat["plain"])
    begin = torch.cat([t.ravel() for t in state_of(lab.model("lora")).values()])
    assert (flat["rate/4"] - begin).norm() < (flat["plain"] - begin).norm()


def test_a_run_goes_on_with_what_is_there_and_never_mixes_settings(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = cells(["lora"], [], [0], steady=True)
    assert [cell.split for cell in wanted] == ["pooled", "natural"]
    told: list[str] = []
    first = run_cells(tmp_path, SETTINGS, source, wanted[:1], told.append)
    monkeypatch.setattr("benchmarks.experiments.peft.Lab", None)  # nothing is trained again
    assert run_cells(tmp_path, SETTINGS, source, wanted[:1], told.append) == first
    other = dataclasses.replace(SETTINGS, steps=3)
    with pytest.raises(ConfigError, match="made with other settings"):
        run_cells(tmp_path, other, source, wanted[:1], told.append)


def cell(split: str, seed: int, steady: str = "plain", **arms: list[int]) -> dict[str, Any]:
    curves = {n: {"accuracy": [0.0, 0.9, sum(r) / len(r)]} for n, r in arms.items()}
    about = {"method": "lora", "split": split, "seed": seed, "steady": steady}
    return {"cell": about, "steps_per_round": 5, "curves": curves, "right": arms}


def test_the_lead_is_over_the_best_site_of_each_seed_and_a_tie_beats_nobody() -> None:
    found = {
        "1": cell("natural", 0, a=[1, 0, 0, 0], b=[1, 1, 0, 0], federated=[1, 1, 1, 0]),
        "2": cell("natural", 1, a=[1, 1, 1, 0], b=[0, 0, 0, 0], federated=[0, 1, 1, 1]),
        "3": cell("pooled", 0, centralised=[1, 1, 1, 1]),
    }
    (row,) = peft_rows(found)
    assert row["best_alone"]["values"] == [0.5, 0.75]
    assert row["alone"]["values"] == [0.375, 0.375]
    assert row["federated"]["values"] == [0.75, 0.75]
    assert row["centralised"]["values"] == [1.0]
    assert row["lead"] == pytest.approx(0.125)
    assert row["seeds_beaten"] == 1
    # Differences 0 0 1 0 and -1 0 0 1: variance 0.4107 over eight rows.
    assert row["lead_error"] == pytest.approx((23 / 56 / 8) ** 0.5)


def test_a_swing_is_what_a_curve_loses_after_its_first_round() -> None:
    assert swing([0.9, 0.5, 0.7, 0.6, 0.8, 0.5]) == pytest.approx(0.4)
    other = cell("0.3", 0, federated=[1, 1], a=[1, 1])
    other["cell"]["method"] = "ia3"
    found = {
        "1": cell("0.3", 0, federated=[1, 0], a=[1, 0], b=[0, 0]),
        "2": cell("0.3", 0, "rate/4", federated=[1, 1]),
        "3": cell(
            "0.3", 1, federated=[0, 0], a=[1, 1]
        ),  # no fellow of this seed to compare it with
        "4": other,  # with this method nothing was tried
    }
    plain, slow = steady_rows(found, "0.3")
    assert (plain["steady"], slow["steady"]) == ("plain", "rate/4")
    assert plain["swing"]["mean"] == pytest.approx(0.4)
    assert slow["swing"]["mean"] == 0
    assert (plain["seeds"], slow["seeds"]) == ([0], [0])
    # Beside the best site alone of the plain cell: what steadies has none of its own.
    assert (plain["lead"], plain["seeds_beaten"]) == (0, 0)
    assert (slow["lead"], slow["seeds_beaten"]) == (0.5, 1)
    del found["1"]
    assert steady_rows(found, "0.3") == []


def test_the_first_method_meets_every_split_and_the_others_the_natural_one_and_alpha_1() -> None:
    wanted = cells(["lora", "ia3"], [10, 1, 0.3], [0, 1], steady=True)
    plain = {(c.method, c.split) for c in wanted if c.steady == "plain"}
    first = {("lora", split) for split in ("pooled", "natural", "10", "1", "0.3")}
    assert plain == first | {("ia3", split) for split in ("pooled", "natural", "1")}
    assert {(c.method, c.split) for c in wanted if c.steady != "plain"} == {("lora", "0.3")}
    assert len(wanted) == len(set(wanted)) == 2 * (len(plain) + len(STEADY) - 1)
    without = cells(["lora", "ia3"], [5], [0], steady=True)
    assert Cell("ia3", "5", 0) in without
    assert {c.steady for c in without} == {"plain"}


def test_dictionary_entries_become_questions_and_answers() -> None:
    entry = "-oid\n\n   <jargon> (from {android}) A suffix\n   used in English to say poor copy.\n\n (1999-07-10)"
    exchange = FOLDOC.exchange(entry)
    assert exchange is not None
    assert exchange.prompt == 'What does "-oid" mean in computing?'
    assert exchange.response == "(from android) A suffix used in English to say poor copy."
    satire = DEVIL.exchange("ABSURDITY, n.  A statement or belief\nnot like ours.\n\n  A verse")
    assert satire is None  # too short
    satire = DEVIL.exchange(
        "ABSURDITY, n.  A statement or belief that is manifestly\nnot like ours.\n\n  A verse"
    )
    assert satire is not None
    assert satire.response == "A statement or belief that is manifestly not like ours."
    assert satire.prompt == 'What does "absurdity" mean?'
    assert (
        DEVIL.exchange("ABRACADABRA.\n\n  By this we mean a great many of the things here.") is None
    )


def test_the_quick_form_leaves_tables_a_figure_and_json(
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "texts.jsonl"
    rows = [{"text": t.text, "label": t.label, "source": t.source} for t in texts()]
    data.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    start = [
        "x",
        "peft",
        "--quick",
        "--no-confirm",
        "--model",
        str(encoder),
        "--dataset",
        str(data),
    ]
    start += ["--layers", "2", "--frozen", "1", "--methods", "lora,ia3", "--out", str(out)]
    monkeypatch.setattr("sys.argv", start)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "lora, natural" in capsys.readouterr().out
    found = json.loads((out / "peft.json").read_text())
    assert {(r["method"], r["split"]) for r in found["rows"]} == {
        ("lora", "natural"),
        ("lora", "0.3"),
        ("ia3", "natural"),
        ("ia3", "0.3"),
    }
    assert len(found["steady"]) == len(STEADY)
    assert "machine" in found
    for name in ("peft.png", "steady.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not draw_steady(found["cells"], "natural", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()  # at the natural sites, nothing was tried
    assert (out / "peft.md").read_text().startswith("| method, sites |")


@pytest.mark.parametrize("sites", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_real_processes_make_the_same_model_bit_for_bit(
    sites: int, source: Source, tmp_path: Path
) -> None:
    few = dataclasses.replace(source, texts=[t for t in texts() if t.source in SOURCES[:sites]])
    one = Cell("lora", "natural", 0)
    run_cells(tmp_path, SETTINGS, few, [one], lambda _: None)
    found = confirm(tmp_path, SETTINGS, few, one, 1)
    assert found["equal"]
    assert found["largest_difference"] == 0
    assert found["elements"] > 100


@pytest.mark.slow
def test_the_real_encoder_and_the_real_texts_run_in_the_quick_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = ["x", "peft", "--quick", "--no-confirm", "--no-steady", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", start)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    found = json.loads((tmp_path / "peft.json").read_text())
    assert {row["method"] for row in found["rows"]} == {"lora", "p-tuning", "ia3"}
    assert all(0.2 < row["federated"]["mean"] < 1 for row in found["rows"])
