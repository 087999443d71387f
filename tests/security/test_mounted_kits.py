"""Kits as container platforms mount them: links, modes that others may read, folders of mode 1777."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fedcore.errors import ConfigError
from fedcore.security.keys import Role, load_kit
from fedcore.security.mounts import Mount, find_mount, is_secret_mount
from fedcore.security.provision import Project, provision

ADDRESS = "tcp://fl.example.org:7733"

LOAD = """
import sys
from fedcore.errors import ConfigError
from fedcore.security.keys import load_kit
try:
    print("loaded", load_kit(__import__("pathlib").Path(sys.argv[1])).name)
except ConfigError as error:
    print("refused", error)
"""

# A kit in a volume as the kubelet makes it: files are links into a dated folder of the same volume.
KUBERNETES = """
mkdir $AT/..2026_11_29; cp $KIT/* $AT/..2026_11_29/; chmod $MODE $AT/..2026_11_29/*
ln -s ..2026_11_29 $AT/..data; ln -s ..data/kit.toml $AT/kit.toml; ln -s ..data/secret.key $AT/secret.key
chmod 1777 $AT
"""
PLAIN = "cp $KIT/* $AT/; chmod $MODE $AT/*; chmod 755 $AT\n"


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    return provision(Project(ADDRESS, {"north": Role.SITE}), tmp_path / "kits").kits["north"]


def load_on_a_mount(kit: Path, at: Path, fill: str, mode: str, *, memory: bool, ro: bool) -> str:
    """Load the kit in a mount namespace of its own, where ``at`` is a mount filled by ``fill``."""
    at.mkdir()
    source = "mount -t tmpfs none $AT" if memory else "mkdir $AT.disk; mount --bind $AT.disk $AT"
    seal = "mount -o remount,ro,bind $AT" if ro else "true"
    script = f"set -e\n{source}\n{fill}\n{seal}\nexec {sys.executable} -P -c '{LOAD}' $AT\n"
    ended = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        env={**os.environ, "AT": str(at), "KIT": str(kit), "MODE": mode},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    if "Operation not permitted" in ended.stderr or "permission denied" in ended.stderr:
        pytest.skip("this user may not mount")
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("mode", ["644", "440", "400"])
@pytest.mark.parametrize("fill", [KUBERNETES, PLAIN], ids=["kubernetes", "docker"])
def test_a_kit_on_a_memory_backed_read_only_mount_is_accepted(
    kit: Path, tmp_path: Path, fill: str, mode: str
) -> None:
    said = load_on_a_mount(kit, tmp_path / "secret", fill, mode, memory=True, ro=True)
    assert said == "loaded north\n"


@pytest.mark.parametrize(("memory", "ro"), [(True, False), (False, True)])
def test_a_mount_that_is_memory_backed_or_read_only_is_enough(
    kit: Path, tmp_path: Path, memory: bool, ro: bool
) -> None:
    said = load_on_a_mount(kit, tmp_path / "secret", KUBERNETES, "644", memory=memory, ro=ro)
    assert said == "loaded north\n"


@pytest.mark.parametrize("mode", ["666", "620"])
def test_a_mounted_secret_that_others_may_write_is_refused(
    kit: Path, tmp_path: Path, mode: str
) -> None:
    said = load_on_a_mount(kit, tmp_path / "secret", PLAIN, mode, memory=True, ro=False)
    assert said.startswith("refused")
    assert "can be written by others" in said


def test_a_writable_mount_on_disk_is_checked_as_any_folder(kit: Path) -> None:
    with tempfile.TemporaryDirectory(
        dir="/var/tmp"
    ) as disk:  # the tests' own folder may be in memory
        said = load_on_a_mount(kit, Path(disk, "secret"), PLAIN, "644", memory=False, ro=False)
    assert "mode 0644" in said


def test_a_link_that_leads_out_of_its_mount_is_refused(kit: Path, tmp_path: Path) -> None:
    fill = "cp $KIT/kit.toml $AT/; ln -s $KIT/secret.key $AT/secret.key; chmod 644 $AT/kit.toml"
    said = load_on_a_mount(kit, tmp_path / "secret", fill, "644", memory=True, ro=True)
    assert "it is a link" in said


def test_a_folder_that_anybody_may_write_without_the_sticky_bit_is_refused(
    kit: Path, tmp_path: Path
) -> None:
    fill = PLAIN + "chmod 777 $AT"
    said = load_on_a_mount(kit, tmp_path / "secret", fill, "644", memory=True, ro=False)
    assert "can be written by others" in said


TABLE = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw
30 22 0:26 / /tmp rw,nosuid shared:5 - tmpfs tmpfs rw
31 22 0:27 / /dev/shm rw,nosuid shared:6 - tmpfs tmpfs rw
32 22 0:28 / /run rw - tmpfs tmpfs rw
40 22 0:40 / /etc/fed\\040core rw - tmpfs tmpfs rw
41 22 8:1 /x /etc/kit ro,relatime - ext4 /dev/root rw
42 41 8:1 /y /etc/kit/open rw,relatime - ext4 /dev/root rw
"""


@pytest.mark.parametrize(
    ("path", "trusted"),
    [
        ("/home/a/kit/secret.key", False),
        ("/tmp/kit/secret.key", False),
        ("/dev/shm/kit/secret.key", False),
        ("/run/kit/secret.key", False),
        ("/etc/fed core/secret.key", True),
        ("/etc/kit/secret.key", True),
        ("/etc/kit/open/secret.key", False),
        ("/etc/kitten/secret.key", False),
    ],
)
def test_mounts_that_all_users_share_are_no_mounts_of_secrets(
    tmp_path: Path, path: str, trusted: bool
) -> None:
    (tmp_path / "table").write_text(TABLE)
    assert is_secret_mount(Path(path), tmp_path / "table") is trusted


def test_a_system_without_a_table_of_mounts_has_no_mounted_secrets(tmp_path: Path) -> None:
    assert find_mount(Path("/etc"), tmp_path / "none") is None
    assert not is_secret_mount(Path("/etc/kit"), tmp_path / "none")
    assert Mount("/", "ext4", False) == find_mount(Path("/etc"), _one_line(tmp_path))


def _one_line(folder: Path) -> Path:
    (folder / "one").write_text(TABLE.splitlines()[0] + "\nno mount\n")
    return folder / "one"


def test_a_variable_names_the_secret_key_of_a_kit(kit: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.key"
    (kit / "secret.key").rename(elsewhere)
    (tmp_path / "link.key").symlink_to(elsewhere)
    for named in (elsewhere, tmp_path / "link.key"):
        assert load_kit(kit, {"FEDCORE_SECRET_KEY_FILE": str(named)}).name == "north"
    elsewhere.chmod(0o644)
    with pytest.raises(ConfigError, match="elsewhere.key can be read or written by others"):
        load_kit(kit, {"FEDCORE_SECRET_KEY_FILE": str(elsewhere)})
    with pytest.raises(ConfigError, match="^cannot read the secret key"):
        load_kit(kit)


def test_a_secret_key_that_a_variable_names_wrongly_is_an_error_that_names_it(
    kit: Path, tmp_path: Path
) -> None:
    (tmp_path / "circle.key").symlink_to(tmp_path / "circle.key")
    (tmp_path / "dangling.key").symlink_to(tmp_path / "none.key")
    (tmp_path / "other.key").write_text("no key")
    (tmp_path / "other.key").chmod(0o600)
    for name in ("none.key", "circle.key", "dangling.key", "other.key", ".", "k" * 5000):
        with pytest.raises(ConfigError, match=r"^FEDCORE_SECRET_KEY_FILE: "):
            load_kit(kit, {"FEDCORE_SECRET_KEY_FILE": str(tmp_path / name)})
