"""The finishers of a run, a server optimizer and an average: what they keep from version to version.

The average is one of the models (EMA). It changes no bit of them: sites train from the models, score them, and the
best one is selected among them. The average of the last one is exported as ``ema/`` at the end.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from fedcore._core import Finisher, Layout
from fedcore.config import AggregationSection
from fedcore.errors import IntegrityError, StorageError
from fedcore.model_file import ModelFile, open_model
from fedcore.roles import Buffers
from fedcore.rules.finishers import find_finisher
from fedcore.server.storage.integrity import checksum_of, verify_model
from fedcore.server.storage.store import StateRow, Store

from .roles import Roles

__all__ = ["Optimizer"]

_NONE: Final = "none"
"""The finisher of the core that leaves combined values as they are."""

logger = logging.getLogger("fedcore.server")


class Optimizer:
    """Holds the states of the last version.

    Args:
        section: of the run file. Without an optimizer the model is the combined updates.
        store: the run's.
        roles: of its model: it does not act on buffers.
    """

    def __init__(self, section: AggregationSection, store: Store, roles: Roles) -> None:
        self._section = section.optimizer
        self._ema = section.ema
        self._acts = self._section is not None or self._ema is not None
        self._store = store
        self._version = 0
        self._rows: dict[str, StateRow] = {}
        self._states: dict[str, ModelFile] = {}
        self._checksums: dict[str, list[int]] = {}  # of the chunks of each
        self._roles = roles
        self._made: tuple[Layout, Buffers, Finisher] | None = None
        self._unmatched: set[str] = set()

    def open(self, version: int) -> None:
        """Take up the states of the last version, which `Store` has committed.

        Raises:
            IntegrityError: one is missing, or is not the one that was committed.
        """
        self._version = version
        if not self._acts:
            return
        self._rows = self._store.states(version)
        for name, row in self._rows.items():
            path = self._store.state_path(version, name)
            self._checksums[name] = verify_model(path, row.checksum, self._store.chunk_bytes)
            self._states[name] = open_model(path, self._store.chunk_bytes)

    # --- the next version ---

    def finisher(self, layout: Layout) -> Finisher | None:
        """Return what makes the next version of a model of this layout; None if its updates alone do.

        Raises:
            ConfigError: the model has no tensor on which it acts.
        """
        if not self._acts:
            return None
        buffers = self._roles.buffers
        if self._made is None or self._made[0] is not layout or self._made[1] != buffers:
            before = {name: (state.file, state.data_offset) for name, state in self._states.items()}
            plain = self.plain(layout)
            section, sums = self._section, self._checksums
            name = _NONE if section is None else section.name
            options = {} if section is None else section.options_of(self._version + 1)
            made = Finisher(layout, name, options, plain, before, sums, self._ema)
            if self._version > 0 and made.states and not before:
                logger.warning(
                    "%s anew after round %d: its state is kept for the last model alone",
                    "the average begins" if section is None else "the server optimizer begins",
                    self._version,
                )
            self._made = layout, buffers, made
        return self._made[2]

    def acts_on(self, names: Sequence[str]) -> list[str]:
        """Return which of these tensors of a float dtype it changes, as far as patterns say."""
        return self.not_plain(names) if self._acts else []

    def not_plain(self, names: Sequence[str]) -> list[str]:
        """Return which of these tensors no pattern of its section names."""
        plain = self._section.plain if self._section is not None else ()
        return [n for n in names if not any(fnmatch.fnmatchcase(n, pattern) for pattern in plain)]

    def plain(self, layout: Layout) -> set[str]:
        """Return the names of the tensors that keep the plain mean; say once which pattern names none."""
        names = [name for name, *_ in layout.tensors]
        found = set(self._roles.buffers or ())
        for pattern in self._section.plain if self._section is not None else ():
            matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
            if not matching and pattern not in self._unmatched:
                self._unmatched.add(pattern)
                logger.warning("aggregation.optimizer.plain: no tensor is named %r", pattern)
            found.update(matching)
        return found

    def layouts(self, layout: Layout) -> dict[str, Layout]:
        """Return the layouts of the states of a model of this layout, by name."""
        finisher = self.finisher(layout)
        return {} if finisher is None else dict(finisher.states)

    def scratches(self, version: int, layout: Layout | None) -> dict[str, tuple[Path, Layout]]:
        """Return where each state of the next version is written, and its layout."""
        if layout is None:  # the initial model has none
            return {}
        return {
            name: (self._store.state_scratch(version, name), of)
            for name, of in self.layouts(layout).items()
        }

    def key(self) -> dict[str, object]:
        """Return what the next version's bytes depend on beside the run file."""
        if not self._acts:
            return {}
        states = {name: row.checksum for name, row in self._rows.items()}
        buffers = {"buffers": self._roles.buffers} if self._roles.buffers else {}
        version = 0 if self._section is None else find_finisher(self._section.name).version
        return {"optimizer": version, "states": states, **buffers}

    def metadata(self, version: int) -> dict[str, str]:
        """Return what is said of it in the header of a version's files, with its numbers in that round."""
        found = {} if self._ema is None else {"fedcore.ema": self._ema.hex()}
        if self._section is not None:
            kind = find_finisher(self._section.name)
            options = [
                f"{name}={value.hex()}" for name, value in self._section.options_of(version).items()
            ]
            found["fedcore.optimizer"] = " ".join([kind.name, str(kind.version), *options])
        return found

    # --- a commit ---

    def check(self) -> None:
        """Check that all of the states could be read; that they are those of the commit, each chunk was asked.

        Raises:
            IntegrityError: one has become shorter, or its disk could not read it.
        """
        for state in self._states.values():
            try:
                state.file.check_whole()
            except StorageError as error:
                raise IntegrityError(self.named(str(error)) or str(error)) from None

    def named(self, problem: str) -> str | None:
        """Return a problem of the core with a state of the last version under the state's name; None: of no state.

        The core knows a file by the name under which it was written.
        """
        for name in self._states:
            path = str(self._store.state_path(self._version, name))
            written = str(self._store.state_scratch(self._version, name))
            if written in problem or path in problem:
                return problem.replace(written, path)
        return None

    @staticmethod
    def checksums(states: Mapping[str, ModelFile]) -> dict[str, list[int]]:
        """Return the checksums of the chunks of new states, which are written."""
        return {name: state.checksums() for name, state in states.items()}

    @staticmethod
    def rows(
        states: Mapping[str, ModelFile], checksums: Mapping[str, list[int]]
    ) -> dict[str, StateRow]:
        """Return what the journal keeps of new states."""
        return {
            name: StateRow(checksum_of(checksums[name]), state.layout.total_bytes)
            for name, state in states.items()
        }

    def take(
        self,
        version: int,
        states: Mapping[str, ModelFile],
        rows: Mapping[str, StateRow],
        checksums: Mapping[str, list[int]],
    ) -> None:
        """Go on from the states of a version that is committed now."""
        self._version = version
        self._states, self._rows = dict(states), dict(rows)
        self._checksums = dict(checksums)
        self._made = None

    def describe(self) -> str:
        """Return in words what the optimizer is; empty if there is none."""
        if self._section is None:
            return ""
        kind = find_finisher(self._section.name)
        options = ", ".join(f"{name} {value:g}" for name, value in self._section.options.items())
        by = ", learning_rate by a schedule" if self._section.schedule else ""
        return f"{kind.name} (version {kind.version}): {options}{by}"
