"""Where the server is, which site this is, and with what key: read from a kit folder or from the environment."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedcore.errors import ConfigError
from fedcore.quantities import parse_duration
from fedcore.security.keys import Credentials, Kit, check_address, check_name, is_loopback, load_kit
from fedcore.transport.proxy import Proxy

__all__ = ["SiteSettings"]

logger = logging.getLogger("fedcore.client")


@dataclass(frozen=True)
class SiteSettings:
    """A site's settings.

    Attributes:
        server: address of the server, ``tcp://HOST:PORT``, or several with commas in between.
        site: this site's name.
        credentials: this site's keys and the server's; None: plain text.
        work: folder for the global model and for the update until its round is over; None: a temporary one that is
            removed at the end, so that a process that is started again trains again.
        connect_timeout: seconds to wait for the server's first answer.
        idle_timeout: seconds of the server's silence after which a wait is given up.
        run: name or id of the run that is meant; None: whichever the server has.
        clip: the largest Euclidean norm that this site's change of the global model may have once it is decoded;
            None: no bound. No server can widen it.
        proxy: the way to the server; None: it is dialled directly.
    """

    server: str
    site: str
    credentials: Credentials | None = None
    work: Path | None = None
    connect_timeout: float = 60.0
    idle_timeout: float = 600.0
    run: str | None = None
    clip: float | None = None
    proxy: Proxy | None = None

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> SiteSettings:
        """Read the kit folder that ``FEDCORE_KIT`` names, or ``FEDCORE_SERVER`` and ``FEDCORE_SITE``.

        ``FEDCORE_SERVER`` and ``FEDCORE_RUN`` win over the kit's address and run. Without a kit the connection is
        plain text, which ``FEDCORE_INSECURE=1`` must ask for.

        Raises:
            ConfigError: something is missing, malformed, or would be sent in plain text unasked.
        """
        env = os.environ if environ is None else environ
        kit = load_kit(Path(env["FEDCORE_KIT"]), env) if env.get("FEDCORE_KIT") else None
        server = env.get("FEDCORE_SERVER") or (kit.server if kit else "")
        site = env.get("FEDCORE_SITE") or (kit.name if kit else "")
        if not server or not site:
            missing = " and ".join(
                name
                for name, value in (("FEDCORE_SERVER", server), ("FEDCORE_SITE", site))
                if not value
            )
            raise ConfigError(
                f"{missing} not set: this script does not know where its server is or which site it is. Set "
                "FEDCORE_KIT to the kit folder that `fedcore provision` made for this site, or start the script "
                "with `fedcore simulate`"
            )
        server = check_address(server, "FEDCORE_SERVER" if env.get("FEDCORE_SERVER") else "kit")
        check_name(site, "FEDCORE_SITE" if env.get("FEDCORE_SITE") else "kit")
        _check_keys(env, kit, server, site)
        work = Path(env["FEDCORE_WORK"]) if env.get("FEDCORE_WORK") else _default_work(env)
        if work is None:
            _no_work(site)
        return cls(
            server=server,
            site=site,
            credentials=kit.credentials if kit else None,
            work=work,
            run=check_name(env["FEDCORE_RUN"], "FEDCORE_RUN")
            if env.get("FEDCORE_RUN")
            else (kit.run if kit else None),
            connect_timeout=_seconds(env, "FEDCORE_CONNECT_TIMEOUT", cls.connect_timeout),
            idle_timeout=_seconds(env, "FEDCORE_IDLE_TIMEOUT", cls.idle_timeout),
            clip=clip_of(env),
            proxy=Proxy.from_environment(env, server),
        )


def _default_work(env: Mapping[str, str]) -> Path | None:
    """Return the user's folder for state that outlives a process, or None where it can't be written."""
    state = Path(env.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():
        home = Path(env.get("HOME", ""))
        if not home.is_absolute():
            return None
        state = home / ".local" / "state"
    there = next(folder for folder in (state, *state.parents) if folder.exists())
    return state / "fedcore" if os.access(there, os.W_OK | os.X_OK) else None


def _no_work(site: str) -> None:
    logger.warning(
        "%s: this user's home can't be written; an update is lost if this process is killed before it is "
        "delivered: set FEDCORE_WORK to a folder that stays", site,
    )  # fmt: skip


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name)
    if not text:
        return default
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def clip_of(env: Mapping[str, str]) -> float | None:
    """Return the bound on an update's norm that ``FEDCORE_CLIP`` sets; None: there is none.

    Raises:
        ConfigError: it is not a positive, finite number.
    """
    return _positive(env, "FEDCORE_CLIP")


def _positive(env: Mapping[str, str], name: str) -> float | None:
    text = env.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {text!r}: expected a positive, finite number")
    return value


def _check_keys(env: Mapping[str, str], kit: Kit | None, server: str, site: str) -> None:
    if kit is not None:
        if kit.name != site:
            raise ConfigError(
                f"FEDCORE_SITE is {site!r}, but the key in {env['FEDCORE_KIT']} is that of {kit.name!r}; unset "
                "FEDCORE_SITE"
            )
        return
    if env.get("FEDCORE_INSECURE") != "1":
        raise ConfigError(
            "FEDCORE_KIT not set: without a kit the connection would be plain text. Set it to the kit folder that "
            "`fedcore provision` made for this site, or FEDCORE_INSECURE=1 where the server is on this machine "
            "and its run file says server.insecure = true"
        )
    if not is_loopback(server) and env.get("FEDCORE_INSECURE_NETWORK") != "1":
        raise ConfigError(
            f"FEDCORE_INSECURE=1 is for a server on this machine, and {server} is not: everybody in between could "
            "read and change what is sent. Use a kit (FEDCORE_KIT), or insist with FEDCORE_INSECURE_NETWORK=1"
        )
