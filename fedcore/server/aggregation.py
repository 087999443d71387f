"""One collection: a scratch model file and the core's collector that fills it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from fedcore._core import Codec, Collector, Exchange, Layout, Spill
from fedcore.config import RunConfig, TransferSection
from fedcore.errors import StorageError
from fedcore.layout import ModelFile

from .rounds import Participant
from .scratch import Scratch

__all__ = ["Aggregation", "open_spill", "update_codec"]

logger = logging.getLogger("fedcore.server")


def open_spill(config: RunConfig, run_id: str, layout: Layout) -> Spill | None:
    """Return the run's spill file, which takes no room before it is needed, or None if there is to be none.

    Room for the next model and its copy is left on the disk. What a killed server left there is taken up.
    """
    folder = config.spill_folder
    path = folder / f".{run_id}.spill"
    try:
        if not config.server.spill:
            for leftover in (path, path.with_name(path.name + "-index")):
                leftover.unlink(missing_ok=True)
            return None
        folder.mkdir(parents=True, exist_ok=True)
        return Spill(str(path), layout.chunk_bytes, 2 * layout.total_bytes)
    except (OSError, StorageError) as error:
        logger.warning("sites that are ahead are held back: %s", error)
        return None


def update_codec(transfer: TransferSection, layout: Layout, *, initial: bool) -> Codec | None:
    """Return what updates are decoded with, or None where every chunk must be raw.

    The initial model has no base to be a difference to, so at most it is compressed.
    """
    scheme = "raw" if initial else transfer.update
    if scheme == "raw" and not transfer.lossless:
        return None
    return Codec(layout, scheme, transfer.lossless, transfer.top_k)


class Aggregation:
    """Pulls and reduces the participants' updates into a scratch file.

    Where a participant is lost, the collection goes on under `narrow` with what it has of the others. Where a
    killed server was collecting the same, it goes on with what that one had reduced, and had spilled of anyone.

    Args:
        exchange: the data plane.
        layout: the run's layout.
        participants: in canonical order; ``peers`` gives the routing id of each.
        scratch: where the version is written.
        base: the current global model, which integers and booleans are taken from and encoded chunks are
            decoded onto; None for the initial one.
        codec: what encoded chunks are decoded with, as they come; None: all must be raw.
        memory: what chunks may take.
        spill: where chunks wait that came long before they can be reduced; None: they are held back.
    """

    def __init__(
        self,
        exchange: Exchange,
        layout: Layout,
        participants: tuple[Participant, ...],
        peers: Mapping[str, bytes],
        scratch: Scratch,
        *,
        base: ModelFile | None,
        codec: Codec | None = None,
        memory: int,
        spill: Spill | None,
    ) -> None:
        self.participants = participants
        self.scratch = scratch
        self.started = time.monotonic()
        self._exchange = exchange
        self.file, progress = scratch.open(layout, participants)
        if spill is not None:
            spill.begin(scratch.key(layout))
        self.collector = Collector(
            layout,
            [(peers[p.site], bytes.fromhex(p.set_id), p.weight) for p in participants],
            self.file.file,
            self.file.data_offset,
            None if base is None else (base.file, base.data_offset),
            memory,
            write_behind=True,
            spill=spill,
            codec=codec,
            progress=progress,
        )
        reduced, total, here = self.collector.progress()
        if any(here):
            logger.info(
                "going on where the server was killed: %d of %d chunks are reduced, %d more are here",
                reduced, total, sum(here) - len(here) * reduced,
            )  # fmt: skip
        self._peers = [peers[p.site] for p in participants]
        self._left = set(participants)
        self._rejected: set[Participant] = set()
        self._away: set[str] = set()
        exchange.start(self.collector)

    def reject(self, source: int) -> Participant:
        """Note that a participant's update is invalid, and return the participant."""
        participant = self.participants[source]
        self._rejected.add(participant)
        return participant

    def lost(self, site: str) -> None:
        """Note that a site is gone: should it come back, it is asked anew, and its silence begins anew."""
        self._away.add(site)

    def narrow(self, participants: tuple[Participant, ...], peers: Mapping[str, bytes]) -> bool:
        """Go on with these participants alone; False, and nothing done, if they are not among those it has.

        The chunks that are here of them are kept; those of the others count no longer.
        """
        if not set(participants) <= self._left - self._rejected:
            return False
        for number, participant in enumerate(self.participants):
            peer = peers.get(participant.site)
            if participant not in participants:
                if participant in self._left:
                    self._exchange.drop(self.collector, number)
            elif peer is not None and (
                peer != self._peers[number] or participant.site in self._away
            ):
                self._peers[number] = peer
                self._exchange.retry(self.collector, number, peer)
        self._left = set(participants)
        self._away.clear()
        return True

    def finish(self) -> tuple[ModelFile, list[int]]:
        """Let go of the collector, which is done, and write the file back to the device.

        Returns the model and the checksums of its chunks.
        """
        self._exchange.cancel(self.collector)
        self.file.file.sync()
        return self.file, self.collector.checksums

    def cancel(self) -> None:
        """Stop pulling and remove the scratch files."""
        self._exchange.cancel(self.collector)
        self.scratch.remove()
