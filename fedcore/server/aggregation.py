"""One collection: a scratch model file and the core's collector that fills it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from fedcore._core import Codec, Collector, Exchange, Layout, MappedFile, Spill
from fedcore.config import RunConfig, TransferSection
from fedcore.errors import StorageError
from fedcore.layout import ModelFile

from .rounds import Participant
from .scratch import Scratch

__all__ = ["Aggregation", "Setting", "open_spill", "update_codec"]

_MOST_AHEAD: Final = 8

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


@dataclass(frozen=True)
class Setting:
    """What a collection works with.

    Attributes:
        exchange: the data plane.
        layout: the run's layout.
        scratch: where the version is written.
        memory: what chunks may take.
        base: the current global model, which integers and booleans are taken from and encoded chunks are
            decoded onto; None for the initial one.
        codec: what encoded chunks are decoded with, as they come; None: all must be raw.
        spill: where chunks wait that came long before they can be reduced; None: they are held back.
    """

    exchange: Exchange
    layout: Layout
    scratch: Scratch
    memory: int
    base: ModelFile | None = None
    codec: Codec | None = None
    spill: Spill | None = None

    @property
    def place(self) -> tuple[MappedFile, int] | None:
        """Where the base's flat bytes lie."""
        return None if self.base is None else (self.base.file, self.base.data_offset)


class Aggregation:
    """Pulls and reduces the participants' updates into a scratch file.

    It begins open: each update that is offered is pulled ahead, as far as memory and the spill file allow, while
    other sites still train. `close` says whose updates count; they are reduced from then on. Where a participant
    is lost, the collection goes on under `narrow` with what it has of the others.

    Args:
        setting: what it works with.
        expected: for how many sites memory is divided.
    """

    def __init__(self, setting: Setting, expected: int) -> None:
        self._begin(setting)
        self.collector = Collector.open(
            setting.layout,
            expected,
            setting.place,
            setting.memory,
            write_behind=True,
            spill=setting.spill,
            codec=setting.codec,
        )
        self._exchange.start(self.collector)

    @classmethod
    def of(
        cls, setting: Setting, participants: tuple[Participant, ...], peers: Mapping[str, bytes]
    ) -> Aggregation:
        """Return the collection of these participants, in canonical order, from their routing ids in ``peers``.

        Where a killed server was collecting the same, it goes on with what that one had reduced.
        """
        made = cls.__new__(cls)
        made._begin(setting)
        made.participants = list(participants)
        made._left = set(participants)
        made._peers = [peers[p.site] for p in participants]
        made.file, progress = setting.scratch.open(setting.layout, participants)
        made.collector = Collector(
            setting.layout,
            [(peers[p.site], bytes.fromhex(p.set_id), p.weight) for p in participants],
            made.file.file,
            made.file.data_offset,
            setting.place,
            setting.memory,
            write_behind=True,
            spill=setting.spill,
            codec=setting.codec,
            progress=progress,
        )
        reduced, total, here = made.collector.progress()
        if any(here):
            logger.info(
                "going on where the server was killed: %d of %d chunks are reduced, %d more are here",
                reduced, total, sum(here) - len(here) * reduced,
            )  # fmt: skip
        made._exchange.start(made.collector)
        return made

    def _begin(self, setting: Setting) -> None:
        self.scratch = setting.scratch
        self.file: ModelFile | None = None
        self.participants: list[Participant] = []
        self.started = time.monotonic()
        self._layout = setting.layout
        self._exchange = setting.exchange
        self._peers: list[bytes] = []
        self._left: set[Participant] = set()
        self._rejected: set[Participant] = set()
        self._away: set[str] = set()
        if setting.spill is not None:
            setting.spill.begin(self.scratch.key(setting.layout))

    @property
    def open(self) -> bool:
        """Whether updates may still be offered."""
        return self.file is None

    def wants(self, site: str) -> bool:
        """Whether another update of a site is pulled ahead; one that makes them without end waits for `close`."""
        return self.open and sum(p.site == site for p in self.participants) < _MOST_AHEAD

    def offer(self, participant: Participant, peer: bytes) -> None:
        """Pull an update ahead; what another process of the same site had offered counts no longer."""
        for number, known in enumerate(self.participants):
            if known not in self._left or known.site != participant.site:
                continue
            if known == participant and known not in self._rejected:
                self._reach(number, peer)
                return
            self._exchange.drop(self.collector, number)
            self._left.discard(known)
        self._rejected.discard(participant)
        set_id = bytes.fromhex(participant.set_id)
        number = self._exchange.add(self.collector, peer, set_id, participant.weight)
        assert number == len(self.participants)
        self.participants.append(participant)
        self._peers.append(peer)
        self._left.add(participant)

    def close(self, participants: tuple[Participant, ...], peers: Mapping[str, bytes]) -> None:
        """Reduce the updates of these participants, in canonical order, and of nobody else.

        Raises:
            StorageError: the version's file can't be made.
        """
        for participant in participants:
            self.offer(participant, peers[participant.site])
        numbers = {self.participants[n]: n for n in self._numbers()}
        self.scratch.remove()  # whatever a killed server left: nothing of this collection is reduced yet
        file, progress = self.scratch.open(self._layout, participants)
        self._exchange.close(
            self.collector,
            [numbers[participant] for participant in participants],
            file.file,
            file.data_offset,
            progress,
        )
        self.file = file
        self.started = time.monotonic()
        self._left = set(participants)

    def _numbers(self) -> list[int]:
        """Return the numbers of the sources that are not dropped."""
        latest = {participant: number for number, participant in enumerate(self.participants)}
        return [number for participant, number in latest.items() if participant in self._left]

    def _reach(self, number: int, peer: bytes) -> None:
        """Ask a participant anew if it is known under another address, or was gone."""
        site = self.participants[number].site
        if peer != self._peers[number] or site in self._away:
            self._peers[number] = peer
            self._exchange.retry(self.collector, number, peer)
            self._away.discard(site)

    def source(self, number: int) -> Participant | None:
        """Return whose update a source of the collector is; None if it was dropped."""
        return self.participants[number] if number in self._numbers() else None

    def reject(self, participant: Participant) -> None:
        """Note that a participant's update is invalid."""
        self._rejected.add(participant)

    def lost(self, site: str) -> None:
        """Note that a site is gone: should it come back, it is asked anew, and its silence begins anew."""
        self._away.add(site)

    def narrow(self, participants: tuple[Participant, ...], peers: Mapping[str, bytes]) -> bool:
        """Go on with these participants alone; False, and nothing done, if they are not among those it has.

        The chunks that are here of them are kept; those of the others count no longer.
        """
        if not set(participants) <= self._left - self._rejected:
            return False
        for number in self._numbers():
            participant = self.participants[number]
            if participant not in participants:
                self._exchange.drop(self.collector, number)
            elif participant.site in peers:
                self._reach(number, peers[participant.site])
        self._left = set(participants)
        self._away.clear()
        return True

    def finish(self) -> tuple[ModelFile, list[int]]:
        """Let go of the collector, which is done, and write the file back to the device.

        Returns the model and the checksums of its chunks.
        """
        assert self.file is not None
        self._exchange.cancel(self.collector)
        self.file.file.sync()
        return self.file, self.collector.checksums

    def cancel(self) -> None:
        """Stop pulling and remove the scratch files."""
        self._exchange.cancel(self.collector)
        self.scratch.remove()
