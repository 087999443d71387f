"""What the documentation says of settings, bytes and commands is what the code does."""

from __future__ import annotations

import json
import re
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from fedcore import protocol
from fedcore.cli.training import as_json
from fedcore.config import RunConfig, load_run_file
from fedcore.protocol import SiteStatus, StatusReply, VersionStatus, control_frames
from fedcore.security.connections import Limits
from fedcore.server.storage.logged import Series
from fedcore.server.storage.metrics import Point
from fedcore.transport import link as transport

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("clients/*/*.md")])


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fields() -> Iterator[tuple[str, FieldInfo]]:
    for section, field in RunConfig.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            for key, inner in model.model_fields.items():
                yield f"{section}.{key}", inner


@pytest.mark.parametrize("key", [key for key, _ in fields() if key != "simulate.site"])
def test_every_key_of_a_run_file_is_in_the_table_of_settings(key: str) -> None:
    assert f"| `{key}` |" in text("docs/settings.md")


def test_the_defaults_in_the_table_of_settings_are_those_that_apply() -> None:
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| `([^`]+)` \|", text("docs/settings.md"), re.M))
    compared = 0
    for key, field in fields():
        if key in rows and not field.is_required() and field.default is not None:
            kind = TypeAdapter(Annotated[field.annotation, key, *field.metadata])
            (written,) = tomllib.loads(f"value = {rows[key]}").values()
            assert kind.validate_python(written) == field.get_default(call_default_factory=True), (
                key
            )
            compared += 1
    assert compared >= 15


def test_every_variable_is_in_the_table_of_settings() -> None:
    sources = [
        *ROOT.glob("fedcore/**/*.py"),
        *ROOT.glob("clients/**/*.py"),
        *ROOT.glob("csrc/**/*.cpp"),
    ]
    used = {
        name
        for path in sources
        for name in re.findall(r'["`(](FEDCORE_[A-Z_]+)["`=)]', path.read_text(encoding="utf-8"))
    }
    for path in (ROOT / "csrc").glob("**/*.*"):
        used -= set(re.findall(r"# *define (FEDCORE_\w+)", path.read_text(encoding="utf-8")))
    assert len(used) >= 9
    assert used == set(re.findall(r"\| `(FEDCORE_[A-Z_]+)` \|", text("docs/settings.md")))


def test_the_frame_in_the_protocol_page_is_the_one_that_is_sent() -> None:
    header, body = control_frames(protocol.StatusRequest())
    page = text("docs/protocol.md")
    assert body.decode() in page
    block = re.search(r"```\n([0-9a-f \n]+)```", page)
    assert block is not None
    assert bytes.fromhex(block[1]) == header


def test_every_message_and_field_is_in_the_protocol_page() -> None:
    page = text("docs/protocol.md")
    for model in (*protocol.FromSite.__args__, *protocol.FromServer.__args__):
        kind = model.model_fields["type"].default
        row = re.search(rf"^\| `{kind}` \|.*$", page, re.MULTILINE)
        assert row is not None, kind
        if kind == "status-reply":
            continue
        for field in set(model.model_fields) - {"type", "ext", "run_id"}:
            assert f"`{field}`" in row[0], f"{kind}.{field}"


def test_the_run_files_in_the_pages_are_valid(tmp_path: Path) -> None:
    found = 0
    for page in PAGES:
        for block in re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            if block.startswith("[project]"):  # what `fedcore provision` reads
                continue
            (tmp_path / "run.toml").write_text(block, encoding="utf-8")
            load_run_file(tmp_path / "run.toml")
            found += 1
    assert found >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_a_sentence_begins_as_an_item_of_a_list_does(page: Path) -> None:
    """Such as `- 4`, which a page shows as a list of its own; no list is within another."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert not re.findall(r"^ {1,3}(?:[-+*]|\d+[.)]) .*", prose, re.M)


def test_the_pages_about_the_house_name_files_and_folders_that_are_there() -> None:
    named = re.findall(r"`((?:fedcore|csrc|clients|tests)/[\w./]+)`", text("docs/architecture.md"))
    assert len(named) > 40
    assert not [path for path in named if not (ROOT / path).exists()]
    folders = {path.parent for top in ("fedcore", "csrc") for path in (ROOT / top).glob("*/*.*")}
    missing = [f"{f.relative_to(ROOT)}" for f in folders if f.name != "__pycache__"]
    assert not [f for f in missing if f"`{f}`" not in text("docs/architecture.md")]


def test_the_glossary_is_in_order_and_has_each_word_once() -> None:
    words = re.findall(r"^\| ([a-z -]+) \|", text("docs/glossary.md"), re.MULTILINE)[1:]
    assert len(words) > 40
    assert words == sorted(set(words))


def test_every_test_that_the_security_pages_name_is_there() -> None:
    named = re.findall(
        r"`([a-z_/]+\.py)(?:::(test_\w+))?`", text("docs/security.md") + text("SECURITY.md")
    )
    assert len(named) > 15
    for path, test in named:
        source = (ROOT / "tests" / path).read_text(encoding="utf-8")
        assert f"def {test}(" in source if test else source, f"{path}::{test}"


def test_every_attempt_on_the_security_page_names_a_test() -> None:
    rows = re.findall(r"^\| attempt \|.*?\n\n", text("docs/security.md"), re.MULTILINE | re.DOTALL)
    attempts = [line for table in rows for line in table.splitlines()[2:] if line]
    assert len(rows) == 3
    assert len(attempts) >= 30
    for line in attempts:
        assert re.search(
            r"`[a-z_/]+\.py(::test_\w+)?` \|$|`, `[a-z_/]+\.py::test_\w+` \|$", line
        ), line


def test_every_claim_in_the_security_pages_prose_names_a_test() -> None:
    """A paragraph names a test, says what is not stopped, or is one of those that only tell what to do."""
    page = re.sub(r"```.*?```", "", text("docs/security.md"), flags=re.DOTALL)
    bare = [
        paragraph
        for paragraph in page.split("\n\n")
        if not re.match(r"#|\||    |$", paragraph.strip("\n"))
        and not re.search(r"`[a-z_/]+\.py(::test_\w+)?`", paragraph)
    ]
    assert [paragraph.strip()[:40] for paragraph in bare] == [
        "What is protected, against whom, by what",
        "Across machines, write a project file",
        "and then",
        "A kit holds `kit.toml` (`server`, `name`",
        "**Somebody on the network** can read, ch",
        "**A site that breaks the rules** has a v",
        "**A malicious file**: a model, a run fil",
        "Not stopped: a run file's `[simulate] sc",
        "Everybody who can act as the server's us",
    ]


def test_the_limits_of_the_door_are_those_of_the_code() -> None:
    limits, page = Limits(), text("docs/security.md")
    for row in (
        f"| {limits.burst} at once, then {limits.per_second:g} a second; the connection waits |",
        f"| {limits.unknown_burst} at once, then {limits.unknown_per_second:g} a second are answered;",
        f"| time for a handshake | {transport.HANDSHAKE_MS // 1000} s,",
        f"| open connections in all | {limits.connections},",
        f"an IPv6 /64) | {limits.per_network},",
        f"| {limits.arrivals} at once, then {limits.arrivals_per_second:g} a second; with more than 32",
        f"was understood yet | {limits.unproved}, with more than 128 sites two for each; then the oldest makes "
        f"room if it is {limits.unproved_spared:g} s old",
        f"| {limits.unproved_bytes >> 10} KiB, {limits.unproved_seconds:g} s |",
        f"| {limits.admitted_bytes >> 20} MiB, {limits.admitted_seconds:g} s; {limits.admitted} connections, "
        f"{limits.admitted // 4} of a network |",
        f"times a second | {limits.unfinished_bytes >> 20} MiB; all together 128 MiB more than `server.memory` |",
        f"may send nothing | {limits.silent_seconds:g} s,",
    ):
        assert row in page, row
    assert Limits.of(32) == limits
    assert Limits.of(3, memory=1 << 30).unfinished == (1 << 30) + (128 << 20)
    many = Limits.of(5000)
    assert (many.connections, many.per_network, many.unproved) == (20_000, 10_000, 10_000)
    assert (many.arrivals, many.arrivals_per_second) == (20_000, 2500)
    assert Limits.of(1024).connections == 4096 < Limits.of(1025).connections


def first_cells(page: str) -> set[str]:
    """Return what the first cells of the tables of a page name."""
    cells = re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE)
    return set(re.findall(r"`(\w+)`", "\n".join(cells)))


def test_the_status_for_other_programs_is_described_field_by_field() -> None:
    page, _, training = text("docs/status.md").partition("## Training metrics")
    named = first_cells(page)
    models = (StatusReply, SiteStatus, VersionStatus)
    fields = {name for model in models for name in model.model_fields} - {"type", "ext", "run_id"}
    states = {
        value
        for annotation in (
            StatusReply.model_fields["phase"].annotation,
            SiteStatus.model_fields["state"].annotation,
        )
        for value in typing.get_args(annotation)
    }
    assert named == fields | states
    series = Series("a", "loss", [Point(0, 1, 10, 0.0, 0.5)])
    (found,) = json.loads(as_json([series]))["metrics"]
    assert first_cells(training) == found.keys()
