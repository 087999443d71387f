"""What a run's journal keeps of those who may stop it: gates, and operators."""

from __future__ import annotations

from typing import Final

from .journal import Journal

__all__ = ["Decisions"]

_STOP: Final = "stop_asked"
_ALLOWED: Final = "allowed_round"


class Decisions:
    """A part of `Store`; it works on the journal alone."""

    journal: Journal

    @property
    def allowed_round(self) -> int:
        """The last round that the run's gates have allowed; 0 before the first."""
        return int(self.journal.meta(_ALLOWED) or 0)

    def allow_round(self, round_: int) -> None:
        """Note that the run's gates have allowed a round to begin."""
        with self.journal.transaction():
            self.journal.set_meta(_ALLOWED, str(round_))

    def ask_stop(self) -> None:
        """Note that an operator ends the run: a server that is started before it has done so ends it then.

        Raises:
            IntegrityError: the journal was replaced by another file.
            StorageError: it can't be written; the run is not stopped.
        """
        with self.journal.transaction():
            self.journal.set_meta(_STOP, "1")

    @property
    def stop_asked(self) -> bool:
        """Whether an operator has ended the run, and not all of what follows from it is done."""
        return self.journal.meta(_STOP) is not None

    def forget_stop(self) -> None:
        """Note that the run has been stopped, and its sites know: the next server goes on with the run."""
        if self.stop_asked:
            with self.journal.transaction():
                self._drop_stop()

    def _drop_allowed(self) -> None:
        """Within a transaction: forget what the gates have allowed."""
        self.journal.db.execute("DELETE FROM meta WHERE key = ?", (_ALLOWED,))

    def _drop_stop(self) -> None:
        """Within a transaction: forget that the run is to end."""
        self.journal.db.execute("DELETE FROM meta WHERE key = ?", (_STOP,))
