"""A site's update as encoded chunks, and what the encoding lost, carried into the next one.

A lossy encoding acts on the difference to the global model. What it loses is kept as a residual and added to
the next update (error feedback: Seide et al. 2014, section 3; Karimireddy et al. 2019, algorithm 2), so that
nothing is lost for good. The residual changes only once the server has said that the update counts: of one
that was dropped nothing was sent as far as the global model is concerned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedcore._core import Codec, Layout, MappedFile, crc32c, encode_update
from fedcore.errors import ConfigError
from fedcore.model_file import ModelFile

__all__ = ["EncodedUpdate", "ResidualState", "UpdateEncoder", "can_pack"]


@functools.cache
def can_pack() -> bool:
    """Return whether chunks can be compressed and unpacked here: that needs the package lz4."""
    try:
        Codec(Layout([("probe", "U8", [1])]), "raw", True)
    except ConfigError:
        return False
    return True


@dataclass(frozen=True)
class EncodedUpdate:
    """An update as `Exchange.publish_encoded` takes it.

    Attributes:
        file: holds the chunks back to back.
        offsets: chunk i is bytes ``offsets[i]`` to ``offsets[i + 1]`` of the file.
        encodings: one byte per chunk.
        checksums: CRC-32C of each chunk.
        found, decoded: of each stage, what it measured of the differences before it, and of what the receiver
            decodes; of ``clip`` the norm. 0 where a stage does not measure.
        stages: the names of the stages.
    """

    file: MappedFile
    offsets: list[int]
    encodings: bytes
    checksums: list[int]
    found: list[float] = field(default_factory=list)
    decoded: list[float] = field(default_factory=list)
    stages: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """How many bytes travel, without headers."""
        return self.offsets[-1] - self.offsets[0]

    @classmethod
    def raw(cls, file: ModelFile, checksums: list[int] | None = None) -> EncodedUpdate:
        """Return a canonical model file as raw chunks; ``checksums`` are those that `fill` gave."""
        first, total, step = file.data_offset, file.layout.total_bytes, file.layout.chunk_bytes
        offsets = [*range(first, first + total, step), first + total]
        return cls(file.file, offsets, bytes(len(offsets) - 1), checksums or file.checksums())


@dataclass(frozen=True)
class ResidualState:
    """Which of the two residual files counts: what another process needs to go on with them.

    Attributes:
        now: the file, 0 or 1, that holds what earlier rounds lost.
        at_stake: the round whose update the other file belongs to, if that is not settled.
        checksums: CRC-32C of each file; None of one that was never written.
    """

    now: int = 0
    at_stake: int | None = None
    checksums: tuple[int | None, int | None] = (None, None)


class UpdateEncoder:
    """Encodes one site's updates, round after round, and keeps the residual; one thread at a time.

    Needs files of up to three times the update's size, and memory for a few chunks.

    Attributes:
        state: of the residual; changes with each call.
    """

    def __init__(
        self,
        layout: Layout,
        encoding: str,
        *,
        lossless: bool = False,
        top_k: float = 0.01,
        make_file: Callable[[str, int], MappedFile] | None = None,
        resume: ResidualState | None = None,
        threads: int = 1,
        stages: Sequence[tuple[str, Mapping[str, float]]] = (),
    ) -> None:
        """Make files by ``make_file(name, size)``; without it they are memory.

        With ``resume`` it is to give the files ``residual-0`` and ``residual-1`` as an earlier process left them.
        The bytes are the same with any number of ``threads``; each above the first needs a chunk of memory or two.
        ``stages`` change the difference to the global model before it is encoded: name and options of each, in
        their order. ``clip``: the Euclidean norm of what the receiver decodes is at most ``norm``. ``limit``: no
        element changes by more than ``most``, before the encoding rounds.

        Raises:
            ConfigError: the encoding or a stage is unknown, ``top_k`` is not in (0, 1], a stage's options are not
                its own or out of range, or ``lossless`` lacks lz4.
            StorageError: the disk is full.
        """
        self._layout = layout
        self._codec = Codec(layout, encoding, lossless, top_k, stages)
        self._lossy = encoding != "raw"
        self._threads = threads
        self._stages = tuple(name for name, _ in stages)
        self._make_file = make_file
        self._encoded = self._temporary("encoded")
        names = ("residual-0", "residual-1") if self._lossy else ()
        self._residuals = [self._temporary(name) for name in names]
        self.state = resume or ResidualState()

    def encode(
        self, round_: int, values: MappedFile, values_at: int, base: MappedFile, base_at: int
    ) -> EncodedUpdate:
        """Encode values - base + residual, where the flat bytes begin at ``values_at`` and ``base_at``.

        What an earlier call returned is overwritten: withdraw it first. An update that was not settled
        counts as not included.

        Raises:
            NonFiniteError: the update holds NaN or infinity; tensor and element are named.
            StorageError: the disk is full.
        """
        state = self.state
        self.state = replace(state, at_stake=None)
        offsets, encodings, checksums, lost, found, decoded = encode_update(
            self._codec,
            values,
            values_at,
            base,
            base_at,
            self._encoded,
            self._residuals[state.now] if self._lossy else None,
            self._residuals[1 - state.now] if self._lossy else None,
            self._threads,
        )
        sums = (lost, state.checksums[1]) if state.now else (state.checksums[0], lost)
        self.state = ResidualState(state.now, round_, sums)
        return EncodedUpdate(
            self._encoded, offsets, encodings, checksums, found, decoded, self._stages
        )

    def settle(self, round_: int, *, included: bool) -> None:
        """Say whether the update of a round counts; of any round but the last one it changes nothing."""
        if round_ == self.state.at_stake:
            now = 1 - self.state.now if included else self.state.now
            self.state = replace(self.state, now=now, at_stake=None)

    def is_whole(self) -> bool:
        """Return whether the residual that counts is the one that ``state`` tells of; reads all of it."""
        expected = self.state.checksums[self.state.now]
        if expected is None:
            return False
        file, found = self._residuals[self.state.now], 0
        for index in range(self._layout.chunk_count):
            at, nbytes = self._layout.chunk_range(index)
            found = crc32c(file.view(at, nbytes), found)
            file.release(at, nbytes)
        return found == expected

    def _temporary(self, name: str) -> MappedFile:
        nbytes = self._layout.total_bytes
        return (
            MappedFile.anonymous(nbytes)
            if self._make_file is None
            else self._make_file(name, nbytes)
        )
