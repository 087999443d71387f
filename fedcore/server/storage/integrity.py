"""What a model file must hold: the checksum that was recorded when it was committed."""

from __future__ import annotations

from pathlib import Path

from fedcore._core import crc32c
from fedcore.errors import FedcoreError, IntegrityError
from fedcore.layout import DEFAULT_CHUNK_BYTES
from fedcore.model_file import open_model

__all__ = ["checksum_of", "verify_model"]


def checksum_of(checksums: list[int]) -> str:
    """Return one checksum over those of the chunks, in hex."""
    return f"{crc32c(b''.join(value.to_bytes(4, 'little') for value in checksums)):08x}"


def verify_model(path: Path, checksum: str, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> list[int]:
    """Read a committed model file to its end and compare its checksum with the recorded one.

    Returns the CRC-32C of each chunk.

    Raises:
        IntegrityError: the file is missing, can't be read, or is not the one that was committed.
    """
    if not path.is_file():
        raise IntegrityError(f"{path} is missing")
    try:
        model = open_model(path, chunk_bytes)
        checksums = model.checksums() if model.canonical else []
        model.release()
    except FedcoreError as error:
        raise IntegrityError(f"{path} is not the file that this run committed ({error})") from None
    if checksum_of(checksums) != checksum:
        raise IntegrityError(
            f"{path} is not the file that this run committed (its checksum differs)"
        )
    return checksums
