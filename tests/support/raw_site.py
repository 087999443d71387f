"""A site that sends control messages one by one."""

from __future__ import annotations

import time
from typing import Any
from uuid import uuid4

from fedcore import protocol
from fedcore.transport.link import Control, SiteLink

DEADLINE = 20.0


class RawSite:
    """Speaks the control messages one by one."""

    def __init__(self, address: str, name: str) -> None:
        self.link = SiteLink(address, uuid4().bytes)
        self.link.send(protocol.Join(version="test", site=name, instance=uuid4().hex))
        self.await_message(protocol.Welcome)

    def await_message(self, kind: type[Any]) -> Any:
        until = time.monotonic() + DEADLINE
        while time.monotonic() < until:
            arrived = self.link.recv(until - time.monotonic())
            if isinstance(arrived, Control):
                message = protocol.decode_from_server(arrived.body)
                if isinstance(message, kind):
                    return message
        raise AssertionError(f"no {kind.__name__} arrived")
