"""Peers do the same work, their results are checked, and a peer that fails costs the rest nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers
from benchmarks.peers import flower, nvflare
from benchmarks.peers.run import PeerError
from benchmarks.round_trip import measure
from benchmarks.workload import TENSORS, Work
from fedcore.errors import ConfigError

MIB = 1 << 20
LOG = """\
2026-01-02 03:04:05,000 - INFO - starting
2026-01-02 03:04:06,250 - INFO -
-----------------
    Round 0 started.
2026-01-02 03:04:07,000 - INFO - Aggregated 1/1 results
2026-01-02 03:04:08,750 - INFO -
    Round 1 started.
2026-01-02 03:04:12,000 - INFO -
    Finished FedAvg.
"""


def test_rounds_of_nvflare_are_timed_from_one_start_to_the_next(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text(LOG)
    assert nvflare.round_seconds(log, 2) == [2.5, 3.25]
    with pytest.raises(PeerError, match="2 rounds, not 3"):
        nvflare.round_seconds(log, 3)


def test_a_wrong_result_of_flower_gives_no_time() -> None:
    marks = [10.0, 12.0, 13.5]
    assert flower.outcome({"right": True, "marks": marks}, 2).seconds == [2.0, 1.5]
    with pytest.raises(PeerError, match="the result is wrong"):
        flower.outcome({"right": False, "marks": marks}, 2)
    with pytest.raises(PeerError, match="3 rounds"):
        flower.outcome({"right": True, "marks": marks}, 3)


def test_the_start_of_a_peer_is_not_held_against_it() -> None:
    assert peers.typical([15.0, 4.0, 5.0]) == 4.5
    assert peers.typical([15.0]) == 15.0


def test_names_of_peers_are_checked() -> None:
    assert peers.parse_peers(" nvflare, flower ") == ["nvflare", "flower"]
    assert peers.parse_peers("") == []
    with pytest.raises(ConfigError, match="someone"):
        peers.parse_peers("flower,someone")


def test_a_peer_that_cannot_be_installed_is_reported_and_the_rest_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> Path:
        raise PeerError("cannot be installed")

    monkeypatch.setattr(peers, "install", fail)
    result = measure(Work(MIB, 2, 1), 64 * MIB, "reader", ["nvflare"])
    assert result["peers"]["nvflare"]["error"] == "cannot be installed"
    assert "round_s" not in result["peers"]["nvflare"]
    assert result["round_s"] > 0


def test_an_environment_is_made_once_and_again_when_a_pin_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    class Done:
        returncode = 0

    def run(command: list[str], **_: Any) -> Done:
        commands.append(command)
        (tmp_path / "peers" / "thing-1.0" / "bin").mkdir(parents=True, exist_ok=True)
        return Done()

    monkeypatch.setenv("FEDCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(peers.subprocess, "run", run)
    python = peers.install("thing", "thing==1.0")
    assert python == tmp_path / "peers" / "thing-1.0" / "bin" / "python"
    assert [command[2] for command in commands] == ["venv", "pip"]
    assert commands[1][-2:] == ["thing==1.0", peers.torch_pin()]
    peers.install("thing", "thing==1.0")
    assert len(commands) == 2
    (tmp_path / "peers" / "thing-1.0" / "installed").write_text("thing==1.0 torch==0.1")
    peers.install("thing", "thing==1.0")
    assert len(commands) == 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["nvflare", "flower"])
def test_a_peer_is_installed_and_measured(name: str) -> None:
    result = peers.measure_peer(name, Work(TENSORS * 4000, 2, 2))
    assert "error" not in result, result
    assert result["round_s"] > 0
    assert result["peak_rss_bytes"] > 50 * MIB
