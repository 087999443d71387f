"""A host's link as one of its runs sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedcore import protocol
from fedcore.outlet import Outlet
from fedcore.transport.ends import ServerEnd

if TYPE_CHECKING:
    from fedcore._core import Exchange

__all__ = ["RunLink"]


class RunLink:
    """Sends messages that name their run, and publishes sets for the run's peers alone.

    Args:
        link: the host's.
        run_id: the run's id.
        audience: the run's number at this host, from 1; what is published for it is unknown to other peers.

    Attributes:
        outlet: the way out of the run's control messages (peer, message): while it is held, they wait, and those
            of no other run do.
    """

    def __init__(self, link: ServerEnd, run_id: str, audience: int) -> None:
        self._link = link
        self._run_id = run_id
        self.audience = audience
        self.outlet = Outlet(self._send)

    @property
    def exchange(self) -> Exchange:
        """The data plane, which all runs share."""
        return self._link.exchange

    @property
    def endpoint(self) -> str:
        """The address that sites dial."""
        return self._link.endpoint

    def send(self, peer: bytes, message: protocol.FromServer) -> None:
        """Queue a control message for ``peer``; a peer that is gone does not get it."""
        if isinstance(message, protocol.OfRun) and message.run_id is None:
            message = message.model_copy(update={"run_id": self._run_id})
        self.outlet.put((peer, message))

    def _send(self, item: tuple[bytes, protocol.FromServer]) -> None:
        self._link.send(*item)

    def kick(self) -> None:
        """Have frames sent, after the exchange was given something to do."""
        self._link.kick()

    def wake(self) -> None:
        """Have the server look at what is due; safe from another thread."""
        self._link.wake()

    def enrol(self, peer: bytes) -> None:
        """Let a peer pull what the run publishes."""
        self.exchange.enrol(peer, self.audience)

    def expel(self, peer: bytes) -> None:
        """Do not let a peer pull any more; nothing where it is in another run by now."""
        self.exchange.expel(peer, self.audience)

    def stats(self) -> dict[str, int]:
        """Return the bytes and frames of the run's peers."""
        return self.exchange.stats_of(self.audience)

    def restrict(self, set_id: bytes) -> None:
        """Make a set unknown to all but the run's peers."""
        self.exchange.restrict(set_id, self.audience)
