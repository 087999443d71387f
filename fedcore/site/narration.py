"""The lines of a site's log: what happens to a site machine, in words."""

from __future__ import annotations

import logging

from fedcore.words import plural

from . import outputs as out
from .settings import SiteSettings

__all__ = ["narrate"]

logger = logging.getLogger("fedcore.client")


def narrate(settings: SiteSettings, event: out.Output) -> None:
    """Write what an event means for a site to its log; not every event is worth a line."""
    site, server = settings.site, settings.server
    match event:
        case out.Joined(run):
            logger.info("%s: joined run %s at %s", site, run, server)
        case out.HeldElsewhere():
            logger.warning(
                "site %s is still held by an earlier connection; waiting for up to %g s",
                site, settings.connect_timeout,
            )  # fmt: skip
        case out.Busy(why):
            logger.warning(
                "%s: the server at %s does not take this site up yet: %s; asking again for up to %g s",
                site, server, why, settings.connect_timeout,
            )  # fmt: skip
        case out.Warned(text):
            logger.warning("%s: %s", site, text)
        case out.Spoiled(seconds):
            logger.warning(
                "%s: the model that came is not the one that the server recorded; it is downloaded again in "
                "%.0f s",
                site, seconds,
            )  # fmt: skip
        case out.Settled(ready, counts, late=True) if ready.round:
            logger.log(
                logging.INFO if counts else logging.WARNING,
                "%s: round %d is committed, %s",
                site, ready.round,
                "with this site's update" if counts else "without this site's update, which does not count",
            )  # fmt: skip
        case out.Committed(commit, rounds) if commit.version:
            logger.info(
                "%s: round %d of %d is committed (%s%s)%s",
                site, commit.version, rounds, plural(len(commit.participants), "site"),
                "" if commit.included else ", without this one",
                f": {commit.message}" if commit.message else "",
            )  # fmt: skip
        case out.Dropped(round_, why):
            logger.warning("%s: %s%s", site, f"round {round_}: " if round_ else "", why)
        case out.Stopped(why):
            logger.warning(
                "%s: the server at %s has stopped because %s; waiting for it to be started again, for up to %g s",
                site, server, why, settings.idle_timeout,
            )  # fmt: skip
        case out.Malformed(why):
            logger.error("%s: the server at %s sent a %s", site, server, why)
