"""The example scripts run as they stand, and what comes out opens with the usual loaders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedcore.cli.app
from fedcore.config import load_run_file
from fedcore.simulation.processes import simulate

EXAMPLES = Path(__file__).parents[2] / "clients" / "examples"


def summary_of(name: str, folder: Path, sites: list[str]) -> dict:
    run_file = EXAMPLES / f"run_{name}.toml"
    patient = 'participants.idle_timeout="200s"'
    overrides = [f'run.dir="{folder}"', f"participants.sites={json.dumps(sites)}", patient]
    config = load_run_file(run_file, overrides)
    result = simulate(run_file, config, overrides=overrides)
    assert result.status == 0, result.message
    return json.loads((result.folder / "summary.json").read_text())


BOTH = ["north", "south"]


# A process that imports a trainer takes the time of 20 tests: at first, one is enough.
@pytest.mark.parametrize(
    ("name", "metric", "sites"),
    [
        ("plain", "loss", BOTH),
        ("hf", "eval_loss", BOTH[:1]),
        ("lightning", "val_loss", BOTH[1:]),
        pytest.param("hf", "eval_loss", BOTH, marks=pytest.mark.slow),
        pytest.param("lightning", "val_loss", BOTH, marks=pytest.mark.slow),
    ],
)
def test_an_example_runs_and_learns(
    name: str, metric: str, sites: list[str], tmp_path: Path
) -> None:
    summary = summary_of(name, tmp_path, sites)
    assert summary["ok"]
    versions = summary["versions"]
    assert [v["version"] for v in versions] == [0, 1, 2, 3]
    assert all(sorted(v["metrics_by_site"]) == sites for v in versions)
    losses = [v["metrics"][metric] for v in versions]
    assert losses[3] < losses[0]
    assert summary["best_version"] == losses.index(min(losses))
    if name == "hf":
        from peft import PeftModel
        from transformers import GPT2Config, GPT2LMHeadModel

        base = GPT2LMHeadModel(
            GPT2Config(vocab_size=32, n_positions=16, n_embd=32, n_layer=1, n_head=2)
        )
        model = PeftModel.from_pretrained(base, tmp_path / "example-hf" / "best")
        assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
    assert sorted(versions[1]["participants"]) == sites


def test_a_site_that_fails_is_named_with_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.py").write_text("raise ValueError('no data here')\n")
    (tmp_path / "run.toml").write_text(
        '[run]\nname = "x"\nrounds = 1\n[participants]\ncount = 1\n[simulate]\nscript = "train.py"\n'
    )
    with pytest.raises(SystemExit) as ended:
        fedcore.cli.app.main(["simulate", str(tmp_path / "run.toml")])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "site site-1 ended with status 1" in said
    assert "ValueError: no data here" in said


def test_a_run_file_with_mistakes_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text('[run]\nname = "x"\nround = 1\n')
    with pytest.raises(SystemExit) as ended:
        fedcore.cli.app.main(["simulate", str(tmp_path / "run.toml")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "unknown key 'run.round'; did you mean 'rounds'?" in said
    assert "participants: missing" in said
