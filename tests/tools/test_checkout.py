"""A script that is started where Python finds the checkout's own `fedcore/` in place of what was installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["fedcore.client", "fedcore.client.hf", "fedcore.cli.app"])
def test_the_folder_without_its_compiled_core_says_what_it_is(module: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "fedcore", tmp_path / "fedcore", ignore=shutil.ignore_patterns("*.so"))
    script = tmp_path / "train.py"
    script.write_text(f"import {module} as fl\nprint(fl.__name__)\n", encoding="utf-8")

    found = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert str(tmp_path / "fedcore") in last
    assert "no compiled core" in last
    assert "another folder" in last
    assert "python -P" in last

    safe = subprocess.run(
        [sys.executable, "-P", script], capture_output=True, text=True, check=False
    )
    assert safe.stdout.strip() == module, safe.stderr
