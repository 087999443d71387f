"""Keys, kits and the allow-list on disk: who gets which secret, and what is refused."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedcore.config import ServerSection
from fedcore.errors import ConfigError, StorageError
from fedcore.quantities import parse_size
from fedcore.security.keys import (
    AllowList,
    Credentials,
    KeyPair,
    Kit,
    Role,
    check_address,
    is_loopback,
    load_kit,
    read_secret,
    write_kit,
    write_secret,
)
from fedcore.security.provision import (
    Project,
    Provisioned,
    admit,
    load_project,
    make_key,
    provision,
    revoke,
)
from fedcore.transport.dialling import Server

ADDRESS = "tcp://fl.example.org:7733"
KEY = KeyPair.generate().public


@pytest.fixture
def made(tmp_path: Path) -> Provisioned:
    parties = {"north": Role.SITE, "south": Role.SITE, "eye": Role.OBSERVER, "ops": Role.OPERATOR}
    return provision(Project(ADDRESS, parties), tmp_path / "kits")


def test_a_kit_holds_its_own_secret_and_nobody_elses(made: Provisioned) -> None:
    homes = {**made.kits, "server": made.server}
    secrets = {name: read_secret(home / "secret.key").secret for name, home in homes.items()}
    assert len(set(secrets.values())) == 5
    for name, home in homes.items():
        held = "".join(path.read_text() for path in home.iterdir())
        assert [who for who, secret in secrets.items() if secret in held] == [name]


def test_secrets_are_readable_by_their_owner_alone(made: Provisioned) -> None:
    for home in (*made.kits.values(), made.server):
        assert stat.S_IMODE((home / "secret.key").stat().st_mode) == 0o600
        assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_kit_says_all_that_a_site_needs_and_the_server_knows_its_key(made: Provisioned) -> None:
    allowed = AllowList.load(made.server / "allow.toml")
    server_key = read_secret(made.server / "secret.key").public
    for name, home in made.kits.items():
        kit = load_kit(home)
        assert (kit.name, kit.server, kit.credentials.server_key) == (name, ADDRESS, server_key)
        assert allowed.keys[kit.credentials.pair.public].name == name
    assert {who.name: who.role for who in allowed.keys.values()}["ops"] is Role.OPERATOR


def test_a_folder_that_is_no_kit_is_named_with_what_a_kit_is(made: Provisioned) -> None:
    kits = made.server.parent
    found = (
        (kits / "nrth", "does not exist"),
        (made.server, "is the server's kit"),
        (kits, "holds no kit.toml"),
        (kits / "north" / "kit.toml", f"is a file; give its folder, {kits / 'north'}"),
    )
    for folder, said in found:
        with pytest.raises(ConfigError, match=rf"{folder.name} .*{said}.*`fedcore provision` made"):
            load_kit(folder)


def test_a_kit_that_is_not_in_this_folder_says_which_folder_that_is(
    made: Provisioned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ConfigError, match=rf"kits/north does not exist in {elsewhere};"):
        load_kit(Path("kits/north"))


def test_provisioning_again_makes_kits_for_new_names_alone(made: Provisioned) -> None:
    before = {p: p.read_bytes() for p in made.server.parent.rglob("secret.key")}
    parties = {"north": Role.SITE, "west": Role.SITE}
    again = provision(Project(ADDRESS, parties), made.server.parent)
    assert (list(again.kits), again.admitted) == (["west"], ["north"])
    assert all(p.read_bytes() == content for p, content in before.items())
    assert len(AllowList.load(made.server / "allow.toml").keys) == 5


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All that lies in a folder, with modes."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mode,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in folder.rglob("*")
    }


def fail_at_sync(number: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the disk be full when a file is synchronised for the ``number``-th time; returns the calls."""
    sync, calls = os.fsync, list[int]()

    def fsync(file: int) -> None:
        calls.append(file)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    return calls


# The server's secret, its empty list, the secrets of two kits, the list with both.
@pytest.mark.parametrize("number", range(1, 6))
def test_provisioning_that_fails_leaves_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parties = {"north": Role.SITE, "eye": Role.OBSERVER}
    with monkeypatch.context() as patch:
        calls = fail_at_sync(number, patch)
        with pytest.raises(StorageError, match="No space left"):
            provision(Project(ADDRESS, parties), tmp_path / "of" / "kits")
    assert len(calls) == number
    assert tree(tmp_path) == {}
    made = provision(Project(ADDRESS, parties), tmp_path / "of" / "kits")
    assert load_kit(made.kits["north"]).name == "north"


# The secrets of three kits, and the list with them.
@pytest.mark.parametrize("number", range(1, 5))
def test_provisioning_again_that_fails_leaves_all_as_it_was(
    number: int, made: Provisioned, monkeypatch: pytest.MonkeyPatch
) -> None:
    kits = made.server.parent
    for name, mode in (("bare", 0o755), ("noted", 0o750)):
        (kits / name).mkdir()
        (kits / name).chmod(mode)
    (kits / "noted" / "kit.toml").write_text("of old\n")
    (kits / "noted" / "README").write_text("ours\n")
    parties = {"north": Role.SITE, **dict.fromkeys(("bare", "noted", "west"), Role.SITE)}
    before = tree(kits)
    with monkeypatch.context() as patch:
        fail_at_sync(number, patch)
        with pytest.raises(StorageError, match="No space left"):
            provision(Project(ADDRESS, parties), kits)
    assert tree(kits) == before
    again = provision(Project(ADDRESS, parties), kits)
    assert list(again.kits) == ["bare", "noted", "west"]
    assert load_kit(kits / "noted").name == "noted"
    assert (kits / "noted" / "README").read_text() == "ours\n"


def test_a_kit_that_is_in_the_way_keeps_its_key_and_no_other_is_made(made: Provisioned) -> None:
    kits = made.server.parent
    make_key(kits / "west", kits / "north", "", "", "west")  # not admitted
    before = tree(kits)
    with pytest.raises(StorageError, match=r"west/secret.key exists; .* never written over"):
        provision(Project(ADDRESS, {"east": Role.SITE, "west": Role.SITE}), kits)
    assert tree(kits) == before


@pytest.mark.parametrize("there", ["file", "dangling link"])
def test_what_is_no_folder_where_a_kit_should_be_stays(there: str, made: Provisioned) -> None:
    kits = made.server.parent
    if there == "file":
        (kits / "west").write_text("no kit\n")
    else:
        (kits / "west").symlink_to("nowhere")
    names = sorted(kits.iterdir())
    with pytest.raises(StorageError, match="west is not a folder"):
        provision(Project(ADDRESS, {"east": Role.SITE, "west": Role.SITE}), kits)
    assert sorted(kits.iterdir()) == names
    assert len(AllowList.load(made.server / "allow.toml").keys) == 4


def test_a_name_that_has_another_role_lets_no_kit_be_made(made: Provisioned) -> None:
    before = tree(made.server.parent)
    with pytest.raises(ConfigError, match="eye is admitted with another role"):
        provision(Project(ADDRESS, {"west": Role.SITE, "eye": Role.OPERATOR}), made.server.parent)
    assert tree(made.server.parent) == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_kit_that_others_can_read_is_refused_and_says_how_to_mend_it(
    made: Provisioned, mode: int
) -> None:
    secret = made.kits["north"] / "secret.key"
    secret.chmod(mode)
    with pytest.raises(
        ConfigError, match=rf"mode {mode:04o}\); run `chmod 600 {re.escape(str(secret))}`"
    ):
        load_kit(made.kits["north"])


@pytest.mark.parametrize("name", ["", "kit.toml"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_a_kit_that_others_can_change_is_refused(made: Provisioned, name: str, mode: int) -> None:
    path = made.kits["north"] / name
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(ConfigError, match=re.escape(f"run `chmod go-w {path}`")):
        load_kit(made.kits["north"])


def test_a_secret_is_a_plain_file_in_the_kit(made: Provisioned, tmp_path: Path) -> None:
    home = made.kits["north"]
    (home / "secret.key").rename(tmp_path / "elsewhere")
    (home / "secret.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="it is a link"):
        load_kit(home)
    (home / "secret.key").unlink()
    os.mkfifo(home / "secret.key", 0o600)
    with pytest.raises(ConfigError, match="expected a plain file"):
        load_kit(home)
    (home / "secret.key").unlink()
    (home / "secret.key").mkdir()
    with pytest.raises(ConfigError, match=r"secret.key is a folder; expected a plain file"):
        load_kit(home)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("tcp://0.0.0.0:7733", "cannot be dialled"),
        ("tcp://[::]:7733", "cannot be dialled"),
        ("tcp://*:7733", "cannot be dialled"),
        ("tcp://h:0", "a port from 1 to 65535"),
        ("tcp://h:99999", "a port from 1 to 65535"),
        (r"tcp://h:7733\n", "ends in white space"),
    ],
)
def test_a_project_names_an_address_that_its_sites_can_dial(
    tmp_path: Path, address: str, said: str
) -> None:
    path = tmp_path / "project.toml"
    path.write_text(f'[project]\nserver = "{address}"\nsites = ["north"]\n')
    with pytest.raises(ConfigError, match=said):
        load_project(path)


def test_files_may_begin_with_a_byte_order_mark_and_utf_16_is_named(tmp_path: Path) -> None:
    text = f'[project]\r\nserver = "{ADDRESS}"\r\nsites = ["north"]\r\n'
    path = tmp_path / "project.toml"
    path.write_text(text, encoding="utf-8-sig", newline="")
    assert list(load_project(path).parties) == ["north"]
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        path.write_text(text, encoding=encoding, newline="")
        with pytest.raises(ConfigError, match="UTF-16.* save it as UTF-8"):
            load_project(path)
    path.write_bytes(text.replace("north", "n\xf6rd").encode("latin-1"))
    with pytest.raises(ConfigError, match=r"not in UTF-8 \(byte \d+\); save it as UTF-8"):
        load_project(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('secret = "/etc/passwd"', "unknown key 'secret'"),
        ('name = "../north"', "name '../north'"),
        ('name = "a/b"', "name 'a/b'"),
        ('name = ""', "name ''"),
        ('server = "ipc:///tmp/x"', "expected tcp://HOST:PORT"),
        ('server_key = "short"', "expected a public key of 40 characters"),
        ("server_key = 3", "expected a public key of 40 characters"),
    ],
)
def test_a_kit_that_names_other_files_or_malformed_values_is_refused(
    made: Provisioned, line: str, said: str
) -> None:
    path = made.kits["north"] / "kit.toml"
    key = line.split(" ", maxsplit=1)[0]
    kept = [old for old in path.read_text().splitlines() if not old.startswith(f"{key} =")]
    path.write_text("\n".join([*kept, line]))
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_kit(path.parent)


@pytest.mark.parametrize("name", ["../x", "a/b", ".", "..", "", "x\n", "-rf", "a" * 64, "ü"])
def test_a_name_that_is_no_name_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / "project.toml"
    path.write_text(f'[project]\nserver = "{ADDRESS}"\nsites = [{name!r}]\n'.replace("'", '"'))
    with pytest.raises(ConfigError, match="name"):
        load_project(path)
    with pytest.raises(ConfigError, match="name"):
        write_kit(tmp_path / "kit", Kit(name, ADDRESS, Credentials(KEY, KeyPair.generate())))
    with pytest.raises(ConfigError, match="name"):
        AllowList({}).admit(name, Role.SITE, KEY)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'[project]\nserver = "{ADDRESS}"\n', "project.sites: expected at least one name"),
        ('[project]\nsites = ["a"]\n', "project.server"),
        (f'[project]\nserver = "{ADDRESS}"\nsites = ["a", "a"]\n', "'a' is taken"),
        (f'[project]\nserver = "{ADDRESS}"\nsites = ["server"]\n', "'server' is taken"),
        (f'[project]\nserver = "{ADDRESS}"\nsites = ["a"]\nsights = []\n', "'project.sights'"),
        ('[run]\nname = "x"\n', "expected one section, [project]"),
        ("[project", "not valid TOML"),
    ],
)
def test_a_project_file_that_is_wrong_says_what(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "project.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_project(path)


def test_a_secret_key_is_never_written_over(tmp_path: Path) -> None:
    write_secret(tmp_path / "secret.key", KeyPair.generate())
    before = (tmp_path / "secret.key").read_bytes()
    with pytest.raises(StorageError, match="never written over"):
        write_secret(tmp_path / "secret.key", KeyPair.generate())
    assert (tmp_path / "secret.key").read_bytes() == before


def test_a_key_pair_does_not_show_its_secret() -> None:
    pair = KeyPair.generate()
    assert pair.secret not in repr(Credentials(KEY, pair))


def test_a_public_key_is_never_taken_for_an_option_of_a_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = iter([(b"-" + b"a" * 39, b"s" * 40), (b"b" * 40, b"t" * 40)])
    monkeypatch.setattr("zmq.curve_keypair", lambda: next(pairs))
    assert KeyPair.generate() == KeyPair("b" * 40, "t" * 40)


def test_a_key_made_at_the_site_is_admitted_by_its_public_half(
    made: Provisioned, tmp_path: Path
) -> None:
    server_key = read_secret(made.server / "secret.key").public
    kit = make_key(tmp_path / "west", None, ADDRESS, server_key, "west")
    assert admit(made.server, "west", Role.SITE, kit.credentials.pair.public) == 1
    assert load_kit(tmp_path / "west") == kit


@pytest.mark.parametrize(
    ("server", "key", "said"),
    [
        ("", KEY, "address ''"),
        ('tcp://a:1"\nname = "x', KEY, "expected tcp://HOST:PORT"),
        (ADDRESS, "", "expected a public key of 40 characters"),
    ],
    ids=["no address", "no address but more", "no key"],
)
def test_a_key_made_for_a_server_that_is_none_leaves_no_kit(
    tmp_path: Path, server: str, key: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        make_key(tmp_path / "west", None, server, key, "west")
    assert not (tmp_path / "west").exists()


def test_a_key_is_replaced_without_a_moment_in_which_none_is_valid(
    made: Provisioned, tmp_path: Path
) -> None:
    old = load_kit(made.kits["north"]).credentials.pair.public
    kit = make_key(tmp_path / "new", made.kits["north"], "", "", "")
    new = kit.credentials.pair.public
    assert admit(made.server, "north", Role.SITE, new) == 2
    with pytest.raises(ConfigError, match="has 2 keys already"):
        admit(made.server, "north", Role.SITE, KEY)
    assert revoke(made.server, "north", old) == 1
    allowed = AllowList.load(made.server / "allow.toml")
    assert new in allowed.keys
    assert old not in allowed.keys


def test_an_allow_list_that_contradicts_itself_is_refused(made: Provisioned) -> None:
    key = load_kit(made.kits["north"]).credentials.pair.public
    with pytest.raises(ConfigError, match="that key is north's"):
        admit(made.server, "south", Role.SITE, key)
    with pytest.raises(ConfigError, match="another role"):
        admit(made.server, "north", Role.OPERATOR, KEY)
    with pytest.raises(ConfigError, match="no keys for 'nobody'"):
        revoke(made.server, "nobody")
    path = made.server / "allow.toml"
    path.write_text(path.read_text().replace("operator", "emperor"))
    with pytest.raises(ConfigError, match="role 'emperor'"):
        AllowList.load(path)


@pytest.mark.parametrize("name", ["", "allow.toml"])
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_an_allow_list_that_others_can_change_is_refused(
    made: Provisioned, name: str, mode: int
) -> None:
    path = made.server / name
    path.chmod(path.stat().st_mode | mode)
    with pytest.raises(ConfigError, match=re.escape(f"run `chmod go-w {path}`")):
        AllowList.load(made.server / "allow.toml")


@pytest.mark.parametrize("place", ["north", "north/kit.toml", "server", "server/allow.toml"])
def test_what_belongs_to_another_user_is_not_trusted(
    made: Provisioned, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = made.server.parent / place
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:  # all of it is another user's then
        path = made.server.parent / place.partition("/")[0]
        path /= "allow.toml" if path == made.server else "kit.toml"
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    server = place.startswith("server")
    with pytest.raises(ConfigError, match=re.escape(f"{path} belongs to another user")):
        AllowList.load(made.server / "allow.toml") if server else load_kit(made.kits["north"])


def test_the_commands_make_kits_admit_and_revoke(
    tmp_path: Path, fedcore: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    (tmp_path / "project.toml").write_text(
        f'[project]\nserver = "{ADDRESS}"\nsites = ["north"]\nobservers = ["eye"]\n'
    )
    done = fedcore("provision", tmp_path / "project.toml")
    assert (done.returncode, done.stderr) == (0, "")
    assert "FEDCORE_KIT=north python train.py" in done.stdout
    assert "fedcore status --kit eye" in done.stdout
    kits, home = tmp_path / "kits", ["--server-kit", tmp_path / "kits" / "server"]
    done = fedcore("keygen", kits / "next", "--like", kits / "north")
    public = load_kit(kits / "next").credentials.pair.public
    assert f"fedcore admit north '{public}'" in done.stdout
    assert (
        fedcore("admit", "north", public, *home).stdout
        == "north is admitted as site, with 2 keys\n"
    )
    assert fedcore("revoke", "north", *home).stdout == "north: revoked\n"
    done = fedcore("revoke", "north", *home)
    assert (done.returncode, done.stderr) == (2, "error: the allow-list has no keys for 'north'\n")


def test_a_servers_address_may_be_a_list_which_the_kits_take_over(tmp_path: Path) -> None:
    path = tmp_path / "project.toml"
    path.write_text(
        '[project]\nserver = ["tcp://fl.example.org:7733", "tcp://fl.example.org:443"]\nsites = ["north"]\n',
        encoding="utf-8",
    )
    provision(load_project(path), tmp_path / "kits")
    kit = load_kit(tmp_path / "kits" / "north")
    assert kit.server == "tcp://fl.example.org:7733,tcp://fl.example.org:443"
    assert check_address("tcp://a:1, tcp://b:2", "kit") == "tcp://a:1,tcp://b:2"
    assert not is_loopback(kit.server)
    assert not is_loopback("tcp://127.0.0.1:1,tcp://a:1")
    assert is_loopback("tcp://127.0.0.1:1,tcp://localhost:1")
    for wrong in ([], ["tcp://a:1", 2], "tcp://a:1,", "tcp://a:1,b:2"):
        with pytest.raises(ConfigError, match="expected tcp://HOST:PORT"):
            check_address(wrong, "kit")


@pytest.mark.parametrize("port", ["٧٧٣٣", "७७३३"])
def test_a_port_in_other_digits_than_ascii_is_refused_everywhere(port: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    with pytest.raises(ConfigError):
        check_address(address, "kit")
    with pytest.raises(ConfigError):
        Server.of(address)
    with pytest.raises(ValidationError):
        ServerSection(listen=address, insecure=True)
    with pytest.raises(ValueError, match="expected a size"):
        parse_size(f"{port}MiB")
