"""The tutorial's files and commands, run in its order; it leads where it says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support.ports import free_port

PAGE = Path(__file__).parents[2] / "docs/tutorial.md"
_BLOCK = re.compile(r"(.*?)\n```(\w+)\n(.*?)\n```\n", re.DOTALL)


def blocks() -> Iterator[tuple[str, str, str]]:
    """Yield the file that the text before each block names last, the block's language, and the block."""
    for before, language, block in _BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        names = re.findall(r"`(\w+\.(?:py|toml))`", before)
        yield (names[-1] if names else ""), language, block


def test_every_command_of_the_tutorial_exists_and_every_block_is_of_a_known_kind() -> None:
    words = []
    for name, language, block in blocks():
        assert language in ("python", "toml", "sh")
        assert name or language == "sh"
        if language == "sh":
            words += [line.split() for line in block.splitlines()]
    commands = {line[1] for line in words if line[0] == "fedcore"}
    assert commands == {"partition", "inspect", "simulate", "status", "provision"}
    for command in commands:
        subprocess.run(
            [sys.executable, "-P", "-m", "fedcore", command, "--help"], capture_output=True, check=True
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_tutorial_leads_from_one_script_to_three_organisations(tmp_path: Path) -> None:
    port = str(free_port())
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, start in (
        ("python", "-P"),
        ("fedcore", "-P -m fedcore"),
        ("fedcore-server", "-P -m fedcore server"),
    ):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {start} "$@"\n')
        (programs / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    said: dict[str, str] = {}
    running: list[tuple[str, subprocess.Popen[str]]] = []
    try:
        for name, language, block in blocks():
            text = block.replace("7733", port)
            if language != "sh":
                file = tmp_path / name
                before = file.read_text().splitlines()[:-2] if file.exists() else []
                file.write_text("\n".join([*before, text, ""]))
                continue
            for line in text.splitlines():
                background = line.startswith(("fedcore-server", "FEDCORE_KIT="))
                process = subprocess.Popen(
                    ["bash", "-c", line], cwd=tmp_path, env=env, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                )  # fmt: skip
                running.append((line, process))
                if not background:
                    said[line] = process.communicate(timeout=1200)[0]
                    assert process.returncode == 0, f"{line}\n{said[line]}"
        for line, process in running:
            if line not in said:
                said[line] = process.communicate(timeout=1200)[0]
                assert process.returncode == 0, f"{line}\n{said[line]}"
    finally:
        for _, process in running:
            process.kill()

    def accuracy(data: str) -> float:
        return float(said[f"python train.py {data}"].split()[-1])

    alone = [accuracy(f"data/site-{i}.jsonl") for i in (1, 2, 3)]
    assert accuracy("messages.jsonl") > 0.95
    assert max(alone) < 0.6
    assert "classifier.weight" in said["fedcore inspect train.py data/site-1.jsonl"]
    assert "4 departments" in said["python use.py"].splitlines()[-1]
    for run in ("messages", "messages-together"):
        summary = json.loads((tmp_path / f"runs/{run}/summary.json").read_text())
        best = summary["versions"][summary["best_version"]]
        assert best["metrics"]["eval_accuracy"] > 0.9
        assert set(best["participants"]) <= {"north", "south", "west"}
