"""Scripts that run in several processes, one a rank."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .ports import free_port

SCRIPTS = Path(__file__).parents[1] / "client" / "ranked"
SECONDS = 500  # what a busy machine needs at most


def start_two(script: str, *arguments: object) -> list[Any]:
    """Run a script in two processes, as torchrun would."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return finish(
        [
            launch(
                [str(SCRIPTS / script), *map(str, arguments)],
                {**world, "RANK": rank, "LOCAL_RANK": rank},
            )
            for rank in ("0", "1")
        ]
    )


def launch(command: list[str], environment: dict[str, str] | None = None) -> Any:
    return subprocess.Popen(
        [sys.executable, "-P", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FEDCORE_PROGRESS": "0", **(environment or {})},
    )  # fmt: skip


def finish(processes: list[Any]) -> list[Any]:
    """Wait for processes; each gets ``said``, all that it wrote."""
    with ThreadPoolExecutor(len(processes)) as pool:
        try:
            said = list(pool.map(lambda p: "".join(p.communicate(timeout=SECONDS)), processes))
        finally:
            for process in processes:
                process.kill()
    for process, text in zip(processes, said, strict=True):
        process.said = text
    return processes
