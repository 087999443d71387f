"""What a site machine asks of the one who drives it, and what it reports.

`Send`, `Publish`, `Withdraw`, `Pull` and `StopPull` are requests: the driver carries them out, in their order. The
others are events: the driver may act on them, show them or ignore them. None of them holds a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from fedcore import protocol
from fedcore._core import Exchange
from fedcore.encoding import EncodedUpdate
from fedcore.errors import FedcoreError

__all__ = [
    "Busy",
    "Committed",
    "Dropped",
    "Event",
    "Failed",
    "Finished",
    "HeldElsewhere",
    "Joined",
    "Malformed",
    "Output",
    "Publish",
    "Pull",
    "Pulled",
    "Request",
    "Send",
    "Settled",
    "Spoiled",
    "StopPull",
    "Stopped",
    "Tasked",
    "Warned",
    "Withdraw",
    "serve",
]


@dataclass(frozen=True)
class Send:
    """Send a control message to the server; it names the run already."""

    message: protocol.FromSite


@dataclass(frozen=True)
class Publish:
    """Let the server pull a set under this id (32 hexadecimal digits).

    ``update`` is None where the driver makes the chunks by itself.
    """

    set_id: str
    update: EncodedUpdate | None


@dataclass(frozen=True)
class Withdraw:
    """Do not let the server pull a set any more."""

    set_id: str


@dataclass(frozen=True)
class Pull:
    """Download a set to a place of the driver's, and tell the machine by `SiteMachine.pulled` how that ended."""

    set: protocol.OpenSet


@dataclass(frozen=True)
class StopPull:
    """Stop the download of a set; its end is not to be reported."""

    set_id: str


@dataclass(frozen=True)
class Joined:
    """The server has let this site join a run, for the first time."""

    run: str


@dataclass(frozen=True)
class HeldElsewhere:
    """Another process has this site's name; the machine asks again for a while."""


@dataclass(frozen=True)
class Busy:
    """The server does not take this site up yet, and says why; each reason is reported once."""

    why: str


@dataclass(frozen=True)
class Warned:
    """The server has warned of something that differs from other sites; each text is reported once."""

    text: str


@dataclass(frozen=True)
class Tasked:
    """A task came. It may be the one that came before, when the server sends it again."""

    task: protocol.Task


@dataclass(frozen=True)
class Pulled:
    """The model of a task is downloaded."""

    task: protocol.Task


@dataclass(frozen=True)
class Spoiled:
    """Wrong bytes came for a model; it is asked for again after so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Settled:
    """The published update is not needed any more.

    Attributes:
        ready: its announcement.
        counts: whether a version holds it.
        late: its `Commit` did not come, as where the server was killed; a later task said so.
    """

    ready: protocol.Ready
    counts: bool
    late: bool = False


@dataclass(frozen=True)
class Committed:
    """A version exists; ``rounds`` is how many the run has."""

    commit: protocol.Commit
    rounds: int


@dataclass(frozen=True)
class Dropped:
    """This site's update of a round does not count; 0 is the initial model."""

    round: int
    why: str


@dataclass(frozen=True)
class Stopped:
    """The server has ended before the run; another one goes on with it."""

    why: str


@dataclass(frozen=True)
class Finished:
    """The run is over."""

    finish: protocol.Finish


@dataclass(frozen=True)
class Malformed:
    """The server has sent what is no valid message; it was ignored."""

    why: str


@dataclass(frozen=True)
class Failed:
    """The machine has ended; it sends nothing more by itself."""

    error: FedcoreError


Request: TypeAlias = Send | Publish | Withdraw | Pull | StopPull
Event: TypeAlias = (
    Joined
    | HeldElsewhere
    | Warned
    | Busy
    | Tasked
    | Pulled
    | Spoiled
    | Settled
    | Committed
    | Dropped
    | Stopped
    | Finished
    | Malformed
    | Failed
)
Output: TypeAlias = Request | Event


def serve(exchange: Exchange, output: Output) -> None:
    """Carry out a request about a set; other outputs are none of the data plane's."""
    if isinstance(output, Publish) and output.update is not None:
        update = output.update
        exchange.publish_encoded(
            bytes.fromhex(output.set_id),
            update.file,
            update.offsets,
            update.encodings,
            update.checksums,
        )
    elif isinstance(output, Withdraw):
        exchange.withdraw(bytes.fromhex(output.set_id))
