"""The site's half of a collection without a link: a machine announces an update, an exchange holds its chunks."""

from __future__ import annotations

from fedcore import protocol
from fedcore._core import Exchange
from fedcore.encoding import EncodedUpdate
from fedcore.site import outputs as out
from fedcore.site.machine import SiteMachine
from fedcore.site.settings import SiteSettings


def offer(exchange: Exchange, site: str, set_id: bytes, update: EncodedUpdate) -> SiteMachine:
    """Publish an update as a site does; return the site's machine."""
    machine = SiteMachine(SiteSettings(server="tcp://127.0.0.1:1", site=site))
    named = protocol.NamedSet(id=set_id.hex(), layout="0" * 64)
    machine.publish(protocol.Ready(round=1, sets=[named], weight=1), update)
    for output in machine.take_outputs():
        out.serve(exchange, output)
    return machine
