"""The committed models of a run: the last one, which the sites pull, and how the next becomes it."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from fedcore import protocol
from fedcore._core import Codec, Exchange, Layout, MappedFile
from fedcore.config import RunConfig
from fedcore.errors import IntegrityError, LayoutError, StorageError
from fedcore.layout import DEFAULT_CHUNK_BYTES, layout_hash, table
from fedcore.model_file import ModelFile, Reader, create_model, open_model
from fedcore.rules import DEFAULT_RULE
from fedcore.server.storage.hashing import Hasher
from fedcore.server.storage.integrity import checksum_of, verify_model
from fedcore.server.storage.journal import storing
from fedcore.server.storage.store import Store, VersionRow
from fedcore.words import plural

from .factors import Factors
from .first_form import first_form
from .initial import load_initial
from .optimizer import Optimizer
from .roles import Roles
from .rule import rule_of

__all__ = ["Versions", "checksum_of", "declared_layout"]

_TENSOR_BYTES: Final = 1024
"""What a tensor of a declared table takes in memory, at most, while the table is parsed and kept."""

_STATE: Final = "a state of the last model"

logger = logging.getLogger("fedcore.server")


def declared_layout(declare: protocol.Declare, chunk_bytes: int = DEFAULT_CHUNK_BYTES) -> Layout:
    """Return the layout of a site's tensors; LayoutError if they make none."""
    layout = Layout([(n, d, s) for n, d, s in declare.tensors], chunk_bytes)
    if layout.total_bytes == 0:
        raise LayoutError("the declared tensors hold no bytes")
    return layout


class Versions:
    """Holds the last committed model, publishes it, and commits the next.

    Args:
        config, store: the run file, and the run folder.
        exchange: the data plane.
        restrict: makes a set unknown to all but the run's peers.

    Attributes:
        model: the last committed model; None before the first.
        cards: the small text files that describe the model, for the first commit.
        set_id: the id under which ``model`` is published.
        packed_id: the same for sites that can unpack chunks, where the run allows compressing them.
        included: the last version that holds an update of each site.
        roles: which tensors are buffers.
        factors: what an update holds of the model.
        optimizer: what makes the next model, and its states.
    """

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        exchange: Exchange,
        restrict: Callable[[bytes], object] = lambda _: None,
    ) -> None:
        self._restrict = restrict
        self.model: ModelFile | None = None
        self.cards: dict[str, str] = {}
        self.set_id = self.packed_id = b""
        self.included: dict[str, int] = {}
        self.roles = Roles(store)
        self.factors = Factors(config.aggregation, store)
        self._part: tuple[str, ModelFile, list[int]] | None = None
        self.optimizer = Optimizer(config.aggregation, store, self.roles)
        self._config = config
        self._described: tuple[Layout, list[tuple[str, str, list[int]]], str | None] | None = None
        self._store = store
        self._exchange = exchange
        self._checksums: list[int] = []
        self._checksum = ""
        self._hashed: tuple[Layout | None, str] = (None, "")
        self._superseded: ModelFile | None = None
        self._first: tuple[bytes, str] | None = None
        # A model that is to be removed is hashed before: what waits takes disk space.
        behind = 8 if config.server.keep_versions is None else 2
        self._hasher = Hasher(self._moved, behind, store.chunk_bytes)

    # --- the first one of this process ---

    def open_last(self, version: int) -> None:
        """Take up the last committed model.

        Raises:
            IntegrityError: the file is missing, or is not the one that was committed.
        """
        rows = {row.version: row for row in self._store.versions()}
        path = self._store.path(version)
        try:
            checksums = verify_model(path, rows[version].checksum, self._store.chunk_bytes)
        except IntegrityError as error:
            raise IntegrityError(f"{error}; {self._way_back(version)}") from None
        try:
            self.optimizer.open(version)
        except IntegrityError as error:
            way_back = self._way_back(version, _STATE)
            raise IntegrityError(f"{error}; {way_back}") from None
        self.model = open_model(path, self._store.chunk_bytes)
        for missing in self._store.missing():
            logger.warning(
                "%s is missing: the model of round %d can't be selected; put it back from a backup if it matters",
                self._store.path(missing), missing,
            )  # fmt: skip
        for row in rows.values():
            path = self._store.path(row.version)
            if not row.sha256 and path.is_file():
                self._hasher.add(row.version, path, open_model(path).data_offset, row.checksum)
        self._checksums, self._checksum = checksums, rows[version].checksum
        for row in rows.values():
            self.included |= dict.fromkeys(row.participants, row.version)

    def damaged(self, problem: str) -> IntegrityError:
        """Return the error of a last model, or of a state of it, that is no longer what was committed."""
        version = self._store.last_version or 0
        if (of_state := self.optimizer.named(problem)) is not None:
            return IntegrityError(f"{of_state}; {self._way_back(version, _STATE)}")
        # A file is known to the core by the name under which it was written.
        scratch, path = str(self._store.scratch(version)), str(self._store.path(version))
        return IntegrityError(f"{problem.replace(scratch, path)}; {self._way_back(version)}")

    def _way_back(self, version: int, what: str = "the last model") -> str:
        """Return what can be done where the last model, or a state of it, can't be used."""
        earlier = [v for v in range(version) if self._store.path(v).is_file()]
        text = (
            f"it is {what} (round {version}): put it back from a backup and start the server again"
        )
        if not earlier:
            return text
        command = f"fedcore rollback {self._store.folder} {earlier[-1]}"
        return f"{text}, or go back to round {earlier[-1]} ({command})"

    def load_initial(self, path: Path) -> None:
        """Commit the model at ``path`` as version 0.

        Raises:
            ConfigError: the path holds no model, or the server optimizer can't act on it.
        """
        self._store.announce(0, 0)
        self._store.clear(0)
        scratch = self._store.scratch(0)
        if self.factors.ranked:
            model, self.cards = self._load_ranked(path, scratch)
        else:
            model, self.cards = load_initial(
                path, scratch, self.metadata(0), self._store.chunk_bytes
            )
        self.optimizer.finisher(model.layout)  # before anything is committed
        model.file.sync()
        row = VersionRow(0, "", "", model.layout.total_bytes, 0.0, {})
        self._save(row, model, model.checksums(), {})

    def _load_ranked(self, path: Path, scratch: Path) -> tuple[ModelFile, dict[str, str]]:
        """Return the adapter at ``path`` in the form of the global model, and the files that describe that."""
        copy = self._store.models / f".{self._store.run_id}.initial"
        with storing(copy):
            copy.unlink(missing_ok=True)
            first, cards = load_initial(path, copy, {}, self._store.chunk_bytes)
            copy.unlink()
        layout, scales = self.factors.take_file(table(first.layout), cards, str(path))
        model = create_model(scratch, layout, self.metadata(0))
        model.fill(first_form(first, layout, self.factors.pairs, scales))
        return model, self.factors.cards(cards, layout)

    # --- each commit ---

    def commit(
        self,
        row: VersionRow,
        written: tuple[ModelFile, list[int]],
        metrics: Mapping[str, dict[str, float]],
        states: Mapping[str, ModelFile] | None = None,
    ) -> None:
        """Commit a model (with the checksums of its chunks) and its states, and publish it.

        ``row`` says which version it is and who is in it; its checksum is filled in here.
        """
        previous, before = {self.set_id, self.packed_id}, self.model
        self._save(row, *written, metrics, states)
        self.publish()
        if before is not None:
            for set_id in previous:
                self._exchange.withdraw(set_id)
            self._superseded = before

    def _save(
        self,
        row: VersionRow,
        model: ModelFile,
        checksums: list[int],
        metrics: Mapping[str, dict[str, float]],
        states: Mapping[str, ModelFile] | None = None,
    ) -> None:
        states = states or {}
        sums = self.optimizer.checksums(states)
        kept = self.optimizer.rows(states, sums)
        row = replace(row, checksum=checksum_of(checksums), sha256="")
        self._store.commit(row, metrics, self.cards if row.version == 0 else None, kept)
        self.optimizer.take(row.version, states, kept, sums)
        self.model, self._checksums, self._checksum = model, checksums, row.checksum
        self.included |= dict.fromkeys(row.participants, row.version)
        path = self._store.path(row.version)
        self._hasher.add(row.version, path, model.data_offset, row.checksum)

    # --- updates that hold a part of the model ---

    def update_layout(self, version: int) -> Layout:
        """Return the layout of the updates that make a version; the model's own where they hold all of it."""
        assert self.model is not None
        return self.factors.layout(self.model.layout, version)

    def base_of(self, layout: Layout) -> tuple[ModelFile, list[int]]:
        """Return the part of the last model that has this layout, and the checksums of its chunks.

        A part is in a file without a name, which goes with the process.

        Raises:
            IntegrityError: the model is no longer what was committed.
            StorageError: the disk is full.
        """
        assert self.model is not None
        if layout is self.model.layout:
            return self.model, self._checksums
        hash_ = f"{self._checksum} {layout_hash(layout)}"
        if self._part is None or self._part[0] != hash_:
            self._part = None
            path = self._store.models / f".{self._store.run_id}.base"
            with storing(path):
                path.unlink(missing_ok=True)
                part = create_model(path, layout)
                path.unlink()
            checksums = part.fill(self._reader({}))
            self._check_read()
            self._part = hash_, part, checksums
        return self._part[1:]

    def whole(
        self, version: int, model: ModelFile, checksums: list[int]
    ) -> tuple[ModelFile, list[int]]:
        """Return the model of a version, of whose tensors the updates may have held a part, and its checksums.

        What they did not hold is as it was in the version before.

        Raises:
            IntegrityError: the version before is no longer what was committed.
            StorageError: the disk is full.
        """
        before = self.model
        if before is None and self.factors.ranked:
            return self._ranked(version, model)
        if (
            before is None
            or version == 0
            or model.layout is self.update_layout(version) is before.layout
        ):
            return model, checksums
        path = self._store.scratch(version)
        with storing(path):
            path.unlink(missing_ok=True)  # of a server that was killed right here
        made = create_model(path, before.layout, self.metadata(version))
        found = made.fill(self._reader(model.views()))
        self._check_read()
        made.file.sync()
        self._store.announce(version, made.layout.total_bytes)
        return made, found

    def _ranked(self, version: int, first: ModelFile) -> tuple[ModelFile, list[int]]:
        """Return a site's first model in the form of the global one, and its checksums."""
        path = self._store.scratch(version)
        with storing(path):
            path.unlink(missing_ok=True)
        layout = self.factors.model_layout(first.layout)
        made = create_model(path, layout, self.metadata(version))
        checksums = made.fill(first_form(first, layout, self.factors.pairs))
        first.file.check_whole()
        made.file.sync()
        self._store.announce(version, layout.total_bytes)
        return made, checksums

    def _reader(self, part: Mapping[str, memoryview]) -> Reader:
        """Return what reads each tensor of ``part`` there, and the others of the last model."""
        model = self.model
        assert model is not None
        views = {**model.views(), **part}

        def read(name: str) -> memoryview:
            model.release()  # its size must not show in this process's memory
            return views[name]

        return read

    def _check_read(self) -> None:
        """Check that what was read of the last model is what was committed."""
        assert self.model is not None
        if self.model.checksums() != self._checksums:
            raise self.damaged(f"{self.model.path} is not the file that was committed")

    def publish(self) -> None:
        """Let the sites pull the last model, under a new id."""
        assert self.model is not None
        self.set_id = self.packed_id = self._publish_raw(self.model, self._checksums)
        if self._config.transfer.lossless:
            self._publish_packed(self.model)

    def first_set(self) -> tuple[bytes, str]:
        """Return the id and the checksum of model 0, which stays published beside the last one from then on.

        Raises:
            IntegrityError: its file is missing, or is not the one that was committed.
        """
        if self._store.last_version == 0:
            return self.set_id, self._checksum
        if self._first is None:
            row, path = self._store.versions()[0], self._store.path(0)
            checksums = verify_model(path, row.checksum, self._store.chunk_bytes)
            model = open_model(path, self._store.chunk_bytes)
            self._first = self._publish_raw(model, checksums), row.checksum
        return self._first

    def _publish_raw(self, model: ModelFile, checksums: list[int]) -> bytes:
        """Publish a model as it is, under a new id."""
        set_id = uuid.uuid4().bytes
        self._exchange.publish(
            set_id,
            model.file,
            model.data_offset,
            model.layout.total_bytes,
            model.layout.chunk_bytes,
            checksums,
        )
        self._restrict(set_id)
        return set_id

    def _publish_packed(self, model: ModelFile) -> None:
        """Publish the model once more: a chunk is compressed when it is first asked for, for all who ask."""
        path = self._store.models / f".{self._store.run_id}.packed"
        try:
            path.unlink(missing_ok=True)
            packed = MappedFile.create(str(path), model.layout.total_bytes)
            path.unlink()
        except (OSError, StorageError) as error:
            logger.warning("models leave the server uncompressed: %s", error)
            return
        packed_id = uuid.uuid4().bytes
        self._exchange.publish_packed(
            packed_id,
            model.file,
            model.data_offset,
            Codec(model.layout, "raw", True),
            packed,
            self._checksums,
        )
        self._restrict(packed_id)
        self.packed_id = packed_id

    @property
    def _published(self) -> set[bytes]:
        first = b"" if self._first is None else self._first[0]
        return {self.set_id, self.packed_id, first} - {b""}

    def withdraw(self) -> None:
        """Withdraw all that is published."""
        for set_id in self._published:
            self._exchange.withdraw(set_id)

    def owns(self, set_id: bytes, problem: str) -> bool:
        """Whether a set that was damaged, or the file that ``problem`` names, is one of these models."""
        return set_id in self._published or f"{self._store.models}/" in problem

    def release_superseded(self) -> None:
        """Give back the pages of the model before the last: the system gives them to the next one."""
        if self._superseded is not None:
            self._superseded.file.evict()
            self._superseded = None

    # --- what is said of them ---

    def metadata(self, version: int) -> dict[str, str]:
        """Return the header's metadata of a version's file."""
        named = {"fedcore.run": self._config.run.name, "fedcore.version": str(version)}
        rule = rule_of(self._config)
        if version > 0 and rule.name != DEFAULT_RULE:
            named["fedcore.rule"] = rule.recorded
            if rule.code:
                named["fedcore.rule-code"] = rule.code
        if version > 0 and rule.weighing.recorded:
            named["fedcore.weights"] = rule.weighing.recorded
        if version > 0:
            named |= self.factors.metadata
        if version > 0:
            named |= self.optimizer.metadata(version)
        return named

    def expected_hash(self, site: str, declare: protocol.Declare | None, round_: int) -> str | None:
        """Return the hash of the layout that a site's update must have; None for a site that declared nothing.

        Args:
            site: whose update it is.
            declare: what the site declared while there was no model.
            round_: the update's.
        """
        if self.model is not None and self.factors.ranked:
            return self.factors.own_hash(self.model.layout, site)
        if self.model is not None:
            return self.factors.hash(self.model.layout, round_) or self.layout_hash
        return None if declare is None else layout_hash(declared_layout(declare))

    @property
    def layout_hash(self) -> str:
        """The hash of the model's layout. A layout of many tensors is hashed once, and not with every message."""
        assert self.model is not None
        layout, found = self._hashed
        if layout is not self.model.layout:
            found = layout_hash(self.model.layout)
            self._hashed = self.model.layout, found
        return found

    @property
    def table_bytes(self) -> int:
        """About how large a message is that names the model's tensors."""
        if self.model is None:
            return 0
        listed, packed = self.described()
        return len(packed) if packed is not None else 128 * len(listed)

    def described(self) -> tuple[list[tuple[str, str, list[int]]], str | None]:
        """Return the model's tensors as a `protocol.OpenSet` has them: listed, or packed where there are many."""
        assert self.model is not None
        layout = self.model.layout
        if self._described is None or self._described[0] is not layout:
            listed = table(layout)
            if protocol.packs(listed):
                self._described = (layout, [], protocol.pack_table(listed))
            else:
                self._described = (layout, listed, None)
        return self._described[1:]

    def most_tensors(self) -> int:
        """Return how many tensors a site may declare: where there is a model, few more than it has."""
        if self.model is not None:
            return max(10_000, 2 * self.model.layout.tensor_count)
        # Each site's table is kept until there is a model.
        room = self._config.server.memory // (_TENSOR_BYTES * self._config.participants.expected)
        return min(protocol.MAX_TENSORS, max(protocol.MAX_LISTED, room))

    @property
    def checksums(self) -> list[int]:
        """The checksums of the last model's chunks, as they were recorded; empty before the first."""
        return self._checksums

    @property
    def checksum(self) -> str:
        """The checksum of the last model; empty before the first."""
        return self._checksum

    def describe(self) -> str:
        """Return the model's size in words."""
        assert self.model is not None
        layout = self.model.layout
        return f"{plural(len(layout.tensors), 'tensor')}, {layout.total_bytes:,} bytes"

    # --- digests, which are computed beside the run ---

    def _moved(self) -> int:
        stats = self._exchange.stats()
        return stats["bytes_in"] + stats["bytes_out"]

    def keep_digests(self) -> None:
        """Store the digests that have become known."""
        for version, digest in self._hasher.results():
            if digest is None:
                logger.error(
                    "%s is not the file that was committed (its checksum differs): put it back from a backup; it "
                    "has no sha256, and is not exported", self._store.path(version),
                )  # fmt: skip
            else:
                self._store.add_sha256(version, digest)

    def finish_digests(self, *, wait: bool) -> None:
        """End the hashing, after all is hashed or at once, and store what is known."""
        if wait:
            self._hasher.finish()
        else:
            self._hasher.stop()
        self.keep_digests()

    def close(self) -> None:
        """End the hashing at once."""
        self._hasher.stop()
