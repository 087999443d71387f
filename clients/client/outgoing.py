"""What leaves a site: its update, in the encoding that the run agreed on."""

from __future__ import annotations

import logging
from collections.abc import Callable

from fedcore import protocol
from fedcore._core import Layout, MappedFile
from fedcore.encoding import EncodedUpdate, UpdateEncoder, can_pack
from fedcore.errors import NonFiniteError
from fedcore.layout import ModelFile

__all__ = ["Outgoing"]

logger = logging.getLogger("fedcore.client")


class Outgoing:
    """Encodes one site's updates and keeps what the encoding lost of them for the next one.

    The residual lives as long as the process: a site that is started again begins without one.

    Args:
        layout: of every update.
        make_file: gives a scratch file of a name and a size; up to three of the update's size are made.
    """

    def __init__(self, layout: Layout, make_file: Callable[[str, int], MappedFile]) -> None:
        self._layout = layout
        self._make_file = make_file
        self._encoder: UpdateEncoder | None = None
        self._warned = False

    def settle(self, included: int | None) -> None:
        """Say which committed version last held this site's update; its residual counts from now on."""
        if self._encoder is not None and included is not None:
            self._encoder.settle(included, included=True)

    def encode(
        self, transfer: protocol.Transfer, round_: int, file: ModelFile, base: ModelFile | None
    ) -> EncodedUpdate:
        """Return the update in ``file`` as it is to be published; what was returned before may be overwritten.

        The initial model has no ``base``: it is compressed at most. An update with NaN or infinity stays raw, so
        that the server names tensor and element.
        """
        lossless = transfer.lossless and can_pack()
        if transfer.lossless and not lossless and not self._warned:
            self._warned = True
            logger.warning(
                "chunks leave this site uncompressed: the package lz4 is missing (it comes with "
                "fedcore-fl[lossless])"
            )
        scheme = "raw" if base is None else transfer.update
        if scheme == "raw" and not lossless:
            return EncodedUpdate.raw(file)
        if base is None:
            encoder = self._make(scheme, transfer.top_k, lossless)
        else:
            encoder = self._encoder = self._encoder or self._make(scheme, transfer.top_k, lossless)
        under = base or file
        try:
            return encoder.encode(
                round_, file.file, file.data_offset, under.file, under.data_offset
            )
        except NonFiniteError as error:
            logger.warning("this update leaves as it is: %s", error)
            return EncodedUpdate.raw(file)

    def _make(self, scheme: str, top_k: float, lossless: bool) -> UpdateEncoder:
        return UpdateEncoder(
            self._layout, scheme, lossless=lossless, top_k=top_k, make_file=self._make_file
        )
