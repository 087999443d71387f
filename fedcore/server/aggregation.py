"""One collection: a scratch model file and the core's collector that fills it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from fedcore._core import Collector, Exchange, Layout
from fedcore.layout import ModelFile, create_model

from .rounds import Participant

__all__ = ["Aggregation"]


class Aggregation:
    """Pulls and reduces the participants' updates into a scratch file.

    Args:
        exchange: the data plane.
        layout: the run's layout.
        participants: in canonical order; ``peers`` gives the routing id of each.
        scratch: file to create.
        base: the current global model, which integers and booleans are taken from; None for the initial one.
        memory: bytes that chunks may take.
        metadata: for the header of the model file.
    """

    def __init__(
        self,
        exchange: Exchange,
        layout: Layout,
        participants: tuple[Participant, ...],
        peers: Mapping[str, bytes],
        scratch: Path,
        *,
        base: ModelFile | None,
        memory: int,
        metadata: Mapping[str, str],
    ) -> None:
        self.participants = participants
        self.scratch = scratch
        self.started = time.monotonic()
        self._exchange = exchange
        self.file = create_model(scratch, layout, metadata)
        self.collector = Collector(
            layout,
            [(peers[p.site], bytes.fromhex(p.set_id), p.weight) for p in participants],
            self.file.file,
            self.file.data_offset,
            None if base is None else (base.file, base.data_offset),
            memory,
            write_behind=True,
        )
        exchange.start(self.collector)

    def finish(self) -> tuple[ModelFile, list[int]]:
        """Let go of the collector, which is done, and write the file back to the device.

        Returns the model and the checksums of its chunks.
        """
        self._exchange.cancel(self.collector)
        self.file.file.sync()
        return self.file, self.collector.checksums

    def cancel(self) -> None:
        """Stop pulling and remove the scratch file."""
        self._exchange.cancel(self.collector)
        self.scratch.unlink(missing_ok=True)
