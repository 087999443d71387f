"""One collection: a scratch model file and the core's collector that fills it."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedcore._core import (
    Codec,
    Collector,
    CollectorOptions,
    Exchange,
    Finisher,
    Layout,
    MappedFile,
    Spill,
)
from fedcore.config import RunConfig, TransferSection
from fedcore.errors import StorageError
from fedcore.model_file import ModelFile
from fedcore.rules.registry import CoreRule
from fedcore.server.combining import Combining
from fedcore.server.rounds.actions import Participant
from fedcore.server.storage.scratch import Scratch

__all__ = [
    "Collection",
    "CollectionSetting",
    "Own",
    "kept_free",
    "open_spill",
    "spill_path",
    "update_codec",
]

Own = tuple[Layout, Codec | None]
"""The layout of a site's updates, and what their chunks are decoded with."""

_MOST_AHEAD: Final = 8

logger = logging.getLogger("fedcore.server")


def open_spill(
    config: RunConfig, run_id: str, layout: Layout, state_bytes: int = 0
) -> Spill | None:
    """Return the run's spill file, which takes no room before it is needed, or None if there is to be none.

    Room for the next model with its states and for a copy is left on the disk. What a killed server left there is
    taken up.
    """
    path = spill_path(config, run_id)
    folder = path.parent
    try:
        if not config.server.spill:
            for leftover in (path, path.with_name(path.name + "-index")):
                leftover.unlink(missing_ok=True)
            return None
        folder.mkdir(parents=True, exist_ok=True)
        return Spill(str(path), layout.chunk_bytes, kept_free(layout, state_bytes))
    except (OSError, StorageError) as error:
        logger.warning("sites that are ahead are held back: %s", error)
        return None


def spill_path(config: RunConfig, run_id: str) -> Path:
    """Return where the run's spill file is."""
    return config.spill_folder / f".{run_id}.spill"


def kept_free(layout: Layout, state_bytes: int) -> int:
    """Return how much of its disk the spill file leaves to others: two models, and the states of one."""
    return 2 * layout.total_bytes + state_bytes


def update_codec(transfer: TransferSection, layout: Layout, *, initial: bool) -> Codec | None:
    """Return what updates are decoded with, or None where every chunk must be raw.

    The initial model has no base to be a difference to, so at most it is compressed.
    """
    encoding = "raw" if initial else transfer.update
    if encoding == "raw" and not transfer.lossless:
        return None
    return Codec(layout, encoding, transfer.lossless, transfer.top_k)


@dataclass(frozen=True)
class CollectionSetting:
    """What a collection works with.

    Attributes:
        exchange: the data plane.
        layout: the run's layout.
        scratch: where the version is written.
        memory: what chunks may take.
        base: the current global model, which integers and booleans are taken from and encoded chunks are
            decoded onto; None for the initial one.
        checksums: those of the base's chunks: a chunk of it that has changed ends the collection.
        codec: what encoded chunks are decoded with, as they come; None: all must be raw.
        spill: where chunks wait that came long before they can be reduced; None: they are held back.
        threads: how many chunks are reduced at the same time.
        rule: what combines the updates.
        finisher: what makes the version of that; None: it is rounded.
        plain: names of tensors that keep the mean, whatever the rule is.
        survey: the updates are surveyed, before it is decided which of them count; or they were.
        keep_surveyed: what is surveyed goes to the spill file, as far as there is room.
        own: gives, by the name of a site, the layout of its updates and what they are decoded with; None: all have
            the run's.
        digest_key, digests: the key of the digests of a survey's chunks, and those of the sources of a closed
            collection, if another one surveyed them.
    """

    exchange: Exchange
    layout: Layout
    scratch: Scratch
    memory: int
    base: ModelFile | None = None
    checksums: Sequence[int] = ()
    codec: Codec | None = None
    spill: Spill | None = None
    threads: int = 1
    rule: CoreRule = "mean"
    finisher: Finisher | None = None
    plain: Set[str] = frozenset()
    survey: bool = False
    keep_surveyed: bool = False
    own: Callable[[str], Own] | None = None
    digest_key: bytes = b""
    digests: Sequence[bytes] = ()

    @property
    def options(self) -> CollectorOptions:
        """How a collector of this setting works."""
        return CollectorOptions(
            self.memory,
            write_behind=True,
            spill=self.spill,
            codec=self.codec,
            threads=self.threads,
            base_checksums=self.checksums,
            rule=self.rule,
            finisher=self.finisher,
            plain=self.plain,
            survey=self.survey,
            base_weight=self.scratch.base_weight,
            digest_key=self.digest_key,
            keep_surveyed=self.keep_surveyed,
            aside=self.exchange.wake_fd >= 0,  # else a pump does not learn what another thread did
        )

    @property
    def place(self) -> tuple[MappedFile, int] | None:
        """Where the base's flat bytes lie."""
        return None if self.base is None else (self.base.file, self.base.data_offset)


class Collection:
    """Pulls and reduces the participants' updates into a scratch file.

    It begins open: each update that is offered is pulled ahead, as far as memory and the spill file allow, while
    other sites still train. `close` says whose updates count; they are reduced from then on. Where a participant
    is lost, the collection goes on under `narrow` with what it has of the others.

    Where the setting says so, the updates are surveyed after `close`, and `combine` says then which of them count.
    Those that were surveyed before are combined by a collection that is closed from the start.

    Args:
        setting: what it works with.
        expected: for how many sites memory is divided.
        closed: the participants in canonical order, with their routing ids, where these are known from the start.
    """

    def __init__(
        self,
        setting: CollectionSetting,
        expected: int,
        closed: Mapping[Participant, bytes] | None = None,
    ) -> None:
        self.scratch = setting.scratch
        self.file: ModelFile | None = None
        self.started = time.monotonic()
        self._expected = expected
        self._sources: list[Participant | None] = []  # by the collector's numbers; None: dropped
        self._numbers: dict[str, int] = {}  # of the sources that are not dropped, by site
        self._layout = setting.layout
        self._base = setting.base
        self._exchange = setting.exchange
        self._peers: list[bytes] = []
        self._rejected: set[Participant] = set()
        self._away: set[str] = set()
        self._own = setting.own
        self._survey = setting.survey
        self.digest_key = setting.digest_key
        self._pulled: Counter[str] = Counter()
        if setting.spill is not None:
            setting.spill.begin(self.scratch.key(setting.layout))
        if closed is None:
            self.collector = Collector.open(
                setting.layout, expected, setting.place, setting.options
            )
        else:
            self.collector = self._closed_collector(setting, closed)
        self._exchange.start(self.collector)
        if self.collector.aside:
            Combining(self._exchange, self.collector)

    @classmethod
    def of(
        cls,
        setting: CollectionSetting,
        participants: tuple[Participant, ...],
        peers: Mapping[str, bytes],
    ) -> Collection:
        """Return the collection of these participants, in canonical order, from their routing ids in ``peers``.

        Where a killed server was collecting the same, it goes on with what that one had reduced.
        """
        return cls(setting, len(participants), {p: peers[p.site] for p in participants})

    def _closed_collector(
        self, setting: CollectionSetting, closed: Mapping[Participant, bytes]
    ) -> Collector:
        self._sources, self._peers = list(closed), list(closed.values())
        self._numbers = {known.site: number for number, known in enumerate(closed)}
        self.file, record = setting.scratch.open(setting.layout, tuple(closed))
        collector = Collector(
            setting.layout,
            [(peer, bytes.fromhex(p.set_id), p.weight) for p, peer in closed.items()],
            self.file.file,
            self.file.data_offset,
            setting.place,
            setting.options,
            record=record,
            states=self._state_places(),
            digests=setting.digests,
            own=[] if self._own is None else [self._source_of(p.site) for p in closed],
        )
        reduced, total, here = collector.progress()
        if any(here):
            logger.info(
                "going on where the server was killed: %d of %d chunks are reduced, %d more are here",
                reduced, total, sum(here) - len(here) * reduced,
            )  # fmt: skip
        return collector

    @property
    def open(self) -> bool:
        """Whether updates may still be offered."""
        return self.file is None and not self.surveying

    @property
    def surveying(self) -> bool:
        """Whether it surveys updates, or has done so and waits for `combine`."""
        return self.collector.surveying

    @property
    def participants(self) -> tuple[Participant, ...]:
        """Whose updates it surveys or reduces, in canonical order."""
        return tuple(sorted((known for _, known in self._known()), key=lambda p: p.site))

    def wants(self, site: str) -> bool:
        """Whether another update of a site is pulled ahead; one that makes them without end waits for `close`."""
        return self.open and self._pulled[site] < _MOST_AHEAD

    def offer(self, participant: Participant, peer: bytes) -> bool:
        """Pull an update ahead; what another process of the same site had offered counts no longer.

        Beyond as many sites as expected it takes the place of one whose site is gone. False, and not pulled, where
        there is none: memory is divided among so many.
        """
        number = self._numbers.get(participant.site)
        if number is not None:
            if self._sources[number] == participant and participant not in self._rejected:
                self._reach(number, participant, peer)
                return True
            self._drop(number)
        if len(self._numbers) >= self._expected:
            gone = [self._numbers[site] for site in self._away if site in self._numbers]
            if not gone:
                return False
            self._drop(min(gone))
        self._rejected.discard(participant)
        self._away.discard(participant.site)
        self._pulled[participant.site] += 1
        set_id = bytes.fromhex(participant.set_id)
        layout, _, codec = self._source_of(participant.site)
        number = self._exchange.add(
            self.collector, peer, set_id, participant.weight, layout=layout, codec=codec
        )
        self._numbers[participant.site] = number
        self._sources[number:] = [participant, *self._sources[number + 1 :]]
        self._peers[number:] = [peer, *self._peers[number + 1 :]]
        return True

    def _source_of(self, site: str) -> tuple[Layout | None, None, Codec | None]:
        """Return a site's own layout, base and encoding, as the core takes them; None where they are the run's."""
        if self._own is None:
            return None, None, None
        layout, codec = self._own(site)
        return layout, None, codec

    def close(self, participants: tuple[Participant, ...], peers: Mapping[str, bytes]) -> bool:
        """Reduce the updates of these participants, in canonical order, and of nobody else; or survey them.

        False if they are more than expected: nothing that was pulled ahead is of use then.

        Raises:
            StorageError: the version's file can't be made.
        """
        counted = set(participants)
        for number, known in self._known():
            if known not in counted:
                self._drop(number)
        if not all(
            self.offer(participant, peers[participant.site]) for participant in participants
        ):
            return False
        numbers = {known: number for number, known in self._known()}
        order = [numbers[participant] for participant in participants]
        if self._survey:
            self._exchange.survey(self.collector, order)
        else:
            self._reduce(order, participants)
        self.started = time.monotonic()
        return True

    @property
    def digests(self) -> tuple[bytes, ...]:
        """Those of each participant's chunks, once they are surveyed."""
        return tuple(self.collector.digests(self._numbers[p.site]) for p in self.participants)

    def combine(self, participants: tuple[Participant, ...], base_weight: int) -> None:
        """Reduce the updates of these participants, which were surveyed, with these weights.

        Args:
            participants: they count, in canonical order.
            base_weight: what the version before weighs, as one more update.

        Raises:
            StorageError: the version's file can't be made.
        """
        weighed = {(known.site, known.set_id): known for known in participants}
        numbers = {}
        for number, known in self._known():
            counted = weighed.get((known.site, known.set_id))
            if counted is None:
                self._drop(number)
            else:
                self._sources[number] = counted
                numbers[counted] = number
        self.scratch.base_weight = base_weight
        order = [numbers[participant] for participant in participants]
        self._reduce(order, participants, ([p.weight for p in participants], base_weight))

    def _reduce(
        self,
        order: Sequence[int],
        participants: tuple[Participant, ...],
        weights: tuple[Sequence[int], int] | None = None,
    ) -> None:
        self.scratch.remove()  # whatever a killed server left: nothing of this collection is reduced yet
        file, record = self.scratch.open(self._layout, participants)
        self._exchange.close(
            self.collector,
            order,
            file.file,
            file.data_offset,
            record,
            self._state_places(),
            weights,
        )
        self.file = file

    def _state_places(self) -> dict[str, tuple[MappedFile, int]]:
        """Return where the flat bytes of the version's states are written."""
        return {name: (of.file, of.data_offset) for name, of in self.scratch.states.items()}

    def _known(self) -> list[tuple[int, Participant]]:
        """Return the sources that are not dropped: the collector's number, and whose update it is."""
        return [(number, known) for number, known in enumerate(self._sources) if known is not None]

    def _drop(self, number: int) -> None:
        dropped = self._sources[number]
        assert dropped is not None
        self._exchange.drop(self.collector, number)
        self._sources[number] = None
        del self._numbers[dropped.site]

    def _reach(self, number: int, participant: Participant, peer: bytes) -> None:
        """Ask a participant anew if it is known under another address, or was gone."""
        if peer != self._peers[number] or participant.site in self._away:
            self._peers[number] = peer
            self._exchange.retry(self.collector, number, peer)
            self._away.discard(participant.site)

    def source(self, number: int) -> Participant | None:
        """Return whose update a source of the collector is; None if it was dropped."""
        return self._sources[number]

    def pulls(self) -> dict[str, tuple[int, int]]:
        """Return, of each site, how many chunks it was asked for that have not come, and how many came."""
        found = self._exchange.pulls(self.collector)
        return {known.site: found[number] for number, known in self._known() if number < len(found)}

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
        counted = set(participants)
        if not counted <= {known for _, known in self._known()} - self._rejected:
            return False
        for number, known in self._known():
            if known not in counted:
                self._drop(number)
            elif known.site in peers:
                self._reach(number, known, peers[known.site])
        self._away.clear()
        return True

    def finish(self) -> tuple[ModelFile, list[int]]:
        """Let go of the collector, which is done, and write the files back to the device.

        Returns the model and the checksums of its chunks.
        """
        assert self.file is not None
        self._exchange.cancel(self.collector)
        self.file.file.sync()
        for state in self.scratch.states.values():
            state.file.sync()
        return self.file, self.collector.checksums

    def check_base(self) -> None:
        """Check that the model that updates were added to was readable to its end; call it before `finish`.

        Raises:
            StorageError: it has become shorter, or its disk could not read it.
        """
        if self._base is not None:
            self._base.file.check_whole()

    def cancel(self) -> None:
        """Stop pulling and remove the scratch files."""
        self._exchange.cancel(self.collector)
        self.scratch.remove()
