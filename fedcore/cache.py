"""Where downloads are kept."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import ConfigError

__all__ = ["cache_folder"]


def cache_folder(given: Path | None = None) -> Path:
    """Return the folder for downloads: ``given``, else ``FEDCORE_CACHE``, else ``~/.cache/fedcore``.

    Where this user has no home folder to write to, libraries that are loaded later keep their caches in it, too.

    Raises:
        ConfigError: there is none, as this user has no home folder, or it can't be made.
    """
    chosen = given or Path(os.environ.get("FEDCORE_CACHE") or _in_home())
    try:
        chosen.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cannot make the folder for downloads {chosen}: {error.strerror}; name another one with --cache or "
            "FEDCORE_CACHE"
        ) from None
    if not _home_is_usable():
        # Libraries that keep a cache of their own would make a folder that is called "~", or fail.
        os.environ.setdefault("XDG_CACHE_HOME", str(chosen.resolve()))
    return chosen


def _home_is_usable() -> bool:
    try:
        return os.access(Path.home(), os.W_OK)
    except RuntimeError:
        return False


def _in_home() -> Path:
    try:
        return Path.home() / ".cache" / "fedcore"
    except RuntimeError:
        raise ConfigError(
            "this user has no home folder to keep downloads in: name a folder with --cache or FEDCORE_CACHE"
        ) from None
