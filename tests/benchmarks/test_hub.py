"""Models, data sets and tasks by name, from a hub on this machine that the Hub's own client talks to."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from ..support.benchmarking import ROOT
from ..support.texts import exchanges, texts
from .small_hub import Fetched, small_hub

pytestmark = pytest.mark.slow


def data_set(folder: Path, rows: Iterable[object], *names: str) -> Path:
    folder.mkdir()
    for name in names or ("train",):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def run(address: str, work: Path, *command: str) -> None:
    """Run an experiment's command in its own process: the hub's address is read when its client is imported."""
    mine = {"HF_ENDPOINT": address, "HF_HOME": str(work / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    mine |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    mine |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "FEDCORE_CACHE": str(work / "cache")}
    start = [sys.executable, "-m", "benchmarks.experiments", *command]
    done = subprocess.run(
        start, cwd=ROOT, env={**os.environ, **mine}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def weights(fetched: Fetched, name: str) -> bool:
    return ("models", name, "model.safetensors") in fetched


def test_sentiment_takes_an_encoder_and_texts_by_name(encoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = [{"sentence": t.text, "mood": t.label, "where": t.source} for t in texts()]
    given = {
        ("models", "some/encoder"): encoder,
        ("datasets", "some/texts"): data_set(tmp_path / "texts", rows),
    }
    out = tmp_path / "out"
    with small_hub(given) as (address, fetched):
        command = ["peft", "--quick", "--no-confirm", "--no-steady", "--methods", "lora"]
        command += ["--model", "some/encoder", "--layers", "0", "--frozen", "0", "--out", str(out)]
        command += ["--dataset", "some/texts", "--columns", "sentence,mood,where", "--seeds", "7"]
        run(address, tmp_path, *command)
        assert weights(fetched, "some/encoder")
        assert ("datasets", "some/texts", "train.jsonl") in fetched
    found = json.loads((out / "peft.json").read_text())
    assert [row["split"] for row in found["rows"]] == ["natural", "0.3"]
    assert found["rows"][0]["seeds"] == [7]


def test_a_causal_model_and_instruction_sets_come_by_name_and_a_task_of_the_scorer_fills_its_column(
    base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    row = {"activity_label": "Cats", "ctx_a": "A cat sits.", "ctx_b": "it", "label": "1", "ind": 1}
    row |= {"endings": ["flies", "sleeps", "sings", "reads"], "ctx": "A cat sits. it"}
    given = {
        ("models", "some/causal"): base,
        ("datasets", "Rowan/hellaswag"): data_set(
            tmp_path / "cats", [row] * 3, "train", "validation"
        ),
    }
    for name in ("snow", "sand"):
        rows = [dataclasses.asdict(exchange) for exchange in exchanges(name)]
        given["datasets", f"some/{name}"] = data_set(tmp_path / name, rows)
    out = tmp_path / "out"
    with small_hub(given) as (address, fetched):
        command = ["sft", "--quick", "--model", "some/causal", "--tasks", "hellaswag"]
        command += ["--sites", "north=some/snow,south=some/sand", "--out", str(out)]
        run(address, tmp_path, *command)
        assert weights(fetched, "some/causal")
        assert {name for kind, name, _ in fetched if kind == "datasets"} == {
            "some/snow",
            "some/sand",
            "Rowan/hellaswag",
        }
    found = json.loads((out / "sft.json").read_text())["seeds"]["1"]
    assert list(found["curves"]) == ["federated", "north", "south", "centralised"]
    assert [s["task"] for s in found["scores"]["federated"]["scores"]] == ["hellaswag"]
    head = (out / "sft.md").read_text().splitlines()[-7]
    assert "| hellaswag acc | hellaswag acc_norm | winogrande: not run |" in head
