"""Two dictionaries from Debian packages: FOLDOC (computing) and The Devil's Dictionary (satire).

Nothing is installed: ``apt-get download`` fetches one package, its SHA-256 is checked, and its two data files
are read out of it. The format is that of dictd: gzip, and an index of words with offset and length in base-64
digits.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedcore.demo.assets import AssetError
from fedcore.demo.causal import Exchange

__all__ = ["DEVIL", "FOLDOC", "Dictionary", "read_dictionary"]

_DIGITS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_LEAST_WORDS: Final = 8


@dataclass(frozen=True)
class Dictionary:
    """A pinned package, the stem of its data files, and how an entry becomes a question and an answer."""

    package: str
    version: str
    archive: str
    sha256: str
    stem: str
    licence: str
    exchange: Callable[[str], Exchange | None]


def _computing(entry: str) -> Exchange | None:
    head, _, body = entry.partition("\n")
    body = re.sub(r"<[a-z ,]+>", "", body)
    body = re.sub(r"\[[^\]]*\]|\(\d{4}-\d\d-\d\d\)", "", body).replace("{", "").replace("}", "")
    return _exchange(f'What does "{head.strip()}" mean in computing?', body)


def _satire(entry: str) -> Exchange | None:
    found = re.match(r"\s*([A-Z][A-Z' -]+),\s+[a-z.]+\s+(.*?)(?:\n\s*\n|$)", entry, re.DOTALL)
    if found is None:
        return None
    return _exchange(f'What does "{found[1].lower()}" mean?', found[2])


def _exchange(question: str, answer: str) -> Exchange | None:
    words = answer.split()
    return Exchange(question, " ".join(words)) if len(words) >= _LEAST_WORDS else None


FOLDOC: Final = Dictionary(
    package="dict-foldoc",
    version="20230119-1",
    archive="dict-foldoc_20230119-1_all.deb",
    sha256="745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3",
    stem="foldoc",
    licence="GFDL-1.3",
    exchange=_computing,
)
DEVIL: Final = Dictionary(
    package="dict-devil",
    version="1.0-13.1",
    archive="dict-devil_1.0-13.1_all.deb",
    sha256="6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
    stem="devil",
    licence="public domain",
    exchange=_satire,
)


def read_dictionary(dictionary: Dictionary, cache: Path) -> list[Exchange]:
    """Return the usable entries of a dictionary, fetched on first use, in the order of its index.

    Raises:
        AssetError: it could not be fetched, or is not what was expected.
    """
    files = _unpack(_fetch(dictionary, cache))
    text = gzip.decompress(files[f"{dictionary.stem}.dict.dz"])
    index = files[f"{dictionary.stem}.index"].decode()
    found: dict[str, Exchange] = {}
    for entry in _entries(text, index):
        exchange = dictionary.exchange(entry)
        if exchange is not None:
            found.setdefault(exchange.prompt.casefold(), exchange)
    return list(found.values())


def _fetch(dictionary: Dictionary, cache: Path) -> Path:
    archive = cache / "archives" / dictionary.archive
    if not archive.is_file():
        archive.parent.mkdir(parents=True, exist_ok=True)
        command = ["apt-get", "download", f"{dictionary.package}={dictionary.version}"]
        with tempfile.TemporaryDirectory(dir=cache) as work:
            try:
                done = subprocess.run(
                    command, cwd=work, capture_output=True, text=True, check=False
                )
                said = done.stderr.strip()
            except FileNotFoundError:
                said = "there is no apt-get"
            fetched = Path(work) / dictionary.archive
            if not fetched.is_file():
                raise AssetError(
                    f"{dictionary.package} {dictionary.version} could not be downloaded: {said}\n"
                    f"Get it on a Debian system with: {' '.join(command)}\n"
                    f"and copy {dictionary.archive} to {archive.parent}"
                )
            fetched.replace(archive)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != dictionary.sha256:
        raise AssetError(
            f"{archive} is not the expected package: SHA-256 {digest}, expected {dictionary.sha256}; remove it"
        )
    return archive


def _unpack(archive: Path) -> dict[str, bytes]:
    """Return the regular files of a Debian package (an ar archive around a tar archive) by their last names."""
    raw = archive.read_bytes()
    at = 8
    while at + 60 <= len(raw):
        name = raw[at : at + 16].decode().strip().rstrip("/")
        size = int(raw[at + 48 : at + 58])
        if name.startswith("data.tar"):
            with tarfile.open(fileobj=io.BytesIO(raw[at + 60 : at + 60 + size])) as tar:
                return {
                    Path(member.name).name: file.read()
                    for member in tar
                    if member.isfile() and (file := tar.extractfile(member)) is not None
                }
        at += 60 + size + size % 2
    raise AssetError(f"{archive} holds no data archive")


def _entries(text: bytes, index: str) -> Iterator[str]:
    places = set()
    for line in index.splitlines():
        word, offset, length = line.split("\t")
        if not word.startswith(("00database", "00-database")):
            places.add((_number(offset), _number(length)))
    for start, size in sorted(places):
        yield text[start : start + size].decode("utf-8", errors="replace")


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _DIGITS.index(digit)
    return value
