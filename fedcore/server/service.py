"""The server of one run: what `fedcore-server` starts."""

from __future__ import annotations

from pathlib import Path

from fedcore.clock import SYSTEM, Clock
from fedcore.config import RunConfig
from fedcore.transport.ends import ServerEnd

from .host import Host
from .outcome import RunResult
from .timing import DEFAULT, Timing

__all__ = ["RunResult", "Server"]


class Server(Host):
    """A host with one run; for ``config`` and the rest see `Host`."""

    def __init__(
        self,
        config: RunConfig,
        endpoint_file: Path | None = None,
        *,
        discard: bool = False,
        link: ServerEnd | None = None,
        clock: Clock = SYSTEM,
        timing: Timing = DEFAULT,
    ) -> None:
        super().__init__(
            [config], endpoint_file, discard=discard, link=link, clock=clock, timing=timing
        )

    @property
    def config(self) -> RunConfig:
        """The run file."""
        return self.runs[0].config

    def run(self, linger: float = 0.0) -> RunResult:
        """Run to the end, as `Host.serve` does, and return how it ended."""
        return self.serve(linger)[0]
