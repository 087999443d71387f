"""What `make wheel` has put in dist: the source archive holds all sources, and the wheel what they install."""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "clients", "csrc", "docs", "fedcore", "tests")
MADE = {".pyc", ".so"}
NATIVE = {"_core", "_pump"}


@pytest.fixture
def dist() -> Path:
    """The folder of the archives, which `make wheel` names."""
    if "FEDCORE_DIST" not in os.environ:
        pytest.skip("there are archives to look at in `make wheel` alone")
    return Path(os.environ["FEDCORE_DIST"])


def only(found: Iterable[Path]) -> Path:
    (path,) = found
    return path


def on_disk(folder: Path) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in MADE
    }


def test_the_source_archive_holds_each_source_and_nothing_that_was_built(dist: Path) -> None:
    with tarfile.open(only(dist.glob("*.tar.gz"))) as archive:
        files = [row.name.partition("/")[2] for row in archive.getmembers() if row.isfile()]
    assert len(files) == len(set(files))
    assert {name for name in files if name.startswith(FOLDERS)} == set().union(
        *(on_disk(ROOT / folder) for folder in FOLDERS)
    )
    others = {name for name in files if not name.startswith(FOLDERS)}
    needed = {"CMakeLists.txt", "LICENSE", "Makefile", "PKG-INFO", "README.md", "constraints.txt"}
    assert others >= {*needed, "pyproject.toml"}
    assert all((ROOT / name).is_file() for name in others - {"PKG-INFO"})


def test_the_wheel_holds_the_package_and_its_two_native_modules_alone(dist: Path) -> None:
    with zipfile.ZipFile(only(dist.glob("*.whl"))) as wheel:
        files = {Path(name) for name in wheel.namelist() if not name.endswith("/")}
    assert {path.parts[0].partition("-")[0] for path in files} == {"fedcore", "fedcore_fl"}
    assert {path.name.partition(".")[0] for path in files if path.suffix == ".so"} == NATIVE
    expected = {path for path in map(Path, on_disk(ROOT / "fedcore")) if path.suffix != ".pyx"}
    for part in ("client", "demo", "evaluate"):
        lying = map(Path, on_disk(ROOT / "clients" / part))
        expected |= {Path("fedcore", *path.parts[1:]) for path in lying}
    assert {
        path for path in files if path.parts[0] == "fedcore" and path.suffix != ".so"
    } == expected


def test_the_wheel_has_the_tag_of_the_systems_that_it_runs_on(dist: Path) -> None:
    assert "-manylinux_2_" in only(dist.glob("*.whl")).name
