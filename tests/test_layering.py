"""The floors of the house: arrows run only downwards, and what must stay light does."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


FLOORS = (
    {
        "fedcore",
        "errors",
        "events",
        "gates",
        "outlet",
        "words",
        "quantities",
        "wrong_values",
        "weighing",
        "replacing",
        "clock",
        "cache",
        "_device",
        "_core",
        "_cuda",
        "_pump",
    },
    {"protocol", "layout", "roles", "model_file", "encoding", "rules", "adapters"},
    {"config", "security", "transport"},
    {"files", "monitor"},
    {"server", "site"},
    {"simulation"},
    {"client"},
    {"demo"},
    {"evaluate"},
    {"cli", "__main__"},
)
"""The floors of the Python house, from the ground to the roof; those of one floor may use each other."""


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts[0] = "fedcore"
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, Path]:
    paths = [*(ROOT / "fedcore").rglob("*.py"), *(ROOT / "clients").rglob("*.py")]
    return {module_of(path): path for path in paths if "examples" not in path.parts}


@functools.cache
def imported(path: Path) -> set[str]:
    """Return what a file imports, as full names: modules, and what may be a module's name or a name in it."""
    names: set[str] = set()
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            names.update({base, *(f"{base}.{alias.name}" for alias in node.names)})
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names.update(a.value for a in node.args if isinstance(a, ast.Constant))
    return names


@functools.cache
def arrows() -> dict[str, set[str]]:
    known = modules()
    found: dict[str, set[str]] = {}
    for name, path in known.items():
        uses = {n for n in imported(path) if n in known or re.match(r"fedcore\._[a-z]", n)} - {name}
        # `from .a import b` uses the module a.b, or else the name b in a; the package itself is no arrow.
        found[name] = {
            n
            for n in uses
            if not name.startswith(n + ".") and not any(m.startswith(n + ".") for m in uses)
        }
    return found


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Return the names along a circle of a graph, if there is one."""
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return list(error.args[1])
    return None


def test_no_arrow_between_the_floors_runs_upwards() -> None:
    floors = {part: level for level, parts in enumerate(FLOORS) for part in parts}

    def floor(name: str) -> int:
        return floors[name.split(".")[1] if "." in name else name]

    upwards = [
        f"{name} -> {used}"
        for name, uses in arrows().items()
        for used in uses
        if floor(used) > floor(name)
    ]
    assert not upwards


def test_no_circle_is_in_the_house() -> None:
    graph = arrows()
    assert len(graph) > 100
    assert circle(graph) is None
    folders: dict[str, set[str]] = {}
    for name, uses in graph.items():
        folder = str(modules()[name].parent)
        others = {str(modules()[n].parent) for n in uses if n in modules()} - {folder}
        if modules()[name].parent.name != "fedcore":  # the modules of the ground are no folder
            folders.setdefault(folder, set()).update(o for o in others if Path(o).name != "fedcore")
    assert len(folders) > 12
    assert circle(folders) is None


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


CORE_FLOORS = (
    "base",
    "format",
    "kernels",
    "codec",
    "factors",
    "reduce",
    "collect",
    "transfer",
    "python",
)


def test_the_folders_of_the_core_include_only_what_is_below_them() -> None:
    below = {folder: {*CORE_FLOORS[: level + 1]} for level, folder in enumerate(CORE_FLOORS)}
    below["cuda"] = {
        *CORE_FLOORS[: CORE_FLOORS.index("codec") + 1],
        "cuda",
    }  # beside the CPU's reduction
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


def test_no_test_module_imports_another_one() -> None:
    files = list((ROOT / "tests").rglob("*.py"))
    assert len(files) > 100
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                last = {(node.module or "").rpartition(".")[2], *(n.name for n in node.names)}
                within = node.level > 0 or (node.module or "").startswith("tests")
                tests = {name for name in last if name.startswith(("test_", "conftest"))}
                assert not (within and tests), f"{path.name}: what tests share is in tests/support"


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
        ("fedcore.client", ["torch", "numpy", "asyncio"]),
        ("fedcore.server.service", ["torch", "numpy", "asyncio"]),
        ("fedcore.cli.app", ["torch", "numpy", "zmq", "fedcore._core"]),
    ],
)
def test_importing_stays_light(module: str, absent: list[str]) -> None:
    program = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_architecture_page_has_each_folder_on_its_floor() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([0-9]) \| ([^|]*) \|", page, re.MULTILINE)
    named = {
        name: int(floor)
        for floor, cell in rows
        for name in re.findall(r"`(?:fedcore|clients)/(\w+)", cell)
    }
    assert len(named) >= 20
    assert named == {name: floor for floor, them in enumerate(FLOORS) for name in them & set(named)}
