"""What leaves a site: its update, in the encoding that the run agreed on."""

from __future__ import annotations

import logging
import os
from typing import Final

from fedcore import protocol
from fedcore._core import Layout, MappedFile
from fedcore.encoding import EncodedUpdate, ResidualState, UpdateEncoder, can_pack
from fedcore.errors import NonFiniteError
from fedcore.model_file import ModelFile

from .work import WorkFolder

__all__ = ["Outgoing"]

logger = logging.getLogger("fedcore.client")

_MOST_THREADS: Final = 4
"""More than memory has the bandwidth for on most machines."""


class Outgoing:
    """Encodes one site's updates and keeps what the encoding lost of them for the next one.

    Args:
        layout: of every update.
        transfer: what the run agreed on.
        work: holds the encoded chunks and the residual, up to three times the update's size, also for a process
            that is started again.
        site: its name, for the log.
        clip: the largest norm of an update (`SiteSettings`).
    """

    def __init__(
        self,
        layout: Layout,
        transfer: protocol.Transfer,
        work: WorkFolder,
        site: str = "",
        clip: float | None = None,
    ) -> None:
        self._layout = layout
        self._site = site
        self._clip = clip
        self._transfer = transfer
        self._work = work
        self._encoder: UpdateEncoder | None = None
        self._lossless = transfer.lossless and can_pack()
        if transfer.lossless and not self._lossless:
            logger.warning(
                "chunks leave this site uncompressed: the package lz4 is missing (it comes with "
                "fedcore-fl[lossless])"
            )
        if clip is not None:
            logger.info("%s: the norm of each update is at most %g (FEDCORE_CLIP)", site, clip)

    def initial(self, file: ModelFile, checksums: list[int]) -> EncodedUpdate:
        """Return the initial model as it is to be published: there is no base, so it is compressed at most."""
        if not self._lossless:
            return EncodedUpdate.raw(file, checksums)
        encoder = self._make("raw", None, bounded=False)
        return encoder.encode(0, file.file, file.data_offset, file.file, file.data_offset)

    def prepare(self, included: int | None) -> None:
        """Make the files that `encode` needs, so that a lack of room is found before there is an update.

        Args:
            included: as `encode` takes it.
        """
        if self.encodes and self._encoder is None:
            self._encoder = self._resume(self._transfer.update, included)

    @property
    def layout(self) -> Layout:
        """Of every update."""
        return self._layout

    @property
    def encodes(self) -> bool:
        """Whether updates are more than their tensors as they are; only then `encode` looks at the base."""
        return self._transfer.update != "raw" or self._lossless or self._clip is not None

    def encode(
        self,
        round_: int,
        file: ModelFile,
        checksums: list[int],
        base: ModelFile,
        included: int | None,
    ) -> EncodedUpdate:
        """Return the update in ``file`` as it is to be published; what was returned before is overwritten.

        An update with NaN or infinity stays raw, so that the server names tensor and element. With a bound on its
        norm it does not leave.

        Args:
            round_, file, base: the round, the tensors after training, and the global model before it.
            checksums: of the file's chunks.
            included: the last committed version that holds this site's update: its residual counts from now on.

        Raises:
            NonFiniteError: the update holds NaN or infinity, and its norm is bounded.
        """
        encoding = self._transfer.update
        if not self.encodes:
            return EncodedUpdate.raw(file, checksums)
        self.prepare(included)
        encoder = self._encoder
        assert encoder is not None
        if included is not None:
            encoder.settle(included, included=True)
        if encoding != "raw":  # before the file that does not count is written over
            self._work.record_residual(self._layout, encoder.state)
        try:
            update = encoder.encode(
                round_, file.file, file.data_offset, base.file, base.data_offset
            )
        except NonFiniteError as error:
            if self._clip is not None:
                raise
            logger.warning("this update leaves as it is: %s", error)
            return EncodedUpdate.raw(file, checksums)
        if encoding != "raw":
            self._work.record_residual(self._layout, encoder.state)
        if self._clip is not None and update.found[-1] > self._clip:
            logger.info(
                "%s: the update of round %d had a norm of %.6g; it was scaled, and %.6g leaves (FEDCORE_CLIP)",
                self._site, round_, update.found[-1], update.decoded[-1],
            )  # fmt: skip
        return update

    def _resume(self, encoding: str, included: int | None) -> UpdateEncoder:
        """Return an encoder that goes on with the residual of an earlier process, if there is a whole one."""
        state = None if encoding == "raw" else self._work.residual(self._layout)
        if state is not None:
            encoder = self._make(encoding, state)
            if included is not None:
                encoder.settle(included, included=True)
            if encoder.is_whole():
                return encoder
            if encoder.state.checksums[encoder.state.now] is not None:
                logger.warning("what earlier updates lost to their encoding is not here any more")
        return self._make(encoding, None)

    def _make(
        self, encoding: str, state: ResidualState | None, *, bounded: bool = True
    ) -> UpdateEncoder:
        def file(name: str, nbytes: int) -> MappedFile:
            again = state is not None and name.startswith("residual")
            return self._work.flat(name, nbytes, again=again)

        return UpdateEncoder(
            self._layout,
            encoding,
            lossless=self._lossless,
            top_k=self._transfer.top_k,
            make_file=file,
            resume=state,
            threads=_threads(),
            stages=[("clip", {"norm": self._clip})] if bounded and self._clip is not None else [],
        )


def _threads() -> int:
    """Return how many threads encode while the script waits: a core each, unless its libraries may use fewer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(_MOST_THREADS, cores or 1, int(asked) if asked.isdecimal() else cores or 1))
