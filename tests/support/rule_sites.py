"""Sites of whole runs whose updates a test computes from their names and the round."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from fedcore.server.service import Server
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

__all__ = ["Update", "sites_of"]

Update = Callable[[str, int], np.ndarray]
"""Gives the binary32 values of tensor ``w`` by the site's name and the round."""


def site(update: Update, address: str, name: str, weight: int) -> int:
    """Take part in a whole run: each round's update is that of the test, and integers ``n`` stay as they are."""
    session = Session(SiteSettings(server=address, site=name, connect_timeout=200))
    count = len(update(name, 0))
    specs = [("w", "F32", [count]), ("n", "I64", [2])]
    try:
        while session.is_running():
            model = session.begin(specs, {}, lambda key: bytes({"w": 4 * count, "n": 16}[key]))
            session.score({"loss": 1.0}, 1)
            if model.kind == "evaluate":
                session.end_task()
                continue
            tensors = {"w": update(name, model.round).tobytes(), "n": bytes(model.tensors["n"])}
            session.submit(tensors.__getitem__, weight)
    finally:
        session.close()
    return 0


def sites_of(server: Server, names: str, update: Update) -> list[functools.partial[int]]:
    """Return what runs each site, named by a letter; they weigh 3, 10, 17 and so on."""
    return [
        functools.partial(site, update, server.endpoint, name, 3 + 7 * i)
        for i, name in enumerate(names)
    ]
