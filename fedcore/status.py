"""Ask how a run stands: a running server by its address, or any run by its folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from . import protocol
from .errors import ConfigError, TransferTimeout
from .transport import Control, SiteLink

__all__ = [
    "ENDPOINT_FILE",
    "StatusClient",
    "ask_status",
    "find_server",
    "following",
    "is_served",
    "read_summary",
]

ENDPOINT_FILE: Final = "endpoint"
"""File in a run folder that holds the address on which its server listens."""


class StatusClient:
    """A connection to a server that only asks for snapshots; use it in a ``with`` block."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._link = SiteLink(address, uuid.uuid4().bytes)

    def __enter__(self) -> StatusClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, timeout: float) -> protocol.StatusReply:
        """Return a snapshot.

        Raises:
            TransferTimeout: no answer within ``timeout`` seconds.
        """
        self._link.send(protocol.StatusRequest())
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            arrived = self._link.recv(left)
            if isinstance(arrived, Control):
                reply = protocol.decode_from_server(arrived.body)
                if isinstance(reply, protocol.StatusReply):
                    return reply
        raise TransferTimeout(
            f"no answer from {self.address} within {timeout:g} s; is fedcore-server running there?"
        )

    def close(self) -> None:
        """Close the connection."""
        self._link.close()


@contextlib.contextmanager
def following(
    show: Callable[[protocol.StatusReply], object], seconds: float = 0.5
) -> Iterator[Callable[[str], None]]:
    """Give what a simulation can call with its server's address as often as it likes: a snapshot is shown at
    most every ``seconds``, over one connection.
    """
    with contextlib.ExitStack() as stack:
        client: StatusClient | None = None
        shown = -math.inf

        def tick(address: str) -> None:
            nonlocal client, shown
            if time.monotonic() - shown < seconds:
                return
            if client is None:
                client = stack.enter_context(StatusClient(address))
            shown = time.monotonic()
            with contextlib.suppress(
                TransferTimeout
            ):  # busy, or it has just ended; the next call asks again
                show(client.ask(seconds))

        yield tick


def ask_status(address: str, timeout: float) -> protocol.StatusReply:
    """Ask a server once; arguments and errors as in `StatusClient.ask`."""
    with StatusClient(address) as client:
        return client.ask(timeout)


def find_server(folder: Path) -> str | None:
    """Return the address of the server that works on a run folder, or None if none does.

    Raises:
        ConfigError: the folder is no run folder.
    """
    if not (folder / "run.sqlite").is_file():
        raise ConfigError(
            f"{folder} is neither a run folder nor an address such as tcp://HOST:PORT"
        )
    endpoint = folder / ENDPOINT_FILE
    if not endpoint.is_file() or not is_served(folder):
        return None
    return endpoint.read_text(encoding="utf-8").strip()


def is_served(folder: Path) -> bool:
    """Whether a server works on a run folder; the lock file of a killed one does not count."""
    try:
        with (folder / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def read_summary(folder: Path) -> protocol.StatusReply:
    """Return the last snapshot of a run that has ended, from its ``summary.json``.

    Raises:
        ConfigError: the run has no summary: it was cut off, or nothing has ended yet.
    """
    path = folder / "summary.json"
    try:
        return _from_summary(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(
            f"no server works on {folder}, and its run has not ended; start fedcore-server with its run file "
            "to go on after the last committed round"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); fedcore-server writes it") from None


def _from_summary(summary: dict[str, Any]) -> protocol.StatusReply:
    versions = [
        protocol.VersionStatus(
            version=row["version"],
            metrics=row["metrics"],
            participants=list(row["participants"]),
            seconds=row["seconds"],
            bytes=row["bytes"],
        )
        for row in summary["versions"]
    ]
    last = summary["version"] or 0
    return protocol.StatusReply(
        run=summary["run"],
        phase="done" if summary["ok"] else "failed",
        round=last,
        rounds=summary["rounds"],
        metric=summary["metric"],
        mode=summary["mode"],
        best_version=summary["best_version"],
        model_bytes=versions[-1].bytes if versions else 0,
        bytes_in=summary["bytes_in"],
        bytes_out=summary["bytes_out"],
        elapsed=summary["seconds"],
        eta=0.0,
        sites=[
            protocol.SiteStatus(site=name, state=site["state"], message=site["message"])
            for name, site in summary["sites"].items()
        ],
        versions=versions,
        message=summary["message"],
    )
