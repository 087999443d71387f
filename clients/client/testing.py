"""Test a training script against a real server in the same process, without sockets or keys."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.config import parse_run
from fedcore.server.outcome import RunResult
from fedcore.server.service import Server
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings
from fedcore.transport.local import LocalNetwork

from .current import reset_session, use_session

__all__ = ["LocalRun", "local_run"]

_LIMIT: float = 60.0
SILENCE: float = 10.0
"""A server in this process answers within a heartbeat; one that has failed never does."""


@dataclass(frozen=True)
class LocalRun:
    """A run in this process.

    Attributes:
        server: the server.
        folder: the run folder, with ``models``, ``best`` and ``summary.json``.
        network: where further sites dial: ``Session(settings, network.dial)``.
    """

    server: Server
    folder: Path
    network: LocalNetwork
    ended: Future[RunResult]

    def result(self, timeout: float = _LIMIT) -> RunResult:
        """Wait until the run is over, and return how it ended.

        Raises:
            TimeoutError: it is not within ``timeout`` seconds.
        """
        return self.ended.result(timeout)


@contextlib.contextmanager
def local_run(
    folder: Path,
    *,
    site: str = "site",
    settings: Mapping[str, Any] | None = None,
    clip: float | None = None,
) -> Iterator[LocalRun]:
    """Serve a run in the background, in which the script of this process is ``site``.

    Args:
        folder: the run's files go below it.
        site: the script's name in the run.
        settings: sections of a run file that differ from one run of two rounds with this one site.
        clip: the site's own bound of an update's norm, as ``FEDCORE_CLIP``.

    Raises:
        ConfigError: the settings are no run file's.
    """
    sections: dict[str, dict[str, Any]] = {
        "run": {"name": "local", "rounds": 2},
        "participants": {"sites": [site], "round_deadline": "1h"},
        "server": {"insecure": True},
    }
    for section, values in (settings or {}).items():
        sections[section] = {**sections.get(section, {}), **values}
    config = parse_run(sections, folder=folder)
    with contextlib.ExitStack() as stack:
        network = LocalNetwork()
        stack.callback(network.close)
        server = Server(config, link=network.server())
        pool = stack.enter_context(ThreadPoolExecutor(1, "fedcore-local-server"))
        ended = pool.submit(server.run)
        stack.callback(server.stop)
        own = SiteSettings(server.endpoint, site, idle_timeout=SILENCE, clip=clip)
        use_session(Session(own, network.dial))
        stack.callback(_forget)
        yield LocalRun(server, config.run_folder, network, ended)


def _forget() -> None:
    """End the script's session and forget its trainer: the next run of this process has its own."""
    if "fedcore.client.torch" in sys.modules:
        from .torch import forget_site

        forget_site()
    else:
        reset_session()
