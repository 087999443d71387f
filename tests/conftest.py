from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _work_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep what sites keep between processes out of the user's own folders."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "FEDCORE_WORK", str(folder))
        yield folder
