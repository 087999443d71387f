"""Make the server's keys and everybody's kits from a project file, and change who is admitted."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fedcore.errors import ConfigError, StorageError

from .keys import (
    ALLOW_FILE,
    KIT_FILE,
    SECRET_FILE,
    AllowList,
    Credentials,
    KeyPair,
    Kit,
    Role,
    check_name,
    check_reachable,
    edited,
    load_kit,
    read_secret,
    read_toml,
    write_kit,
    write_secret,
)

__all__ = [
    "Project",
    "Provisioned",
    "admit",
    "load_project",
    "make_key",
    "new_server",
    "provision",
    "revoke",
]

SERVER_FOLDER: Final = "server"
PUBLIC_FILE: Final = "public.key"


@dataclass(frozen=True)
class Project:
    """Who takes part in a project, the address of its server, and the run that the kits are for; None: any."""

    server: str
    parties: dict[str, Role]
    run: str | None = None


@dataclass
class Provisioned:
    """What `provision` did: the kits that it made, and the names that were admitted before."""

    server: Path
    kits: dict[str, Path] = field(default_factory=dict)
    admitted: list[str] = field(default_factory=list)


def load_project(path: Path) -> Project:
    """Read a project file: ``[project]`` with ``server``, ``sites``, maybe ``observers``, ``operators``, ``run``.

    Raises:
        ConfigError: a key is missing, unknown or wrong, or a name comes twice.
    """
    values = read_toml(path)
    section = values.pop("project", None)
    if not isinstance(section, dict) or values:
        raise ConfigError(f"{path}: expected one section, [project]")
    server = check_reachable(section.pop("server", None), f"{path}: project.server")
    run = section.pop("run", None)
    if run is not None:
        check_name(run, f"{path}: project.run")
    parties: dict[str, Role] = {}
    for role in Role:
        key = f"{role}s"
        names = section.pop(key, [])
        if not isinstance(names, list):
            raise ConfigError(f"{path}: project.{key}: expected a list of names")
        for name in names:
            if check_name(name, f"{path}: project.{key}") in parties or name == SERVER_FOLDER:
                raise ConfigError(f"{path}: project.{key}: the name {name!r} is taken")
            parties[name] = role
    if section:
        raise ConfigError(
            f"{path}: unknown key 'project.{min(section)}'; expected server, sites, observers, "
            "operators and run"
        )
    if Role.SITE not in parties.values():
        raise ConfigError(f"{path}: project.sites: expected at least one name")
    return Project(server, parties, run)


def new_server(folder: Path) -> KeyPair:
    """Make the server's kit: its key pair and an empty allow-list. Returns the pair."""
    pair = KeyPair.generate()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        write_secret(folder / SECRET_FILE, pair)
        (folder / PUBLIC_FILE).write_text(pair.public + "\n", encoding="utf-8")
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}") from None
    AllowList({}).save(folder / ALLOW_FILE)
    return pair


def provision(project: Project, out: Path) -> Provisioned:
    """Write ``out/server`` and one kit per party that the server does not admit yet.

    Called again with more parties, it makes kits for the new ones alone and leaves keys as they are. All or
    nothing: where it fails, what it has made is removed, and what was there before is as it was.

    Raises:
        StorageError: a file can't be written.
        ConfigError: what is in ``out`` is damaged, or contradicts the project file.
    """
    home = out / SERVER_FOLDER
    done = Provisioned(home)
    with contextlib.ExitStack() as written:
        if (home / SECRET_FILE).exists():
            pair = read_secret(home / SECRET_FILE)
        else:
            written.enter_context(_put_back(home, SECRET_FILE, PUBLIC_FILE, ALLOW_FILE))
            pair = new_server(home)
        with edited(home / ALLOW_FILE) as cell:
            for name, role in project.parties.items():
                known = cell[0].of_name(name)
                if any(who.role != role for who in known.values()):
                    raise ConfigError(
                        f"{name} is admitted with another role; `fedcore revoke` it first"
                    )
                if known:
                    done.admitted.append(name)
                    continue
                own = KeyPair.generate()
                written.enter_context(_put_back(out / name, SECRET_FILE, KIT_FILE))
                credentials = Credentials(pair.public, own)
                write_kit(out / name, Kit(name, project.server, credentials, project.run))
                cell[0] = cell[0].admit(name, role, own.public)
                done.kits[name] = out / name
    return done


@contextlib.contextmanager
def _put_back(folder: Path, *names: str) -> Iterator[None]:
    """Where the block fails, put a folder and these files of it back as they were, or remove what was not there.

    Raises:
        StorageError: what is there can't be read.
    """
    missing = [part for part in (folder, *folder.parents) if not os.path.lexists(part)]
    paths = [folder / name for name in names]
    try:
        before = {path: _state(path) for path in paths if os.path.lexists(path)}
        mode = stat.S_IMODE(folder.stat().st_mode) if folder.exists() else None
    except OSError as error:
        raise StorageError(f"cannot read {folder}: {error.strerror}") from None
    try:
        yield
    except BaseException:
        for path in paths:
            with contextlib.suppress(OSError):  # the error that is on its way says more
                if path not in before:
                    path.unlink()
                elif (was := before[path]) is not None and _state(path) != was:
                    path.write_bytes(was[1])
                    path.chmod(was[0])
        for part in missing:  # from within outwards
            with contextlib.suppress(OSError):
                part.rmdir()
        if mode is not None:
            with contextlib.suppress(OSError):
                folder.chmod(mode)
        raise


def _state(path: Path) -> tuple[int, bytes] | None:
    """Return a plain file's mode and bytes; None of anything else, and of a secret, which nobody writes over."""
    if path.is_symlink() or not path.is_file() or path.name == SECRET_FILE:
        return None
    return stat.S_IMODE(path.stat().st_mode), path.read_bytes()


def make_key(folder: Path, like: Path | None, server: str, server_key: str, name: str) -> Kit:
    """Make a kit whose secret never leaves this machine; ``like`` is a kit to take what is left empty from."""
    run = None
    if like is not None:
        old = load_kit(like)
        run = old.run
        server = server or old.server
        server_key = server_key or old.credentials.server_key
        name = name or old.name
    check_reachable(server, "--server")
    kit = Kit(name, server, Credentials(server_key, KeyPair.generate()), run)
    write_kit(folder, kit)
    return kit


def admit(server_kit: Path, name: str, role: Role, public: str) -> int:
    """Admit a key; returns how many keys the name has now."""
    with edited(server_kit / ALLOW_FILE) as cell:
        cell[0] = cell[0].admit(name, role, public)
        return len(cell[0].of_name(name))


def revoke(server_kit: Path, name: str, public: str | None = None) -> int:
    """Revoke a name's keys, or one of them; returns how many it has left."""
    with edited(server_kit / ALLOW_FILE) as cell:
        cell[0] = cell[0].revoke(name, public)
        return len(cell[0].of_name(name))
