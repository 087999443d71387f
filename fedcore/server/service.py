"""The server of one run: what `fedcore-server` starts."""

from __future__ import annotations

from fedcore.config import RunConfig

from .host import Host
from .outcome import RunResult

__all__ = ["RunResult", "Server"]


class Server(Host):
    """A host with one run."""

    @property
    def config(self) -> RunConfig:
        """The run file."""
        return self.runs[0].config

    def run(self, linger: float = 0.0) -> RunResult:
        """Run to the end, as `Host.serve` does, and return how it ended."""
        return self.serve(linger)[0]
