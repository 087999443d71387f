"""How long a server waits for what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["DEFAULT", "Timing"]


@dataclass(frozen=True)
class Timing:
    """Waits that no run file sets; all in seconds.

    Attributes:
        check: the sites and the allow-list are looked at so often, where nothing happens sooner.
        goodbye: after the end of a run, its sites may take so long to leave.
        data_silence: a site that answers, but sends nothing of its update for so long, is lost. What is on its way
            on a slow link keeps its answers back, too.
        listeners: at the end of the process, listeners may take so long with the events that wait for them.
    """

    check: float = 0.5
    goodbye: float = 3.0
    data_silence: float = 10.0
    listeners: float = 5.0


DEFAULT: Final = Timing()
