"""The version under way on disk: its file, and the record from which a server that was killed goes on with it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from fedcore._core import Layout, Record
from fedcore.errors import ConfigError, StorageError
from fedcore.layout import layout_hash
from fedcore.model_file import ModelFile, create_model, reopen_model
from fedcore.server.rounds.actions import Participant

__all__ = ["Scratch"]

logger = logging.getLogger("fedcore.server")


class Scratch:
    """Where a version is written before its commit.

    Args:
        path: the model file.
        record: the file that says which of its chunks are reduced, and from whose updates.
        of: everything that the version's bytes depend on beside its layout and participants; what another
            ``of`` left there is not gone on with.
        metadata: for the header of each file.
        states: where each state is written, and its layout, by name.

    Attributes:
        of: the digest of what its bytes depend on.
        states: the states' files by name, once `open` has made them.
        base_weight: what the version before weighs in this one, as one more update.
    """

    def __init__(
        self,
        path: Path,
        record: Path,
        of: Mapping[str, object],
        metadata: Mapping[str, str],
        states: Mapping[str, tuple[Path, Layout]] | None = None,
    ) -> None:
        self.path = path
        self._record = record
        self.of = hashlib.sha256(json.dumps(dict(of), sort_keys=True).encode()).digest()
        self._metadata = metadata
        self._states = dict(states or {})
        self.states: dict[str, ModelFile] = {}
        self.base_weight = 0

    def key(self, layout: Layout) -> bytes:
        """Return 64 bytes that say what is collected."""
        return self.of + bytes.fromhex(layout_hash(layout))

    def _record_key(self, layout: Layout) -> bytes:
        key = self.key(layout)
        if not self.base_weight:
            return key
        return hashlib.sha512(key + self.base_weight.to_bytes(8, "big")).digest()

    def decided(self) -> tuple[Participant, ...]:
        """Return whose updates a killed server was collecting; nobody's if no record of it is whole."""
        found = Record.open(str(self._record))
        if found is None or found.key[: len(self.of)] != self.of:
            return ()
        return tuple(
            Participant(site, set_id.hex(), weight) for site, set_id, weight in found.sources
        )

    def open(
        self, layout: Layout, participants: tuple[Participant, ...]
    ) -> tuple[ModelFile, Record | None]:
        """Take up what a killed server left of the same collection, or begin it anew.

        Without a record, for which the disk may have no room, a server that is killed begins it again.

        Raises:
            StorageError: the file can't be made.
        """
        sources = [(p.site, bytes.fromhex(p.set_id), p.weight) for p in participants]
        key = self._record_key(layout)
        found = Record.open(str(self._record))
        if (
            found is not None
            and (found.key, found.sources) == (key, sources)
            and found.chunk_count == layout.chunk_count
        ):
            file = reopen_model(self.path, layout, self._metadata)
            if file is not None and self._reopen_states():
                return file, found
        self.remove()
        file = create_model(self.path, layout, self._metadata)
        self.states = {
            name: create_model(path, of, self._metadata)
            for name, (path, of) in self._states.items()
        }
        try:
            return file, Record.create(str(self._record), key, sources, layout.chunk_count)
        except (ConfigError, StorageError) as error:
            logger.warning(
                "a server killed in this round will collect it from the start: %s", error
            )
            return file, None

    def _reopen_states(self) -> bool:
        """Take up the files of the states; returns whether all of them are there."""
        self.states = {}
        for name, (path, layout) in self._states.items():
            file = reopen_model(path, layout, self._metadata)
            if file is None:
                return False
            self.states[name] = file
        return True

    def remove(self) -> None:
        """Remove the files; the record first, as it says what the others hold. StorageError if one stays."""
        for path in (self._record, self.path, *(path for path, _ in self._states.values())):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StorageError(f"cannot remove {path}: {error.strerror or error}") from None
