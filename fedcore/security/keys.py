"""Keys, kits and the allow-list: who is who on a port that anybody can reach.

Each party has a CURVE25519 key pair (ZeroMQ's CURVE, RFC 26). The server knows the public keys of those that may
connect, with a name and a role for each; a site knows the server's. A name comes from its key and from nothing
that its owner says.
"""

from __future__ import annotations

import enum
import hashlib
import ipaddress
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fedcore.errors import ConfigError, StorageError
from fedcore.protocol import SITE_NAME
from fedcore.replacing import place_of, put_in_place

from .mounts import find_mount, is_secret_mount, others_can_replace

__all__ = [
    "AllowList",
    "Credentials",
    "Identity",
    "KeyPair",
    "Kit",
    "Role",
    "check_key",
    "load_kit",
    "read_own_secret",
    "read_secret",
    "write_kit",
    "write_secret",
]

ALLOW_FILE: Final = "allow.toml"
KIT_FILE: Final = "kit.toml"
SECRET_FILE: Final = "secret.key"
SECRET_ENV: Final = "FEDCORE_SECRET_KEY_FILE"
"""Environment variable that names the file with this party's secret key, in place of the kit's own."""
LOCAL_KIT: Final = "local"
"""Folder in a run folder: an operator's kit for the server that works on it."""
MAX_KEYS_PER_NAME: Final = 2
"""The one in use and the one that takes its place."""
_Z85: Final = re.compile(r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_MAX_FILE: Final = 16 << 20
_ADDRESS: Final = re.compile(r"tcp://[^\s/\"\\]+:[0-9]{1,5}")


class Role(enum.StrEnum):
    """What a key may do: take part, look on, or look on and steer."""

    SITE = "site"
    OBSERVER = "observer"
    OPERATOR = "operator"


@dataclass(frozen=True)
class Identity:
    """Whose key a connection has.

    Attributes:
        fingerprint: the first 16 hexadecimal digits of the SHA-256 of the public key's text.
    """

    name: str
    role: Role
    fingerprint: str

    @property
    def user(self) -> str:
        """The text by which the link knows the owner of a connection."""
        return f"{self.role}/{self.name}/{self.fingerprint}"

    @classmethod
    def of_peer(cls, peer: bytes) -> Identity | None:
        """Return who a peer of an encrypted `ServerLink` is; None for one of a plain link."""
        user, found, _ = peer.partition(b"\0")
        parts = user.decode("ascii", "replace").split("/")
        if not found or len(parts) != 3 or parts[0] not in tuple(Role):
            return None
        return cls(parts[1], Role(parts[0]), parts[2])


@dataclass(frozen=True)
class KeyPair:
    """A CURVE key pair, each half 40 characters of Z85 (RFC 32). The secret half is never shown."""

    public: str
    secret: str = field(repr=False)

    @classmethod
    def generate(cls) -> KeyPair:
        """Make a new pair from the system's random numbers; its public half is no option of a command."""
        import zmq

        public, secret = zmq.curve_keypair()
        while public.startswith(b"-"):
            public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    @classmethod
    def from_secret(cls, secret: str) -> KeyPair:
        """Return the pair that a secret half belongs to."""
        import zmq

        return cls(zmq.curve_public(secret.encode()).decode(), secret)


@dataclass(frozen=True)
class Credentials:
    """What one end needs to dial: its own pair, and the public key that the server must have."""

    server_key: str
    pair: KeyPair


@dataclass(frozen=True)
class Kit:
    """A kit folder's content: who its owner is, where the server is, and which run is meant, if it says so."""

    name: str
    server: str
    credentials: Credentials
    run: str | None = None


def fingerprint(public: str) -> str:
    """Return the short form of a public key that logs show."""
    return hashlib.sha256(public.encode()).hexdigest()[:16]


def check_key(value: object, where: str) -> str:
    """Return ``value`` if it is a public key, else raise ConfigError with ``where`` it was found."""
    if not isinstance(value, str) or _Z85.fullmatch(value) is None:
        raise ConfigError(
            f"{where}: expected a public key of 40 characters (Z85), as `fedcore keygen` prints it"
        )
    return value


def check_name(value: object, where: str) -> str:
    """Return ``value`` if it may be a name, and so a part of a path, else raise ConfigError."""
    if not isinstance(value, str) or re.fullmatch(SITE_NAME, value) is None or value.endswith("\n"):
        hint = ""
        if isinstance(value, str) and value != value.strip():
            hint = "; there is white space or a line break around it"
        raise ConfigError(
            f"{where}: name {value!r}: expected 1 to 63 letters, digits, '.', '_' or '-', beginning with "
            f"a letter or digit{hint}"
        )
    return value


def check_address(value: object, where: str) -> str:
    """Return an address to dial, or several of one server with commas in between, else raise ConfigError.

    A list of addresses becomes such a text.
    """
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        value = ",".join(value)
    if isinstance(value, str) and "," in value:
        return ",".join(check_address(one.strip(), where) for one in value.split(","))
    if not isinstance(value, str) or _ADDRESS.fullmatch(value) is None:
        hint = (
            "; it ends in white space" if isinstance(value, str) and value != value.rstrip() else ""
        )
        raise ConfigError(f"{where}: address {value!r}: expected tcp://HOST:PORT{hint}")
    if not 1 <= int(value.rpartition(":")[2]) <= 65535:
        raise ConfigError(f"{where}: address {value!r}: expected a port from 1 to 65535")
    return value


def check_reachable(value: object, where: str) -> str:
    """As `check_address`, but of addresses that other machines can dial."""
    checked = check_address(value, where)
    for address in checked.split(","):
        host = address.removeprefix("tcp://").rpartition(":")[0]
        if _is_unspecified(host.strip("[]")):
            raise ConfigError(
                f"{where}: address {address!r}: {host} stands for all addresses of the machine that listens "
                "there, and cannot be dialled; give the name or address by which the sites reach the server"
            )
    return checked


def _is_unspecified(host: str) -> bool:
    try:
        return host == "*" or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def is_loopback(address: str) -> bool:
    """Whether an address (``tcp://HOST:PORT``), or each of several, is reached from this machine alone."""
    if "," in address:
        return all(map(is_loopback, address.split(",")))
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- secrets -----------------------------------------------------------------------------------------


def write_secret(path: Path, pair: KeyPair) -> None:
    """Write a secret key to a new file that nobody else can read.

    Raises:
        StorageError: the file exists, or can't be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        number = os.open(path, flags, 0o600)
    except FileExistsError:
        raise StorageError(f"{path} exists; a secret key is never written over") from None
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from None
    with os.fdopen(number, "w", encoding="ascii") as file:
        os.fchmod(number, 0o600)
        file.write(pair.secret + "\n")
        file.flush()
        os.fsync(number)


def read_secret(path: Path) -> KeyPair:
    """Read a secret key.

    On a mount that a container platform fills (`fedcore.security.mounts`), the file may be a link within
    that mount, and others may read it: whoever sees the mount is in this container.

    Raises:
        ConfigError: the file is not there, not this user's alone, no plain file, or holds no key.
    """
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"cannot read the secret key {path}: {error.strerror}") from None
    try:
        real = Path(f"/proc/self/fd/{number}").readlink()
        mounted = is_secret_mount(real)
        about = os.fstat(number)
        if path.is_symlink() and not (mounted and _links_stay_on_the_mount(path, real)):
            raise ConfigError(
                f"cannot read the secret key {path}: it is a link; put the file itself there, or name it "
                f"with {SECRET_ENV}"
            )
        if not stat.S_ISREG(about.st_mode):
            what = "is a folder" if stat.S_ISDIR(about.st_mode) else "is no plain file"
            raise ConfigError(f"{path} {what}; expected a plain file with a secret key")
        _check_secret_mode(path, about, mounted)
        text = os.read(number, 100).decode("ascii", "replace").strip()
    finally:
        os.close(number)
    if _Z85.fullmatch(text) is None:
        raise ConfigError(f"{path}: expected a secret key of 40 characters (Z85)")
    return KeyPair.from_secret(text)


def _links_stay_on_the_mount(path: Path, real: Path) -> bool:
    """Whether the link that ``path`` is lies on the mount of its target, and nobody else can exchange it."""
    home = path.parent.resolve()
    same = find_mount(home) == find_mount(real)
    owned = path.lstat().st_uid in (os.geteuid(), 0)
    return same and owned and not others_can_replace(home) and not others_can_replace(real.parent)


def _check_secret_mode(path: Path, about: os.stat_result, mounted: bool) -> None:
    mode = stat.S_IMODE(about.st_mode)
    if mode & (0o022 if mounted else 0o077):
        raise ConfigError(
            f"{path} can be read or written by others (mode {mode:04o}); run `chmod 600 {path}`, and if "
            "somebody else may have read it, make a new key (`fedcore keygen`) and revoke this one. A secret that "
            "a container platform mounts may be readable by others if the mount is read-only or memory-backed"
        )
    if about.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{path} belongs to another user; a secret key is its user's own")


def secret_file(folder: Path, environ: Mapping[str, str] | None = None) -> Path:
    """Return the file of a kit's secret key: the one that ``FEDCORE_SECRET_KEY_FILE`` names, or the kit's own.

    A link that the variable names is followed: who sets it has chosen the file.

    Raises:
        ConfigError: the variable names a link that leads nowhere.
    """
    named = (os.environ if environ is None else environ).get(SECRET_ENV)
    if not named:
        return folder / SECRET_FILE
    path = Path(named)
    try:
        return path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError) as error:  # links in a circle are a RuntimeError
        raise ConfigError(f"{SECRET_ENV}: cannot find {named}: {error}") from None


def read_own_secret(folder: Path, environ: Mapping[str, str] | None = None) -> KeyPair:
    """Read the secret key of a kit, from the file that `secret_file` names.

    Raises:
        ConfigError: as `read_secret`; the error names the environment variable where that chose the file.
    """
    path = secret_file(folder, environ)
    try:
        return read_secret(path)
    except ConfigError as error:
        if path == folder / SECRET_FILE:
            raise
        raise ConfigError(f"{SECRET_ENV}: {error}") from None


# --- kits --------------------------------------------------------------------------------------------


def write_kit(folder: Path, kit: Kit) -> None:
    """Write a kit folder, which only its owner may enter.

    Raises:
        StorageError: the folder holds a secret key already, or can't be written.
    """
    check_name(kit.name, "kit")
    check_address(kit.server, "kit")
    check_key(kit.credentials.server_key, "kit: key of the server")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        write_secret(folder / SECRET_FILE, kit.credentials.pair)
        path = folder / KIT_FILE
        path.touch(0o600)
        path.chmod(0o600)
        text = f'server = "{kit.server}"\nname = "{kit.name}"\nserver_key = "{kit.credentials.server_key}"\n'
        if kit.run is not None:
            text += f'run = "{kit.run}"\n'
        path.write_text(text, encoding="utf-8")
    except FileExistsError:
        raise StorageError(f"{folder} is not a folder") from None
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write kit {folder}: {error.strerror}") from None


def load_kit(folder: Path, environ: Mapping[str, str] | None = None) -> Kit:
    """Read a kit folder: ``kit.toml`` and, beside it, ``secret.key``; it can name no other file.

    Args:
        folder: the kit.
        environ: where ``FEDCORE_SECRET_KEY_FILE`` may name the secret key's file; None: it is not asked.

    Raises:
        ConfigError: something is missing, unknown, malformed, open to others, or theirs.
    """
    path = folder / KIT_FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder} {_no_kit(folder)}; a kit is one of the folders that `fedcore provision` made, handed over "
            "whole"
        )
    values = read_toml(path)
    _check_writers(path)  # who writes there chooses the server that this key is shown to
    found = {key: values.pop(key, None) for key in ("server", "name", "server_key", "run")}
    if values:
        raise ConfigError(
            f"{path}: unknown key {min(values)!r}; expected server, name, server_key and run"
        )
    return Kit(
        check_name(found["name"], f"{path}: name"),
        check_address(found["server"], f"{path}: server"),
        Credentials(
            check_key(found["server_key"], f"{path}: server_key"),
            read_own_secret(folder, {} if environ is None else environ),
        ),
        None if found["run"] is None else check_name(found["run"], f"{path}: run"),
    )


def _no_kit(folder: Path) -> str:
    """Return what a path is that was given for a kit."""
    if folder.is_dir():
        if (folder / ALLOW_FILE).is_file():
            return "is the server's kit, which a run file names (server.keys), and no site's"
        return "is no kit: it holds no kit.toml"
    if folder.exists():
        return f"is a file; give its folder, {folder.parent}"
    return f"does not exist{'' if folder.is_absolute() else f' in {Path.cwd()}'}"


def read_toml(path: Path) -> dict[str, Any]:
    """Read a small TOML file; ConfigError if it is none."""
    try:
        if path.stat().st_size > _MAX_FILE:
            raise ConfigError(f"{path}: larger than {_MAX_FILE >> 20} MiB")
        return parse_toml(path.read_bytes(), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def parse_toml(data: bytes, source: str) -> dict[str, Any]:
    """Parse the bytes of a TOML file, with or without a byte-order mark.

    Raises:
        ConfigError: it is no TOML, or not in UTF-8; ``source`` names it.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:200]:
        raise ConfigError(
            f"{source} is not in UTF-8 but looks like UTF-16, as some editors write it; save it as UTF-8"
        )
    try:
        return tomllib.loads(data.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source} is not in UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{source} is not valid TOML: {error}") from None


def _check_writers(path: Path) -> None:
    """Raise ConfigError if another user than this one or root may write to a file, or put another in its place."""
    real = path.resolve()
    about = real.stat()
    if stat.S_IMODE(about.st_mode) & 0o022:
        raise ConfigError(f"{path} can be written by others; run `chmod go-w {path}`")
    if about.st_uid not in (os.geteuid(), 0) or path.lstat().st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"{path} belongs to another user, who can change it")
    for folder in {path.parent: None, real.parent: None}:
        if not others_can_replace(folder):
            continue
        if folder.stat().st_uid not in (os.geteuid(), 0):
            raise ConfigError(f"{folder} belongs to another user, who can change it")
        raise ConfigError(f"{folder} can be written by others; run `chmod go-w {folder}`")


# --- the allow-list ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AllowList:
    """The public keys that a server admits: an `Identity` by key. Immutable; changes return another one.

    Attributes:
        counted: whether the file that it was read from says how many keys it has, as those do that `save` writes.
    """

    keys: Mapping[str, Identity]
    counted: bool = False

    @classmethod
    def of(cls, entries: Iterable[tuple[str, str, str]]) -> AllowList:
        """Build one from ``(name, role, public key)``; ConfigError if two of them contradict each other."""
        listed = cls({})
        for name, role, public in entries:
            listed = listed.admit(name, Role(role), public)
        return listed

    @classmethod
    def load(cls, path: Path) -> AllowList:
        """Read ``allow.toml``.

        Raises:
            ConfigError: it is not there, malformed or cut short; others may change it; two
                entries contradict each other.
        """
        values = read_toml(path)
        _check_writers(path)
        listed, count = values.pop("key", []), values.pop("count", None)
        if values or not isinstance(listed, list):
            raise ConfigError(
                f"{path}: expected [[key]] tables with name, role and public, and before them count = NUMBER"
            )
        if count is not None and (type(count) is not int or count < 0):
            raise ConfigError(f"{path}: count: expected the number of keys, got {count!r}")
        if count is not None and len(listed) < count:
            raise ConfigError(
                f"{path}: it has {len(listed)} keys and says count = {count}: it is cut short, or was edited by "
                "hand. Take keys off with `fedcore revoke`; or put the file back; or, if these are the keys, "
                "correct count or leave it out"
            )
        if count is None and not listed:
            raise ConfigError(
                f"{path}: it has no key at all, as if it was cut short: put it back, or write count = 0 in it if "
                "nobody is to be admitted"
            )
        keys = cls.of(_entry(item, f"{path}: key {i + 1}") for i, item in enumerate(listed)).keys
        return cls(keys, counted=count is not None)

    def save(self, path: Path) -> None:
        """Write ``allow.toml`` whole: a reader sees the old list or the new one."""
        text = "# Who may connect, by public key. `fedcore admit` and `fedcore revoke` change it.\n"
        text += f"# With fewer keys than it counts, the file is taken for cut short.\ncount = {len(self.keys)}\n"
        for public, who in sorted(self.keys.items(), key=lambda item: (item[1].name, item[0])):
            text += f'\n[[key]]\nname = "{who.name}"\nrole = "{who.role}"\npublic = "{public}"\n'
        place = place_of(path)
        partial = place.with_suffix(".partial")
        try:
            with partial.open("w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), 0o644)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(partial, place)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise StorageError(f"cannot write {path}: {error.strerror}") from None

    def of_name(self, name: str) -> dict[str, Identity]:
        """Return a name's keys."""
        return {public: who for public, who in self.keys.items() if who.name == name}

    def admit(self, name: str, role: Role, public: str) -> AllowList:
        """Return the list with one more key; ConfigError if the name has another role or two keys already."""
        check_name(name, "allow-list")
        check_key(public, f"allow-list: key of {name}")
        known = self.keys.get(public)
        if known is not None and (known.name, known.role) == (name, role):
            return self
        if known is not None:
            raise ConfigError(
                f"that key is {known.name}'s ({known.role}) already; every name needs a key of its own"
            )
        held = self.of_name(name)
        if any(who.role != role for who in held.values()):
            raise ConfigError(f"{name} is listed with another role; revoke it first")
        if len(held) >= MAX_KEYS_PER_NAME:
            raise ConfigError(
                f"{name} has {len(held)} keys already; revoke the one no longer used first "
                f"(fedcore revoke {name} --key KEY)"
            )
        return AllowList({**self.keys, public: Identity(name, role, fingerprint(public))})

    def revoke(self, name: str, public: str | None = None) -> AllowList:
        """Return the list without a name's keys, or without one of them; ConfigError if there is none."""
        gone = {key for key in self.of_name(name) if public in (None, key)}
        if not gone:
            what = "keys" if public is None else "such key"
            raise ConfigError(f"the allow-list has no {what} for {name!r}")
        return AllowList({key: who for key, who in self.keys.items() if key not in gone})


def _entry(item: object, where: str) -> tuple[str, str, str]:
    if not isinstance(item, dict) or set(item) != {"name", "role", "public"}:
        raise ConfigError(f"{where}: expected name, role and public")
    if item["role"] not in tuple(Role):
        raise ConfigError(f"{where}: role {item['role']!r}: expected {', '.join(Role)}")
    return check_name(item["name"], where), item["role"], check_key(item["public"], where)


@contextmanager
def edited(path: Path) -> Iterator[list[AllowList]]:
    """Change an allow-list under a lock: the list in the cell when the block ends is the one that is written."""
    import fcntl

    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"{path.parent}: {error.strerror}; expected the server's kit") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        cell = [AllowList.load(path)]
        yield cell
        cell[0].save(path)
    finally:
        os.close(folder)
