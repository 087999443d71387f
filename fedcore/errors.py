"""Every error that fedcore raises on purpose.

Each class is also the builtin that a user would catch (``ValueError``, ``TimeoutError``, ``OSError``), so a
script needs no import from here to handle it. The compiled core maps its error codes to these classes.
"""

from __future__ import annotations

__all__ = [
    "BusyError",
    "ClosedError",
    "ConfigError",
    "FedcoreError",
    "IntegrityError",
    "LayoutError",
    "MetricError",
    "NonFiniteError",
    "ProtocolError",
    "RefusedError",
    "RuleError",
    "RunEndedError",
    "RunFailedError",
    "StorageError",
    "TransferTimeout",
    "WeightError",
]


class FedcoreError(Exception):
    """Base of all errors of this package."""


class ConfigError(FedcoreError, ValueError):
    """A run file, an option or an environment variable is wrong."""


class LayoutError(FedcoreError, ValueError):
    """Two tensor sets differ in a name, dtype or shape, or a tensor set cannot be described."""


class ProtocolError(FedcoreError, ValueError):
    """A message breaks the wire format."""


class MetricError(FedcoreError, ValueError):
    """A metric is no number, or there are too many."""


class NonFiniteError(FedcoreError, ValueError):
    """An update holds NaN or infinity."""


class WeightError(FedcoreError, ValueError):
    """A weight is not an integer from 1 to 2**64 - 1."""


class RuleError(FedcoreError, RuntimeError):
    """A rule that combines updates has failed, or broke its contract.

    Attributes:
        tensor: the number of the tensor, where files are combined; None elsewhere.
        element: of the tensor.
        trace: where in the rule's own code it failed; empty if it raised nothing.
    """

    def __init__(
        self, message: str, tensor: int | None = None, element: int = 0, trace: str = ""
    ) -> None:
        super().__init__(message)
        self.tensor, self.element, self.trace = tensor, element, trace
        if trace:
            self.add_note(trace)


class StorageError(FedcoreError, OSError):
    """A file could not be created, mapped, written or synchronised."""


class IntegrityError(StorageError):
    """A file of a run is missing, is not the one that was recorded, or is one that no record names."""


class BusyError(FedcoreError, RuntimeError):
    """A port, a run folder or a site's name is in use by another process."""


class ClosedError(FedcoreError, RuntimeError):
    """The object was closed, or a call came at a time when it is not allowed."""


class RunEndedError(ClosedError, SystemExit):
    """The run ended, complete or stopped by an operator, while this script was waiting for a model of it.

    A script that does not catch it ends quietly with status 0, as after its loop.
    """

    code = 0


class RunFailedError(RunEndedError):
    """The run was given up. A script that does not catch it ends with status 1; the log says why."""

    code = 1


class RefusedError(FedcoreError, RuntimeError):
    """The server turned this site away; the message carries the server's reason.

    ``code`` is a short machine-readable word such as ``"unknown-site"`` or ``"layout"``.
    """

    def __init__(self, message: str, code: str = "refused") -> None:
        super().__init__(message)
        self.code = code


class TransferTimeout(FedcoreError, TimeoutError):
    """Nothing was heard from the other side for longer than the timeout."""
