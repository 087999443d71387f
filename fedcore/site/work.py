"""A site's work folder: the file of the global model, and the update until its round is over.

The update and a small record of what it is lie in ``ROOT/SITE/RUN_ID``, so that a process that is started again
finds them and need not train again. The record is written last, by rename, and goes before the file is written
over. Neither is forced to the device: what a power failure leaves is found out by its checksum.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from fedcore import protocol
from fedcore._core import Layout, MappedFile, crc32c
from fedcore.encoding import EncodedUpdate, ResidualState
from fedcore.errors import StorageError
from fedcore.layout import layout_hash, table
from fedcore.model_file import ModelFile, Reader, create_model, open_model

from .folder_lock import FolderLock
from .memory import available_memory

__all__ = ["TRAINER", "Kept", "Record", "WorkFolder"]

TRAINER: Final = "trainer-"
"""How the folders begin in which an adapter keeps the state of its trainer."""

_ENCODED: Final = "encoded"
_SHARE: Final = 8  # of the memory that is available, what the global model may take

logger = logging.getLogger("fedcore.client")

_T = TypeVar("_T", ModelFile, MappedFile)


class Record(BaseModel):
    """What the update file beside it holds, and for what.

    Attributes:
        ready: the announcement that it is offered with; its round, layout, weight and set id are the update's.
        checksum: CRC-32C over those of the chunks that travel.
        lengths, encodings: of the chunks of an encoded update, which lie back to back in a file of their own; the
            encodings in hex. None of an update that travels as it is.
        score: what this site has said of the model that it trained from.
        base: the checksum of that model; empty where the server did not say.
        clip: the bound of the update's norm (`SiteSettings`).
        of: the hash of the layout of the model, where the update holds a part of it; else empty.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, ser_json_inf_nan="constants"
    )

    format: Literal[2] = 2
    run_id: protocol.SetId
    site: protocol.SiteName
    ready: protocol.Ready
    checksum: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}$")]
    lengths: list[Annotated[int, Field(ge=1, le=protocol.MAX_CHUNK_BYTES)]] | None = None
    encodings: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2})*$")] = ""
    score: protocol.Score | None = None
    base: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{8})?$")] = ""
    clip: Annotated[float, Field(gt=0)] | None = None
    of: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")] = ""


class ResidualRecord(BaseModel):
    """Which of the residual files beside it counts; `ResidualState` tells of the fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal[1] = 1
    layout_hash: protocol.LayoutHash
    now: Annotated[int, Field(ge=0, le=1)]
    at_stake: protocol.Round | None
    checksums: Annotated[
        list[Annotated[int, Field(ge=0, lt=1 << 32)] | None], Field(min_length=2, max_length=2)
    ]


class Kept:
    """An update that an earlier process of this site has trained."""

    def __init__(self, record: Record, update: EncodedUpdate) -> None:
        self.record = record
        self.update = update


class WorkFolder:
    """One process's files. `forget` may be called from any thread, the rest from the one that trains.

    Args:
        root: where sites have their folders; None: a temporary one, or memory; nothing is kept.
        site, run_id: whose folder.

    Raises:
        StorageError: the folder can't be made.
    """

    def __init__(self, root: Path | None, site: str, run_id: str) -> None:
        self._site, self._run_id = site, run_id
        self._changing = threading.Lock()
        self._recorded = ""
        self._files: dict[str, ModelFile] = {}
        self._in_memory: set[str] = set()
        self._lock: FolderLock | None = None
        self.folder: Path | None = None
        if root is not None:
            self._take(root.absolute())
        self.keeps = self._lock is not None
        if not self.keeps:
            self._make_temporary(root)

    def _make_temporary(self, root: Path | None) -> None:
        """Use a folder that goes with this process, or memory alone where no folder can be written."""
        with contextlib.suppress(OSError):
            self.folder = Path(tempfile.mkdtemp(prefix="fedcore-", dir=root))

    def _take(self, root: Path) -> None:
        folder = root / self._site / self._run_id
        try:
            self._lock = FolderLock.take(folder)
            if self._lock is None:
                logger.warning(
                    "%s: another process uses %s; what this one trains is not kept should it be killed",
                    self._site, folder,
                )  # fmt: skip
                return
            _remove_others(folder)
        except OSError as error:
            if self._lock is not None:
                self._lock.release()
            raise StorageError(
                f"cannot use the work folder {folder}: {error.strerror or error}; set FEDCORE_WORK to a folder "
                "that can be written"
            ) from None
        self.folder = folder

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / name

    @property
    def _record_path(self) -> Path:
        return self._path("update.json")

    @property
    def _residual_path(self) -> Path:
        return self._path("residual.json")

    def received(self, layout: Layout) -> ModelFile:
        """Return the place for the global model, the same in every round. It goes with the process.

        It is in memory where it takes a small share of what is there, else in a file.
        """
        if "global" not in self._files and layout.total_bytes <= available_memory() // _SHARE:
            self._files["global"] = create_model(None, layout)
        return self._file("global", layout, keep=False)

    def part(self, layout: Layout, read: Reader) -> ModelFile:
        """Return the part of the global model that an update is a change of, which ``read`` gives.

        It goes with the process.
        """
        file = self._file("part", layout, keep=False)
        file.fill(read)
        return file

    def update(self, layout: Layout) -> ModelFile:
        """Return the file for an update, the same in every round; what was recorded of it is forgotten."""
        self.forget()
        return self._file("update", layout, keep=self.keeps)

    def reserve(self, layout: Layout) -> None:
        """Make room for an update now, before it is trained; what is recorded of one of this layout stays.

        Raises:
            StorageError: neither the folder nor memory has room for it.
        """
        self._file("update", layout, keep=self.keeps)

    def flat(self, name: str, nbytes: int, *, again: bool = False) -> MappedFile:
        """Return a new file of zeros, or with ``again`` the one that an earlier process left.

        Encoded chunks and residuals stay for a process that is started again. Where the folder has no room, they
        are in memory.

        Raises:
            StorageError: memory has no room either.
        """
        path = None if self.folder is None else self._path(name)
        if path is not None and again and path.is_file() and path.stat().st_size == nbytes:
            return MappedFile.open(str(path), writable=True)
        file = self._in_folder(name, path, nbytes, lambda path: MappedFile.create(path, nbytes))
        if file is None:
            return MappedFile.anonymous(nbytes)
        if path is not None and not self.keeps:
            path.unlink()
        return file

    def _in_folder(
        self, name: str, path: Path | None, nbytes: int, make: Callable[[str], _T]
    ) -> _T | None:
        """Make a new file, or return None where it must be in memory: there is no folder, or no room in it.

        Raises:
            StorageError: memory has no room either.
        """
        problem = "there is no folder that can be written"
        if path is not None:
            path.unlink(missing_ok=True)
            try:
                return make(str(path))
            except StorageError as error:
                path.unlink(missing_ok=True)
                problem = str(error)
        if nbytes > available_memory():
            raise StorageError(
                f"{problem}; {nbytes:,} bytes are needed, and memory has no room for them either: set "
                "FEDCORE_WORK to a folder with more room"
            )
        self._in_memory.add(name)
        if path is not None:
            logger.warning(
                "%s: %s; it is kept in memory (%d bytes) and lost if this process is killed: set "
                "FEDCORE_WORK to a folder with more room",
                self._site, problem, nbytes,
            )  # fmt: skip
        return None

    def record_residual(self, layout: Layout, state: ResidualState) -> None:
        """Note which residual counts."""
        if not self.keeps or self._in_memory & {"residual-0", "residual-1"}:
            return
        record = ResidualRecord(
            layout_hash=layout_hash(layout),
            now=state.now,
            at_stake=state.at_stake,
            checksums=list(state.checksums),
        )
        path = self._residual_path
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(record.model_dump_json(), encoding="utf-8")
            partial.rename(path)
        except OSError as error:
            logger.warning("%s: what its encoding lost is not kept: %s", self._site, error)

    def residual(self, layout: Layout) -> ResidualState | None:
        """Return what an earlier process noted of its residual; what it noted of other tensors is not used."""
        path = self._residual_path
        if not self.keeps or not path.exists():
            return None
        try:
            record = ResidualRecord.model_validate_json(path.read_bytes())
        except (OSError, ValueError):
            logger.warning("%s: a kept residual is not used: its record is damaged", self._site)
            return None
        if record.layout_hash != layout_hash(layout):
            return None
        first, second = record.checksums
        return ResidualState(record.now, record.at_stake, (first, second))

    def _file(self, name: str, layout: Layout, *, keep: bool) -> ModelFile:
        """Overwriting a file is far cheaper than a new one, which only another layout needs."""
        before = self._files.get(name)
        if before is not None and table(before.layout) != table(layout):
            before = None
            if name == "update":
                self.forget()
        if before is None:
            path = None if self.folder is None else self._path(f"{name}.safetensors")
            made = self._in_folder(
                name, path, layout.total_bytes, lambda path: create_model(path, layout)
            )
            self._files[name] = made if made is not None else create_model(None, layout)
            if made is not None and path is not None and not keep:
                path.unlink()
        return self._files[name]

    def record(
        self,
        ready: protocol.Ready,
        update: EncodedUpdate,
        score: protocol.Score | None,
        *,
        base: str = "",
        clip: float | None = None,
        of: str = "",
    ) -> None:
        """Note that the update file is complete; of one that is in memory nothing is noted.

        ``base`` is the checksum of the model that it was trained from, ``clip`` the bound of its norm. ``of`` is
        the hash of the model's layout, where the update holds a part of it.
        """
        encoded = any(update.encodings) or update.offsets[0] == 0
        if not self.keeps or (_ENCODED if encoded else "update") in self._in_memory:
            return
        record = Record(
            run_id=self._run_id,
            site=self._site,
            ready=ready,
            checksum=_checksum(update.checksums),
            lengths=[b - a for a, b in pairwise(update.offsets)] if encoded else None,
            encodings=update.encodings.hex() if encoded else "",
            score=score,
            base=base,
            clip=clip,
            of=of,
        )
        partial = self._record_path.with_suffix(".partial")
        with self._changing:
            try:
                silent = set() if of else {"of"}  # an earlier version of fedcore reads the others
                partial.write_text(record.model_dump_json(exclude=silent), encoding="utf-8")
                partial.rename(self._record_path)
                self._recorded = ready.model.id
            except OSError as error:
                logger.warning(
                    "%s: the update of round %d is not kept should this process be killed: %s",
                    self._site, ready.round, error,
                )  # fmt: skip

    def forget(self, set_id: str | None = None) -> None:
        """Note that the update file is not needed any more; with ``set_id`` only if it is that set."""
        if not self.keeps:
            return
        with self._changing:
            if set_id is None or set_id == self._recorded:
                self._record_path.unlink(missing_ok=True)
                self._recorded = ""

    def kept(self, task: protocol.Task, chunk_bytes: int, clip: float | None = None) -> Kept | None:
        """Return the update that an earlier process trained for ``task``; one for anything else is removed.

        So is one whose norm was not bounded by ``clip`` or less.
        """
        if not self.keeps or not self._record_path.exists():
            return None
        try:
            found = self._read(task, chunk_bytes, clip)
        except (OSError, ValueError) as error:
            problem = "its record is damaged" if isinstance(error, ValidationError) else str(error)
            logger.warning("%s: a kept update is not used: %s", self._site, problem)
            self.forget()
            for name in ("update.safetensors", _ENCODED):
                self._path(name).unlink(missing_ok=True)
            return None
        self._recorded = found.record.ready.model.id
        return found

    def _read(self, task: protocol.Task, chunk_bytes: int, clip: float | None) -> Kept:
        record = Record.model_validate_json(self._record_path.read_bytes())
        ready = record.ready
        if (record.run_id, record.site) != (self._run_id, self._site):
            raise StorageError(f"it is one of site {record.site} in run {record.run_id}")
        if task.kind not in ("train", "submit") or ready.round != task.round:
            raise StorageError(f"it is for round {ready.round}, which is over")
        layout = task.model.layout if task.model else None
        if (record.of or ready.model.layout) != layout:
            raise StorageError("its tensors are not the run's")
        if record.base and task.checksum and record.base != task.checksum:
            raise StorageError(
                f"the server has another model of round {task.version} by now than the one it was trained from"
            )
        if clip is not None and (record.clip is None or record.clip > clip):
            raise StorageError(f"its norm was not bounded by {clip:g}")
        if record.lengths is not None:
            update = self._read_encoded(record.lengths, record.encodings)
        else:
            file = open_model(self._path("update.safetensors"), chunk_bytes)
            if not file.canonical or layout_hash(file.layout) != ready.model.layout:
                raise StorageError("its tensors are not the run's")
            update = EncodedUpdate.raw(file)
        if _checksum(update.checksums) != record.checksum:
            raise StorageError("its file is damaged (the checksum differs)")
        return Kept(record, update)

    def _read_encoded(self, lengths: list[int], encodings: str) -> EncodedUpdate:
        file = MappedFile.open(str(self._path(_ENCODED)))
        offsets = [0, *accumulate(lengths)]
        if offsets[-1] > file.size or 2 * len(lengths) != len(encodings):
            raise StorageError("its file is damaged (it is too short)")
        checksums = []
        for begin, end in pairwise(offsets):
            checksums.append(crc32c(file.view(begin, end - begin)))
            file.release(begin, end - begin)
        return EncodedUpdate(file, offsets, bytes.fromhex(encodings), checksums)

    def close(self, *, keep: bool) -> None:
        """Remove what is here; with ``keep`` not what is recorded: an update, a residual, a trainer's state."""
        self._files.clear()
        if self.folder is None:
            return
        if not self.keeps:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        recorded = self._record_path.exists() or self._residual_path.exists()
        if not (keep and (recorded or any(self.folder.glob(f"{TRAINER}*")))):
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: other runs are there
                self.folder.parent.rmdir()
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _checksum(checksums: list[int]) -> str:
    return f"{crc32c(b''.join(value.to_bytes(4, 'little') for value in checksums)):08x}"


def _remove_others(folder: Path) -> None:
    """Remove what processes of this site have left of other runs, unless they still run."""
    for other in _folders(folder.parent):
        if other == folder:
            continue
        lock = FolderLock.take(other)
        if lock is not None:
            shutil.rmtree(other, ignore_errors=True)
            lock.release()


def _folders(parent: Path) -> Iterator[Path]:
    return (path for path in list(parent.iterdir()) if path.is_dir())
