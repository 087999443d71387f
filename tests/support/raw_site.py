"""A site that sends control messages one by one."""

from __future__ import annotations

import time
from typing import Any

from fedcore import protocol
from fedcore.site.machine import SiteMachine
from fedcore.site.outputs import Send
from fedcore.site.settings import SiteSettings
from fedcore.transport.link import Control, SiteLink

DEADLINE = 200.0


class RawSite:
    """Speaks the control messages one by one."""

    def __init__(self, address: str, name: str) -> None:
        machine = SiteMachine(SiteSettings(server=address, site=name))
        self.link = SiteLink(address, machine.instance.bytes)
        machine.join(time.monotonic())
        for output in machine.take_outputs():
            assert isinstance(output, Send)
            self.link.send(output.message)
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
