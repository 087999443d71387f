"""What the tests of the commands share: run files, status snapshots, and real processes."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from fedcore.protocol import SiteStatus, StatusReply, VersionStatus

from ..support.scripts import ADD_ONE


@pytest.fixture
def reply() -> StatusReply:
    return StatusReply(
        run="r", phase="training", round=2, rounds=5, metric="loss", mode="min", best_version=1,
        model_bytes=4000, bytes_in=12_300_000, bytes_out=999, elapsed=75.2, eta=200.0,
        sites=[
            SiteStatus(site="north", state="delivered", examples=1234, metrics={"train_loss": 0.5, "lr": 0.1}),
            SiteStatus(site="south", state="lost", message="nothing heard for 3.4 s"),
        ],
        versions=[
            VersionStatus(version=0, metrics={"loss": 2.0}, bytes=4000),
            VersionStatus(version=1, metrics={"loss": 1.0}, participants=["north", "south"], seconds=9.4),
        ],
    )  # fmt: skip


@pytest.fixture
def run_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a run file and its script; ``people`` is the participants section."""

    def write(script: str = ADD_ONE, people: str = 'sites = ["a", "b"]', rounds: int = 3) -> Path:
        (tmp_path / "train.py").write_text(textwrap.dedent(script), encoding="utf-8")
        path = tmp_path / "run.toml"
        path.write_text(
            f'[run]\nname = "t"\nrounds = {rounds}\n[participants]\n{people}\n'
            '[selection]\nmetric = "loss"\nmode = "max"\n[simulate]\nscript = "train.py"\n',
            encoding="utf-8",
        )
        return path

    return write
