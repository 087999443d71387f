"""Where the server is and which site this is: read from the environment or from a kit folder."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedcore.config import parse_duration
from fedcore.errors import ConfigError
from fedcore.protocol import SITE_NAME

__all__ = ["SiteSettings"]


@dataclass(frozen=True)
class SiteSettings:
    """A site's settings.

    Attributes:
        server: address of the server, ``tcp://HOST:PORT``.
        site: this site's name.
        work: folder for scratch files and for the update until its round is over; None: a temporary one that is
            removed at the end, so that a process that is started again trains again.
        connect_timeout: seconds to wait for the server's first answer.
        idle_timeout: seconds of the server's silence after which a wait is given up.
    """

    server: str
    site: str
    work: Path | None = None
    connect_timeout: float = 60.0
    idle_timeout: float = 600.0

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> SiteSettings:
        """Read ``FEDCORE_SERVER`` and ``FEDCORE_SITE``, or the kit folder that ``FEDCORE_KIT`` names.

        A kit folder holds ``kit.toml`` with ``server`` and ``site``; the environment wins over it.
        """
        env = os.environ if environ is None else environ
        kit = _read_kit(Path(env["FEDCORE_KIT"])) if env.get("FEDCORE_KIT") else {}
        server = env.get("FEDCORE_SERVER") or kit.get("server", "")
        site = env.get("FEDCORE_SITE") or kit.get("site", "")
        if not server or not site:
            missing = " and ".join(
                name
                for name, value in (("FEDCORE_SERVER", server), ("FEDCORE_SITE", site))
                if not value
            )
            raise ConfigError(
                f"{missing} not set: this script does not know where its server is or which site it is. Set "
                "FEDCORE_SERVER=tcp://HOST:PORT and FEDCORE_SITE=NAME, or FEDCORE_KIT to a folder with a "
                "kit.toml, or start the script with `fedcore simulate`"
            )
        if not re.fullmatch(r"tcp://[^\s/]+:\d{1,5}", server):
            raise ConfigError(f"server address {server!r}: expected tcp://HOST:PORT")
        if not re.match(SITE_NAME, site):
            raise ConfigError(
                f"site name {site!r}: expected 1 to 63 letters, digits, '.', '_' or '-', beginning with a "
                "letter or digit"
            )
        return cls(
            server=server,
            site=site,
            work=Path(env["FEDCORE_WORK"]) if env.get("FEDCORE_WORK") else _default_work(env),
            connect_timeout=_seconds(env, "FEDCORE_CONNECT_TIMEOUT", cls.connect_timeout),
            idle_timeout=_seconds(env, "FEDCORE_IDLE_TIMEOUT", cls.idle_timeout),
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


def _seconds(env: Mapping[str, str], name: str, default: float) -> float:
    text = env.get(name)
    if not text:
        return default
    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def _read_kit(folder: Path) -> dict[str, str]:
    path = folder / "kit.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"FEDCORE_KIT: cannot read {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"FEDCORE_KIT: {path} is not valid TOML: {error}") from None
    kit: dict[str, str] = {}
    for key in ("server", "site"):
        value = values.pop(key, "")
        if not isinstance(value, str):
            raise ConfigError(f"{path}: {key}: expected a text, got {value!r}")
        kit[key] = value
    if values:
        raise ConfigError(f"{path}: unknown key {sorted(values)[0]!r}; expected server and site")
    return kit
