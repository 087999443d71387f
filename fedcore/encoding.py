"""A site's update as encoded chunks, and what the encoding lost, carried into the next one.

A lossy encoding acts on the difference to the global model. What it loses is kept as a residual and added to
the next update (error feedback: Seide et al. 2014, section 3; Karimireddy et al. 2019, algorithm 2), so that
nothing is lost for good. The residual changes only once the server has said that the update counts: of one
that was dropped nothing was sent as far as the global model is concerned.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedcore._core import Codec, Layout, MappedFile

__all__ = ["EncodedUpdate", "UpdateEncoder"]


@dataclass(frozen=True)
class EncodedUpdate:
    """Encoded chunks as `Exchange.publish_encoded` takes them.

    Attributes:
        file: holds the chunks back to back.
        offsets: chunk i is bytes ``offsets[i]`` to ``offsets[i + 1]`` of the file.
        encodings: one byte per chunk.
    """

    file: MappedFile
    offsets: list[int]
    encodings: bytes

    @property
    def nbytes(self) -> int:
        """How many bytes travel, without headers."""
        return self.offsets[-1] - self.offsets[0]


class UpdateEncoder:
    """Encodes one site's updates, round after round, and keeps the residual; one thread at a time.

    Needs three times the update's size in ``folder``, and memory for a few chunks.
    """

    def __init__(
        self,
        layout: Layout,
        scheme: str,
        *,
        lossless: bool = False,
        top_k: float = 0.01,
        folder: Path | None = None,
    ) -> None:
        """Prepare scratch files, which are unlinked at once; without a folder they are memory.

        Raises:
            ConfigError: the scheme is unknown, ``top_k`` is not in (0, 1], or ``lossless`` lacks lz4.
            StorageError: a scratch file exists, or the disk is full.
        """
        self._layout = layout
        self._codec = Codec(layout, scheme, lossless, top_k)
        self._lossy = scheme != "raw"
        self._folder = folder
        self._encoded = self._scratch("encoded")
        self._residual = self._scratch("residual") if self._lossy else None
        self._next = self._scratch("residual-next") if self._lossy else None
        self._at_stake: int | None = None

    def encode(
        self, round_: int, values: MappedFile, values_at: int, base: MappedFile, base_at: int
    ) -> EncodedUpdate:
        """Encode values - base + residual, where the flat bytes begin at ``values_at`` and ``base_at``.

        What an earlier call returned is overwritten: withdraw it first. An update that was not settled
        counts as not included.

        Raises:
            NonFiniteError: the update holds NaN or infinity; tensor and element are named.
        """
        self._at_stake = None
        layout, codec = self._layout, self._codec
        decoded = bytearray(min(layout.chunk_bytes, layout.total_bytes))
        offsets, encodings = [0], bytearray()
        for index in range(layout.chunk_count):
            at, nbytes = layout.chunk_range(index)
            local = values.view(values_at + at, nbytes)
            under = base.view(base_at + at, nbytes)
            carried = self._residual.view(at, nbytes) if self._residual else None
            encoding, body = codec.encode(index, local, under, carried)
            if self._next is not None:
                got = memoryview(decoded)[:nbytes]
                codec.decode(index, encoding, body, got, under)
                codec.carry(index, local, carried, got, self._next.view(at, nbytes))
            self._encoded.write(offsets[-1], body)
            offsets.append(offsets[-1] + len(body))
            encodings.append(encoding)
            self._release(at, nbytes)
        self._at_stake = round_
        return EncodedUpdate(self._encoded, offsets, bytes(encodings))

    def settle(self, round_: int, *, included: bool) -> None:
        """Say whether the update of a round counts; of any round but the last one it changes nothing."""
        if round_ != self._at_stake:
            return
        self._at_stake = None
        if included:
            self._residual, self._next = self._next, self._residual

    def _release(self, at: int, nbytes: int) -> None:
        for file in (self._residual, self._next):
            if file is not None and self._folder is not None:
                file.release(at, nbytes)

    def _scratch(self, name: str) -> MappedFile:
        if self._folder is None:
            return MappedFile.anonymous(self._layout.total_bytes)
        path = self._folder / name
        file = MappedFile.create(str(path), self._layout.total_bytes)
        path.unlink()
        return file
