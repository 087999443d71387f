"""Who may connect to this server, and what each role may say.

The allow-list is a file that `fedcore admit` and `fedcore revoke` replace; the server looks at its time stamp
twice a second at most, between two messages. The server's own user is an operator of its run: a key for that lies
in the run folder while the server works.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedcore import protocol
from fedcore.clock import SYSTEM, Clock
from fedcore.config import RunConfig
from fedcore.errors import ConfigError
from fedcore.security.connections import Limits
from fedcore.security.door import Secured
from fedcore.security.keys import (
    ALLOW_FILE,
    KIT_FILE,
    LOCAL_KIT,
    AllowList,
    Credentials,
    Identity,
    KeyPair,
    Kit,
    Role,
    fingerprint,
    read_own_secret,
    write_kit,
)
from fedcore.transport.ends import ServerEnd
from fedcore.words import plural

__all__ = ["Access"]

_LOOK_SECONDS: Final = 0.5
_STANDING_SECONDS: Final = 5.0
"""For so long a list without a count must stay as it is before the keys that it has lost are revoked: an editor
may be writing it."""
_MAY_SAY: Final[dict[Role, tuple[type[protocol.Message], ...]]] = {
    Role.SITE: (
        protocol.Join,
        protocol.Declare,
        protocol.Ready,
        protocol.Score,
        protocol.Answer,
        protocol.Log,
        protocol.Alive,
        protocol.Problem,
        protocol.Leave,
    ),
    Role.OBSERVER: (protocol.StatusRequest, protocol.MetricsRequest),
    Role.OPERATOR: (protocol.StatusRequest, protocol.MetricsRequest, protocol.Command),
}

logger = logging.getLogger("fedcore.server")


@dataclass(frozen=True)
class _LocalKit:
    """The key that lies in a run folder while the server works."""

    folder: Path
    pair: KeyPair
    operator: Identity

    @classmethod
    def of(cls, folder: Path) -> _LocalKit:
        pair = KeyPair.generate()
        who = Identity("run-folder", Role.OPERATOR, fingerprint(pair.public))
        return cls(folder, pair, who)


class Access:
    """The keys of one server process.

    Args:
        config: the run file, which names the keys.
        clock: when the allow-list is looked at.
        others: the run files of further runs of the process.

    Attributes:
        secured: for the link; None where the run file asks for plain text.

    Raises:
        ConfigError: the run file names no keys and does not ask for plain text either, or the keys are damaged.
    """

    def __init__(
        self, config: RunConfig, clock: Clock = SYSTEM, others: Sequence[RunConfig] = ()
    ) -> None:
        self._clock = clock
        self._locals: list[_LocalKit] = []
        self.secured: Secured | None = None
        self._link: ServerEnd | None = None
        self._folders: list[Path] = []
        self._next_look = 0.0
        if config.server.insecure:
            return
        home = config.keys_folder
        if home is None:
            raise ConfigError(
                "server.keys: missing; it names the server's kit, which `fedcore provision` makes. For plain text "
                "between processes of this machine, set server.insecure = true"
            )
        self._path = home / ALLOW_FILE
        if not self._path.is_file():
            raise ConfigError(f"server.keys: {home} {_no_server_kit(home)}")
        self._stamp = self._look()
        self._listed = AllowList.load(self._path)
        self._takes_up: tuple[AllowList, float] | None = None
        self._locals = [_LocalKit.of(run.run_folder) for run in (config, *others)]
        self.secured = Secured(
            read_own_secret(home),
            self._with_operator(self._listed),
            Limits.of(
                sum(run.participants.expected for run in (config, *others)), config.server.memory
            ),
        )

    def _with_operator(self, listed: AllowList) -> AllowList:
        own = {kit.pair.public: kit.operator for kit in self._locals}
        return AllowList({**listed.keys, **own})

    def opened(self, link: ServerEnd, folders: Sequence[Path]) -> None:
        """Leave a kit in each run folder that is served, for the commands of this server's own user."""
        self._link = link
        for folder in folders:
            self.enter(folder)

    def enter(self, folder: Path) -> None:
        """Leave a kit in a run folder that is served from now on."""
        assert self._link is not None
        self._folders.append(folder)
        self._remove_local(folder)
        kit = next((kit for kit in self._locals if kit.folder == folder), None)
        if self.secured is not None and kit is not None:
            credentials = Credentials(self.secured.pair.public, kit.pair)
            write_kit(folder / LOCAL_KIT, Kit(kit.operator.name, self._link.endpoint, credentials))

    def leave(self, folder: Path) -> None:
        """Take the kit out of a run folder that is not served any more: another server may put its own there."""
        if folder in self._folders:
            self._remove_local(folder)
            self._folders.remove(folder)

    def close(self) -> None:
        """Take those kits away."""
        self._remove_local(*self._folders)

    @staticmethod
    def _remove_local(*folders: Path) -> None:
        for folder in folders:
            path = folder / LOCAL_KIT
            # Whoever put a link there does not choose where a secret is written.
            if path.is_symlink():
                path.unlink()
            shutil.rmtree(path, ignore_errors=True)

    # --- who may say what ---

    def refusal(self, peer: bytes, message: protocol.FromSite) -> protocol.Refused | None:
        """Return why this peer may not say this, or None if it may; without keys everybody may."""
        if self.secured is None:
            return None
        who = Identity.of_peer(peer)
        if who is None:
            return protocol.Refused(code="role", message="the connection has no name")
        if not isinstance(message, _MAY_SAY[who.role]):
            return protocol.Refused(code="role", message=_denied(who, message))
        if isinstance(message, protocol.Join) and message.site != who.name:
            text = f"the key is that of {who.name}, and it says that it is {message.site}"
            return protocol.Refused(code="name", message=text)
        return None

    def folder_of(self, peer: bytes) -> Path | None:
        """Return the run folder whose kit a peer has; None for any other key."""
        who = Identity.of_peer(peer)
        return next((kit.folder for kit in self._locals if kit.operator == who), None)

    def without_key(self, sites: Sequence[str] | None, count: int | None) -> str | None:
        """Return which sites of a run no key admits, and what to do; None if there are none, or no keys at all.

        Args:
            sites: the names of the run's sites; None: any ``count`` of them.
        """
        if self.secured is None:
            return None
        having = {who.name for who in self._listed.keys.values() if who.role is Role.SITE}
        missing = sorted(set(sites or ()) - having)
        how = (
            "name them in the project file and call `fedcore provision` again, or admit a key that they made with "
            "`fedcore keygen`: fedcore admit "
            f"{missing[0] if missing else 'NAME'} PUBLIC_KEY --server-kit {self._path.parent}"
        )
        if missing:
            few = ", ".join(missing[:10]) + (
                f" and {len(missing) - 10} more" if missing[10:] else ""
            )
            return f"no key of the allow-list is that of site {few}, so it can't connect; {how}"
        if count is not None and len(having) < count:
            return f"the run expects {plural(count, 'site')}, and the allow-list has keys of {len(having)}; {how}"
        return None

    def knows(self, name: str) -> bool:
        """Whether a key of this name is on the list; without keys every name is."""
        return self.secured is None or any(who.name == name for who in self._listed.keys.values())

    # --- revocation ---

    def revoked(self) -> list[Identity]:
        """Return whose keys were taken off the list since the last call; their messages are dropped."""
        now = self._clock.monotonic()
        if self.secured is None or now < self._next_look:
            return []
        self._next_look = now + _LOOK_SECONDS
        stamp = self._look()
        if stamp == self._stamp:
            if self._takes_up is None or now < self._takes_up[1]:
                return []
            (listed, _), self._takes_up = self._takes_up, None
            return self._take(listed)
        self._stamp, self._takes_up = stamp, None
        try:
            listed = AllowList.load(self._path)
        except ConfigError as error:
            logger.error("the allow-list stays as it was: %s", error)
            return []
        return self._take(listed if listed.counted else self._without_losses(listed, now))

    def _without_losses(self, listed: AllowList, now: float) -> AllowList:
        """Return what is taken up of a list at once: nothing that it has lost, as it may be half written."""
        before = self._listed.keys
        lost = {key: who for key, who in before.items() if listed.keys.get(key) != who}
        if not lost:
            return listed
        names = ", ".join(sorted({who.name for who in lost.values()}))
        self._takes_up = (listed, now + _STANDING_SECONDS)
        logger.warning(
            "the allow-list has lost keys of %s, but not by `fedcore revoke`: they are revoked in %g s if %s "
            "stays as it is", names, _STANDING_SECONDS, self._path,
        )  # fmt: skip
        return AllowList({**listed.keys, **lost})

    def _take(self, listed: AllowList) -> list[Identity]:
        assert self._link is not None
        before, self._listed = self._listed, listed
        gone = [who for key, who in before.keys.items() if listed.keys.get(key) != who]
        self._link.admit(self._with_operator(listed))
        for who in gone:
            self._link.block(who.user)
            logger.warning("the key %s of %s (%s) was revoked", who.fingerprint, who.name, who.role)
        for key, who in listed.keys.items():
            if before.keys.get(key) != who:
                self._link.block(who.user, False)
                logger.info(
                    "the key %s of %s (%s) is admitted", who.fingerprint, who.name, who.role
                )
        return gone

    def _look(self) -> tuple[int, int, int] | None:
        with contextlib.suppress(OSError):
            about = self._path.stat()
            return about.st_ino, about.st_mtime_ns, about.st_size
        return None


def _denied(who: Identity, message: protocol.FromSite) -> str:
    """Return why a role may not send a message, and whose kit may."""
    article = "a" if who.role is Role.SITE else "an"
    may = [role for role, kinds in _MAY_SAY.items() if isinstance(message, kinds)]
    if isinstance(message, protocol.Command):
        deed = {"pause": "pause a run", "resume": "resume a run", "stop": "stop a run"}
        what = deed.get(message.action, "have a model scored")
    elif isinstance(message, protocol.StatusRequest | protocol.MetricsRequest):
        what = "ask for the status"
    else:
        what = "take part in a run"
    kits = " or ".join(f"{'a' if role is Role.SITE else 'an'} {role}'s" for role in may)
    return f"{who.name} is {article} {who.role}, which cannot {what}; use {kits} kit"


def _no_server_kit(home: Path) -> str:
    """Return what a folder is that a run file names for the server's kit, and which command makes one."""
    make = "`fedcore provision project.toml` makes the server's kit, kits/server"
    if (home / KIT_FILE).is_file():
        return f"is the kit of a site, an observer or an operator, and not the server's; {make}"
    if (home / "server" / ALLOW_FILE).is_file():
        return f"holds the kits of a project; name the server's: {home / 'server'}"
    if home.is_dir():
        return f"is no server's kit: it holds no {ALLOW_FILE}; {make}"
    if home.exists():
        return f"is a file; name the folder of the server's kit; {make}"
    return f"does not exist; {make}"
