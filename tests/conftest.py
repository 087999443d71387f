from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.support")

# Matrices are small here, and NumPy's threads would wait for each other most of the time. It is read when NumPy
# is loaded, which conftest.py of a folder below may do.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_MEMORY_FOLDER = Path("/dev/shm")
_ROOM = 4 << 30  # bytes; the tests at work at one time take far less


def _memory_has_room() -> bool:
    try:
        found = os.statvfs(_MEMORY_FOLDER)
    except OSError:
        return False
    return os.access(_MEMORY_FOLDER, os.W_OK) and found.f_bavail * found.f_frsize >= _ROOM


def pytest_configure(config: pytest.Config) -> None:
    """Keep the tests' files in memory: hundreds of servers that wait for a disk at each commit take minutes."""
    if config.option.basetemp is None and _memory_has_room():
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY_FOLDER))


def pytest_collection_finish() -> None:
    """Spare trainers what takes them most time here: garbage collections, and second threads for tiny tensors."""
    gc.collect()
    gc.freeze()  # what the imports made is not looked at again, several times a round
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _hangup_ends_a_process() -> None:
    """Undo the ignored SIGHUP that ``nohup`` leaves to all processes under it."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def _work_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what sites keep between processes out of the user's own folders."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "FEDCORE_WORK", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def _patient_sites() -> Iterator[None]:
    """Let a site's process wait for a server that a busy machine starts slowly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "FEDCORE_CONNECT_TIMEOUT", "200s")
        yield


@pytest.fixture
def any_level() -> Iterator[None]:
    """Let a test set the level of instructions; afterwards it is what it was."""
    from fedcore import _core

    before = _core.simd_level()
    yield
    _core.set_simd_level(before)


@pytest.fixture
def fedcore() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the ``fedcore`` command in a process of its own, without a terminal."""

    def run(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-P", "-m", "fedcore", *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, **env},
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture(params=["compiled", "python"])
def pump(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test once with the compiled pump and once with the plain Python loop."""
    monkeypatch.setenv("FEDCORE_PUMP", request.param)
    return request.param
