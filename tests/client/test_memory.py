"""The global model is in memory only where that is a small share of what is there."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedcore._core import Layout
from fedcore.site import memory, work
from fedcore.site.memory import available_memory
from fedcore.site.work import WorkFolder

LAYOUT = Layout([("w", "F32", [5000]), ("n", "I64", [3])], 4096)


def machine(folder: Path, available_kib: int, **groups: tuple[str, int]) -> int:
    """Return what is available on a machine with nested control groups, the outermost first."""
    (folder / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_kib} kB\n")
    path = folder / "groups"
    path.mkdir()
    for name, (limit, current) in groups.items():
        path = path / name
        path.mkdir()
        (path / "memory.max").write_text(f"{limit}\n")
        (path / "memory.current").write_text(f"{current}\n")
    own = folder / "cgroup"
    own.write_text(f"1:name=old:/elsewhere\n0::/{path.relative_to(folder / 'groups')}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "OWN_GROUP", own)
        return available_memory(folder / "meminfo", folder / "groups")


def test_what_the_machine_has_left_is_available(tmp_path: Path) -> None:
    assert machine(tmp_path, 1000) == 1000 * 1024


@pytest.mark.parametrize(
    ("groups", "left"),
    [
        ({"a": ("max", 5), "b": ("max", 5)}, 1000 * 1024),
        ({"a": ("max", 5), "b": ("9000", 5000)}, 4000),
        ({"a": ("7000", 5000), "b": ("9000", 5000)}, 2000),
        ({"a": ("7000", 8000)}, 0),
    ],
    ids=["no limit", "its own limit", "a limit around it", "beyond its limit"],
)
def test_a_container_has_no_more_than_its_limit(
    tmp_path: Path, groups: dict[str, tuple[str, int]], left: int
) -> None:
    assert machine(tmp_path, 1000, **groups) == left


@pytest.mark.parametrize(
    "text", ["", "MemTotal: 5 kB\n", "MemAvailable:\n", "MemAvailable: x kB\n"]
)
def test_where_the_system_does_not_say_nothing_is_available(tmp_path: Path, text: str) -> None:
    (tmp_path / "meminfo").write_text(text)
    assert available_memory(tmp_path / "meminfo", tmp_path) == 0
    assert available_memory(tmp_path / "nothing", tmp_path) == 0


@pytest.mark.parametrize(("share", "in_memory"), [(8, True), (8.001, False)])
def test_a_model_that_is_large_for_the_machine_is_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, in_memory: bool
) -> None:
    monkeypatch.setattr(work, "available_memory", lambda: int(LAYOUT.total_bytes * 64 / share))
    folder = WorkFolder(tmp_path, "a", "0" * 32)
    file = folder.received(LAYOUT)
    assert (file.file.path == "") is in_memory
    values = np.arange(5000, dtype=np.float32)
    file.fill(lambda name: values if name == "w" else np.arange(3))
    assert np.array_equal(np.frombuffer(file.view("w"), np.float32), values)
    assert folder.received(LAYOUT) is file
    folder.close(keep=False)


CHURN = """
import resource, sys
from fedcore.site.memory import keep_warm
if sys.argv[1] == "warm":
    keep_warm()
for _ in range(20):
    blocks = [bytearray(1 << 20) for _ in range(8)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc gives blocks back so soon"
)
def test_memory_of_chunks_is_used_again_without_a_fault_per_page() -> None:
    faults = {
        how: int(subprocess.check_output([sys.executable, "-P", "-c", CHURN, how]))
        for how in ("warm", "cold")
    }
    pages = 20 * 8 * 256
    assert faults["cold"] - faults["warm"] > pages / 2
