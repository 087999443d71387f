"""The folders ``best/``, ``final/`` and ``ema/``: a model under the name that loaders expect, and its files."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedcore.errors import IntegrityError
from fedcore.files.opening import weights_name
from fedcore.replacing import sync_folder

from .average import write_average
from .files import ABOUT, Files, about_export, keep_additions, new_and_old, remove_export
from .integrity import verify_model
from .journal import storing
from .readme import README, readme

__all__ = ["Committed", "write_durably", "write_export"]

_WRITE: Final = 0o222


@dataclass(frozen=True)
class Committed:
    """A committed version: its file, and over what chunks its checksum was recorded."""

    version: int
    path: Path
    checksum: str
    chunk_bytes: int


def write_durably(path: Path, text: str) -> None:
    """Write a text file and synchronise it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_export(
    files: Files,
    name: str,
    source: Committed,
    cards: Mapping[str, str],
    average: Path | None = None,
) -> Path:
    """Write ``name/`` from a version's model; what somebody has added to the folder before stays in it.

    The folder is built beside the old one and takes its place by a rename. Its model is read to the end before,
    and compared with the recorded checksum.

    Args:
        files: the run folder's paths.
        name: ``best``, ``final`` or ``ema``.
        source: the version.
        cards: texts by name, which lie beside the model.
        average: a state of the version, as `write_average` takes it, which was compared with its checksum; None:
            the model is the version's.

    Raises:
        IntegrityError: the model is not the one that was committed, or the folder is not of this run.
        StorageError: it can't be written.
    """
    target = files.folder / name
    new, old = (files.folder / n for n in new_and_old(name))
    if os.path.lexists(target) and about_export(target).get("run_id") not in files.journal.run_ids:
        raise IntegrityError(
            f"{target} is not of this run: move it away and start the server again"
        )
    for path in (new, old):
        if os.path.lexists(path):
            if not files.is_own_export(path):
                files.refuse_existing(path.name)
            remove_export(path)
    with storing(target):
        new.mkdir()
        about = {"run_id": files.journal.run_id, "version": source.version}
        write_durably(new / ABOUT, json.dumps(about) + "\n")  # first: whose folder it is
        model = new / weights_name(cards)
        _place_model(new, model, source, average)
        about_model = readme(
            cards, source.version, files.journal.run_id, averaged=average is not None
        )
        for file, text in {**cards, README: about_model}.items():
            write_durably(new / file, text)
        sync_folder(new)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        if old.exists():
            keep_additions(old, target)
        sync_folder(files.folder)
        if old.exists():
            remove_export(old)
    return target


def _place_model(new: Path, model: Path, source: Committed, average: Path | None) -> None:
    """Put the model into the new folder, which goes if the version's file is not the one that was committed."""
    try:
        if average is None:
            _link_or_copy(source.path, model)
        of = model if average is None else source.path
        verify_model(of, source.checksum, source.chunk_bytes)
    except IntegrityError as error:
        remove_export(new)
        raise IntegrityError(str(error).replace(str(model), str(source.path), 1)) from None
    if average is not None:
        write_average(model, source.path, average)


def _link_or_copy(source: Path, target: Path) -> None:
    """Give a version's file a second name, where nobody can write to it by either; else copy it.

    Programs that save a model, such as ``save_pretrained``, open the file that is there and write into it. Without
    write permission they fail, and the version stays as it was committed.
    """
    try:
        mode = source.stat().st_mode
        os.link(source, target)
        target.chmod(stat.S_IMODE(mode) & ~_WRITE)
    except FileNotFoundError:
        raise IntegrityError(f"{source} is missing") from None
    except OSError:
        target.unlink(missing_ok=True)
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
