"""The allow-list while the server runs: half-written files revoke nobody, and commands do at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from fedcore.clock import SYSTEM, Clock, ManualClock
from fedcore.config import parse_run
from fedcore.errors import ConfigError
from fedcore.security.keys import AllowList, KeyPair, Role
from fedcore.security.provision import Provisioned, admit, revoke
from fedcore.server.access import Access


class Looking:
    """A server's look at its list, with a clock of its own."""

    def __init__(self, found: Access, path: Path, clock: ManualClock) -> None:
        self.access = found
        self.path = path
        self.clock = clock

    def look(self, later: float = 1.0) -> list[str]:
        """Return whose keys are revoked so many seconds later."""
        self.clock.advance(later)
        return sorted(who.name for who in self.access.revoked())


def access_of(tmp_path: Path, server: Path, clock: Clock = SYSTEM, **people: object) -> Access:
    values = {
        "run": {"name": "t", "rounds": 1},
        "participants": people or {"sites": ["a", "b"]},
        "server": {"keys": str(server)},
    }
    return Access(parse_run(values, folder=tmp_path), clock)


@pytest.fixture
def looking(tmp_path: Path, kits: Provisioned) -> Iterator[Looking]:
    clock = ManualClock()
    found = access_of(tmp_path, kits.server, clock)
    found.opened(Mock(endpoint="tcp://127.0.0.1:7733"), [])
    made = Looking(found, kits.server / "allow.toml", clock)
    assert made.look() == []
    yield made
    found.close()


def without_count(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith(("count", "#")))


def cut_in_a_key(text: str) -> str:
    return text[: text.rindex("public")]


def cut_between_keys(text: str) -> str:
    return text[: text.rindex("[[key]]")]


def one_key_taken_out(text: str) -> str:
    before, _, after = text.partition("[[key]]")
    return before + "[[key]]" + after.partition("[[key]]")[2]


@pytest.mark.parametrize(
    "damage",
    [cut_in_a_key, cut_between_keys, one_key_taken_out, lambda _: "", lambda _: "# Who may", lambda _: "[[key"],
    ids=["cut in a key", "cut between keys", "a key taken out", "empty", "cut in a comment", "torn"],
)  # fmt: skip
def test_a_list_that_is_cut_short_revokes_nobody_however_long_it_stands(
    looking: Looking, caplog: pytest.LogCaptureFixture, damage: Callable[[str], str]
) -> None:
    whole = looking.path.read_text()
    looking.path.write_text(damage(whole))
    assert looking.look() == looking.look(3600.0) == []
    assert "the allow-list stays as it was: " in caplog.text
    with pytest.raises(ConfigError):
        revoke(looking.path.parent, "b")  # what is left would be the list from then on
    looking.path.write_text(whole)
    revoke(looking.path.parent, "b")
    assert looking.look() == ["b"]


def test_keys_that_a_hand_written_list_loses_are_revoked_once_it_has_stood(
    looking: Looking, caplog: pytest.LogCaptureFixture
) -> None:
    whole = without_count(looking.path.read_text())
    for text in (whole, cut_between_keys(whole)):
        looking.path.write_text(text)
        assert looking.look() == []
    assert looking.look(4.0) == []
    looking.path.write_text(whole)
    assert looking.look() == looking.look(60.0) == []  # it came back in time
    looking.path.write_text(cut_between_keys(whole))
    assert looking.look() == looking.look(4.9) == []
    assert looking.access.knows("ops")
    assert looking.look(0.5) == ["ops"]
    assert not looking.access.knows("ops")
    assert (
        "has lost keys of ops, but not by `fedcore revoke`: they are revoked in 5 s" in caplog.text
    )


def test_a_list_that_is_being_written_admits_its_new_keys_and_revokes_nobody(
    looking: Looking,
) -> None:
    new = KeyPair.generate().public
    looking.path.write_text(f'[[key]]\nname = "new"\nrole = "site"\npublic = "{new}"\n')
    assert looking.look() == []
    assert looking.access.knows("new")
    assert looking.access.knows("a")


def test_a_key_revoked_by_command_is_revoked_at_the_next_look(looking: Looking) -> None:
    looking.path.write_text(without_count(looking.path.read_text()))
    assert looking.look() == []
    revoke(looking.path.parent, "b")
    assert looking.look() == ["b"]
    admit(looking.path.parent, "b", Role.SITE, KeyPair.generate().public)
    assert looking.look() == []
    assert looking.access.knows("b")


def test_a_key_added_by_hand_needs_no_change_of_the_count(looking: Looking) -> None:
    new = KeyPair.generate().public
    text = looking.path.read_text()
    looking.path.write_text(text + f'\n[[key]]\nname = "new"\nrole = "site"\npublic = "{new}"\n')
    assert looking.look() == []
    assert looking.access.knows("new")


def test_a_server_does_not_start_with_a_list_that_is_cut_short(
    tmp_path: Path,
    kits: Provisioned,
) -> None:
    path = kits.server / "allow.toml"
    path.write_text(cut_between_keys(path.read_text()))
    with pytest.raises(ConfigError, match=r"it has 4 keys and says count = 5: it is cut short"):
        access_of(tmp_path, kits.server)
    path.write_text("")
    with pytest.raises(ConfigError, match=r"it has no key at all, as if it was cut short"):
        access_of(tmp_path, kits.server)
    path.write_text("count = 0\n")
    access_of(tmp_path, kits.server).close()
    path.write_text('count = "3"\n')
    with pytest.raises(ConfigError, match="count: expected the number of keys, got '3'"):
        AllowList.load(path)


@pytest.mark.parametrize(
    ("people", "said"),
    [
        ({"sites": ["a", "b", "c"]}, None),
        ({"sites": ["a", "eye", "west"]}, "is that of site eye, west, so it can't connect"),
        ({"count": 3}, None),
        ({"count": 4}, "the run expects 4 sites, and the allow-list has keys of 3;"),
    ],
)
def test_sites_of_the_run_file_without_a_key_are_named_with_the_command(
    tmp_path: Path,
    kits: Provisioned,
    people: dict[str, object],
    said: str | None,
) -> None:
    found = access_of(tmp_path, kits.server, **people)
    text = found.without_key(people.get("sites"), people.get("count"))  # type: ignore[arg-type]
    found.close()
    if said is None:
        assert text is None
    else:
        assert text is not None
        assert said in text
        assert f"PUBLIC_KEY --server-kit {kits.server}" in text
