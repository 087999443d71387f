"""The floors of the house: arrows run only downwards, and what must stay light does."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_nothing_below_imports_the_clients_or_the_demo() -> None:
    files = list((ROOT / "fedcore").rglob("*.py"))
    assert len(files) > 10
    for path in files:
        above = {n for n in imported(path) if n.startswith(("fedcore.client", "fedcore.demo"))}
        assert not above, f"{path.name} imports {above}"


def test_the_server_side_never_imports_torch() -> None:
    for path in (ROOT / "fedcore").rglob("*.py"):
        assert not {
            n for n in imported(path) if n.partition(".")[0] in ("torch", "transformers", "peft")
        }


def test_the_core_includes_python_in_its_bindings_alone() -> None:
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        foreign = re.findall(r"#include [<\"](pybind11|Python\.h|zmq|torch|lz4)", path.read_text())
        binding = path.parent.name == "python" or path.name == "bindings.cpp"
        assert not foreign or binding, path.name


FLOORS = ("base", "format", "kernels", "codec", "reduce", "collect", "transfer", "python")


def test_the_folders_of_the_core_include_only_what_is_below_them() -> None:
    below = {folder: {*FLOORS[: level + 1]} for level, folder in enumerate(FLOORS)}
    below["cuda"] = {*FLOORS[: FLOORS.index("codec") + 1], "cuda"}  # beside the CPU's reduction
    seen = set()
    for path in (ROOT / "csrc").glob("*/*"):
        if path.suffix in (".h", ".hpp", ".cpp", ".inl", ".cu"):
            folder = path.parent.name
            included = re.findall(r'#include "(?:(.*)/)?', path.read_text(encoding="utf-8"))
            above = set(included) - below[folder]
            assert not above, f"{folder}/{path.name} includes {above}"
            seen.add(folder)
    assert seen == below.keys()
    loose = [path.name for path in (ROOT / "csrc").iterdir() if path.is_file()]
    assert not loose, "a source of the core lies in the folder of its subject"


@pytest.mark.parametrize(
    ("name", "others"), [("arith", set()), ("decode", {'"kernels/arith.hpp"'})]
)
def test_what_host_and_device_share_includes_nothing_that_a_device_lacks(
    name: str, others: set[str]
) -> None:
    header = (ROOT / "csrc/kernels" / f"{name}.hpp").read_text(encoding="utf-8")
    assert set(re.findall(r"#include (.*)", header)) == {"<cstddef>", "<cstdint>", *others}
    assert "std::" not in re.sub(r"std::(size_t|u?int\d+_t)", "", header)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("fedcore", ["torch", "numpy", "fedcore._core", "zmq", "pydantic"]),
        ("fedcore.client", ["torch", "numpy"]),
        ("fedcore.server.service", ["torch", "numpy"]),
        ("fedcore.cli.app", ["torch", "numpy", "zmq", "fedcore._core"]),
    ],
)
def test_importing_stays_light(module: str, absent: list[str]) -> None:
    program = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
