"""Ask how a run stands: a running server by its address, or any run by its folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from fedcore import protocol
from fedcore.adapters.report import Measured
from fedcore.errors import ConfigError, RefusedError, TransferTimeout
from fedcore.security.keys import LOCAL_KIT, Credentials, is_loopback, load_kit
from fedcore.transport.link import Control, SiteLink
from fedcore.transport.proxy import Proxy

__all__ = [
    "ENDPOINT_FILE",
    "StatusClient",
    "Target",
    "ask_status",
    "find_server",
    "find_target",
    "following",
    "is_served",
    "read_summary",
    "snapshots",
    "why_unserved",
]

logger = logging.getLogger("fedcore")

_R = TypeVar("_R", protocol.StatusReply, protocol.CommandReply, protocol.MetricsReply)

_CHECK_SECONDS: Final = 0.5
_PAGE_SECONDS: Final = 1.0
_DEFAULT_ADDRESS: Final = "tcp://127.0.0.1:7733"
ENDPOINT_FILE: Final = "endpoint"
"""File in a run folder that holds the address on which its server listens."""


@dataclass(frozen=True)
class Target:
    """Where a server is, with what key to talk to it (None: plain text), and through which proxy, if any."""

    address: str
    credentials: Credentials | None = None
    proxy: Proxy | None = None

    def connect(self) -> StatusClient:
        """Return a connection to it, to use in a ``with`` block."""
        return StatusClient(self.address, self.credentials, self.proxy)


class StatusClient:
    """A connection to a server that takes no part in its run; use it in a ``with`` block.

    Args:
        address: ``tcp://HOST:PORT``, or ``tcp://HOST:PORT#RUN_ID`` for a run of a server that has several.
        credentials: the key to talk to it; None: plain text.
        proxy: the way to it; None: it is dialled directly.

    Attributes:
        link: the way to it.

    Raises:
        ConfigError: what follows the ``#`` is no id of a run.
    """

    def __init__(
        self, address: str, credentials: Credentials | None = None, proxy: Proxy | None = None
    ) -> None:
        address, _, run = address.partition("#")
        if run and not re.fullmatch("[0-9a-f]{32}", run):
            raise ConfigError(
                f"{address}#{run}: what follows the # is the run's id, 32 hexadecimal digits; the first line of "
                "the run's log has it"
            )
        self.address = address
        self._warned = False
        self.link = SiteLink(address, uuid.uuid4().bytes, credentials, proxy)
        self.link.run_id = run or None

    def __enter__(self) -> StatusClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, timeout: float) -> protocol.StatusReply:
        """Return a snapshot.

        Raises:
            TransferTimeout: no answer within ``timeout`` seconds.
            RefusedError: the server does not take this key, or not for this; with the code ``busy``: another
                process has the run's database locked.
        """
        return self._asked(protocol.StatusRequest(), protocol.StatusReply, timeout)

    def training(self, timeout: float) -> list[protocol.MetricSeries]:
        """Return the training metrics that the server has written down, page by page; errors as in `ask`.

        Args:
            timeout: seconds to wait for each page. A server answers slowly who asks for much.
        """
        series: list[protocol.MetricSeries] = []
        after = 0
        while True:
            page = self.page(after, timeout)
            series += page.series
            after = page.last
            if not after:
                return sorted(series, key=lambda one: (one.site, one.name))

    def page(self, after: int, timeout: float) -> protocol.MetricsReply:
        """Return the training metrics after those of a page whose ``last`` is given; errors as in `ask`."""
        request, until = protocol.MetricsRequest(after=after), time.monotonic() + timeout
        while True:  # what goes beyond the server's rate limit is asked for in vain
            left = until - time.monotonic()
            try:
                page = self._asked(
                    request, protocol.MetricsReply, min(max(left, 0.0), _PAGE_SECONDS)
                )
            except TransferTimeout:
                if left <= _PAGE_SECONDS:
                    raise
            else:
                if page.after == after:
                    return page

    def command(self, action: protocol.Steer, timeout: float) -> protocol.CommandReply:
        """Steer the run; returns the answer, errors as in `ask`."""
        return self._asked(protocol.Command(action=action), protocol.CommandReply, timeout)

    def _asked(self, message: protocol.FromSite, kind: type[_R], timeout: float) -> _R:
        self.link.send(message)
        until = time.monotonic() + timeout
        while (left := until - time.monotonic()) > 0:
            arrived = self.link.recv(min(left, _CHECK_SECONDS))
            if self.link.refused:
                raise RefusedError(self.link.refused, "key")
            self._warn_unresolved(left)
            if isinstance(arrived, Control):
                reply = protocol.decode_from_server(arrived.body)
                if isinstance(reply, kind):
                    return reply
                if isinstance(reply, protocol.Refused):
                    raise RefusedError(reply.message, reply.code)
        why = self.link.hint or "is fedcore-server running there?"
        raise TransferTimeout(f"no answer from {self.address} within {timeout:g} s; {why}")

    def _warn_unresolved(self, left: float) -> None:
        """Say at once, and once, that the server's name stands for no address, or the proxy does not connect."""
        if self.link.unresolved and not self._warned:
            self._warned = True
            logger.warning("%s Still trying, for %.0f s.", self.link.unresolved, left)

    def close(self) -> None:
        """Close the connection."""
        self.link.close()


@contextlib.contextmanager
def following(
    show: Callable[[protocol.StatusReply], object], folder: Path, seconds: float = 0.5
) -> Iterator[Callable[[], None]]:
    """Give what a simulation can call as often as it likes while a server works on ``folder``: a snapshot is shown
    at most every ``seconds``, over one connection.
    """
    with contextlib.ExitStack() as stack:
        client: StatusClient | None = None
        shown = -math.inf

        def tick() -> None:
            nonlocal client, shown
            if time.monotonic() - shown < seconds:
                return
            shown = time.monotonic()
            # Not there yet, busy, or it has just ended: the next call asks again.
            with contextlib.suppress(ConfigError, TransferTimeout):
                if client is None:
                    target = find_server(folder)
                    if target is None:
                        return
                    client = stack.enter_context(target.connect())
                show(client.ask(seconds))

        yield tick


def snapshots(
    target: Target, folder: Path | None, timeout: float
) -> Iterator[tuple[protocol.StatusReply, str]]:
    """Yield a snapshot of a server whenever asked for one, with a note while it does not answer.

    A server that was started again is found by its run folder, also where its address and key are others now.

    Args:
        target: the server.
        folder: its run folder, if it is on this machine.
        timeout: seconds to wait for an answer.

    Raises:
        TransferTimeout: no answer to the first question.
        RefusedError: the server does not take this key, or not for this; or, to the first question, the run's
            database is locked.
    """
    before = None if folder is None else _stamp(folder)
    client = target.connect()
    try:
        last = client.ask(timeout)
        since = time.monotonic()
        yield last, ""
        while True:
            try:
                last = client.ask(timeout)
                since, note = time.monotonic(), ""
            except (TransferTimeout, RefusedError) as error:
                note = f"no answer from {target.address} for {time.monotonic() - since:.0f} s; still asking"
                if isinstance(error, RefusedError):
                    if error.code != "busy":
                        raise
                    note = f"{error} (for {time.monotonic() - since:.0f} s); still asking"
                if folder is not None:
                    found = find_server(folder)
                    if found is None and _stamp(folder) != before:
                        last, note = read_summary(folder), ""
                    elif found is not None and found != target:
                        client.close()
                        target = found
                        client = target.connect()
            yield last, note
    finally:
        client.close()


def _stamp(folder: Path) -> int:
    """Return when the summary of a run was last written; the server writes it as the run ends."""
    with contextlib.suppress(OSError):
        return (folder / "summary.json").stat().st_mtime_ns
    return 0


def ask_status(
    address: str,
    timeout: float,
    credentials: Credentials | None = None,
    proxy: Proxy | None = None,
) -> protocol.StatusReply:
    """Ask a server once; arguments and errors as in `StatusClient.ask`."""
    with StatusClient(address, credentials, proxy) as client:
        return client.ask(timeout)


def find_target(
    target: str | None, kit: Path | None, insecure: bool, network: bool
) -> Target | None:
    """Return the server that a command is to talk to, or None if no server works on the run folder ``target``.

    Args:
        target: a run folder or an address; None: the kit's address, or this machine's default port.
        kit: a kit folder; where it is given, the connection is encrypted with its key.
        insecure: plain text is asked for; ``network``: to another machine too.

    Raises:
        ConfigError: ``target`` is no run folder, or would be talked to in plain text unasked.
    """
    found = None if kit is None else load_kit(kit, os.environ)
    if target is not None and not target.startswith("tcp://"):
        return find_server(Path(target))
    if found is not None:
        return _behind_proxy(target or found.server, found.credentials)
    address = target or _DEFAULT_ADDRESS
    if not insecure:
        raise ConfigError(
            f"no key for {address}: name the run folder where the server is on this machine, or a kit with --kit "
            "(or FEDCORE_KIT); --insecure is for a server whose run file says server.insecure = true"
        )
    if not is_loopback(address.partition("#")[0]) and not network:
        raise ConfigError(
            f"--insecure is for a server on this machine, and {address} is not; use --kit, or insist with "
            "--insecure-network"
        )
    return _behind_proxy(address, None)


def _behind_proxy(address: str, credentials: Credentials | None) -> Target:
    proxy = Proxy.from_environment(os.environ, address.partition("#")[0])
    return Target(address, credentials, proxy)


def find_server(folder: Path) -> Target | None:
    """Return the server that works on a run folder, and the key that it leaves there, or None if none does.

    Raises:
        ConfigError: the folder is no run folder.
    """
    if not (folder / "run.sqlite").is_file():
        if (folder / "models").is_dir():
            raise ConfigError(
                f"{folder} holds models of a run, but no journal (run.sqlite): put it back from a backup"
            )
        raise ConfigError(
            f"{folder} is neither a run folder nor an address such as tcp://HOST:PORT"
        )
    try:
        address = (folder / ENDPOINT_FILE).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, IsADirectoryError):
        return None  # its server has not begun, or has ended
    if not address or not is_served(folder):
        return None
    kit = folder / LOCAL_KIT
    credentials = load_kit(kit).credentials if kit.is_dir() else None
    return Target(address, credentials)


def is_served(folder: Path) -> bool:
    """Whether a server works on a run folder; the lock file of a killed one does not count."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def why_unserved(folder: Path) -> str:
    """Return what a message adds that no server works on a run folder: a server may wait for its database."""
    journal = (folder / "run.sqlite").resolve()
    try:
        with contextlib.closing(
            sqlite3.connect(f"{journal.as_uri()}?mode=ro", 0, uri=True)
        ) as found:
            found.execute("SELECT 1 FROM sqlite_schema").fetchone()
    except sqlite3.Error as error:
        if "locked" not in str(error):
            return ""
        return (
            ": another process has its database locked; a server that was started for it serves it once that is "
            "free, and can be reached then"
        )
    return ""


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


def _phase(summary: dict[str, Any]) -> Literal["done", "stopped", "failed"]:
    if summary["ok"]:
        return "done"
    return "stopped" if summary.get("outcome") == "stopped" else "failed"


def _score_of(summary: dict[str, Any], site: str, version: int | None) -> float | None:
    """Return a site's value of the metric that selects, of one version."""
    for row in summary["versions"]:
        if row["version"] == version:
            value = row["metrics_by_site"].get(site, {}).get(summary["metric"])
            return value if isinstance(value, float) else None
    return None


def _factors_of(values: dict[str, Any] | None) -> protocol.FactorsStatus | None:
    return None if values is None else Measured.of_text(json.dumps(values)).status


def _from_summary(summary: dict[str, Any]) -> protocol.StatusReply:
    versions = [
        protocol.VersionStatus(
            version=row["version"],
            metrics=protocol.first_metrics(row["metrics"], summary["metric"]),
            scored=len(row["metrics_by_site"]),
            participants=list(row["participants"]),
            worse_at=row.get("worse_at", []),
            updates=[
                protocol.UpdateStatus(
                    site=site,
                    weight=of["weight"],
                    score=math.inf if of["score"] is None else of["score"],
                )
                for site, of in row.get("updates", {}).items()
            ],
            measure=row.get("measure", ""),
            factors=_factors_of(row.get("factors")),
            seconds=row["seconds"],
            bytes=row["bytes"],
        )
        for row in summary["versions"]
    ]
    last = summary["version"] or 0
    return protocol.StatusReply(
        run=summary["run"],
        phase=_phase(summary),
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
            protocol.SiteStatus(
                site=name,
                state=site["state"],
                message=site["message"],
                score=_score_of(summary, name, summary["version"]),
                best_score=_score_of(summary, name, summary["best_version"]),
            )
            for name, site in summary["sites"].items()
        ],
        versions=versions,
        message=summary["message"],
    )
