"""What a site says reaches logs, views and files as text that does no harm, and in bounded amounts."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedcore import protocol
from fedcore.errors import ProtocolError
from fedcore.monitor.ask import ask_status, read_summary
from fedcore.protocol import control_frames
from fedcore.server.rounds.selection import SiteScore, best_version, pooled_metrics
from fedcore.server.service import Server
from fedcore.site.session import Session
from fedcore.site.settings import SiteSettings

from ..support.raw_site import DEADLINE, RawSite
from ..support.runs import SPECS, run, run_config, site, writer

ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\n12:00:00 INFO b was revoked\u202e\u2028\x9b31m"


def say(raw: RawSite, **fields: Any) -> None:
    """Send a message that the site's own library would refuse to make."""
    body = json.dumps(fields).encode()
    raw.link.command([b"S", b"", *control_frames(body)])


def plain(text: str) -> bool:
    return text.isprintable()


def heard(server: Server, hostile: Callable[[RawSite], object]) -> None:
    """Let site b be hostile while site a takes part in a run of one round; then the run is complete."""

    def both() -> int:
        raw = RawSite(server.endpoint, "b")
        hostile(raw)
        raw.link.close()
        return site(server.endpoint, "a", 1)

    result, _ = run(server, both)
    assert result.ok


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(run_config(tmp_path, sites=["a", "b"], rounds=1, min_results=1))


def test_no_text_of_a_site_forges_a_line_or_steers_a_terminal(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    def hostile(raw: RawSite) -> None:
        say(raw, type="problem", message=ESCAPES)
        say(raw, type="log", round=0, step=0, metrics={ESCAPES: 1.0})
        status = ask_status(server.endpoint, DEADLINE)
        (shown,) = [s for s in status.sites if s.site == "b"]
        assert "owned" in shown.message
        assert plain(shown.message)
        assert all(map(plain, shown.metrics))
        say(raw, type="leave", reason=ESCAPES)
        for odd in (
            {"type": ESCAPES},
            {"type": "log", "round": 0, "step": 0, "metrics": {ESCAPES: "x"}},
            {"type": "join", "protocol": 99, "version": ESCAPES, "site": "b", "x": 1},
        ):
            say(raw, **odd)
        ask_status(server.endpoint, DEADLINE)

    heard(server, hostile)
    lines = [record.getMessage() for record in caplog.records]
    assert any("b reports: " in line and "owned" in line for line in lines)
    assert any("b left: " in line and "owned" in line for line in lines)
    assert all(map(plain, lines))


def test_an_error_in_a_message_is_told_in_a_few_words_whatever_is_in_it() -> None:
    for body in (
        {"type": "x" * 1_000_000},
        {"type": "log", "round": 0, "step": 0, "metrics": {"\x1b" * 1_000_000: "x"}},
        {"type": "alive", "y" * 1_000_000: 1},
    ):
        with pytest.raises(ProtocolError) as refused:
            protocol.decode_from_site(json.dumps(body).encode())
        assert len(str(refused.value)) < 1000
        assert plain(str(refused.value))


@pytest.mark.parametrize("name", ["w\n", "\x1b[31m", "w\u202e"])
def test_a_tensors_name_is_printable(name: str) -> None:
    body = json.dumps({"type": "declare", "tensors": [[name, "F32", [1]]]}).encode()
    with pytest.raises(ProtocolError, match="printable"):
        protocol.decode_from_site(body)


@pytest.mark.parametrize(
    "name",
    [
        "../config.json",
        "/etc/x.json",
        "a/b.json",
        "..json",
        ".x.json",
        "x.json\n",
        "x.json\0",
        "x.toml",
        "é.json",
    ],
)
def test_a_file_that_a_site_declares_can_be_nowhere_but_in_the_models_folder(name: str) -> None:
    body = {"type": "declare", "tensors": [["w", "F32", [1]]], "files": {name: "{}"}}
    with pytest.raises(ProtocolError, match="files"):
        protocol.decode_from_site(json.dumps(body).encode())
    body["files"] = {"config.json": "{}"}
    assert protocol.decode_from_site(json.dumps(body).encode()).type == "declare"


def test_a_million_metrics_take_no_more_than_a_messages_worth(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def hostile(raw: RawSite) -> None:
        say(raw, type="log", round=0, step=0, metrics={str(i): 1.0 for i in range(65)})
        raw.await_message(protocol.Refused)
        again = RawSite(server.endpoint, "b")
        for first in range(0, 64_000, 64):
            metrics = {str(i): 1.0 for i in range(first, first + 64)}
            say(again, type="log", round=0, step=0, metrics=metrics)
        status = ask_status(server.endpoint, DEADLINE)
        assert max(len(s.metrics) for s in status.sites) == protocol.MAX_METRICS
        say(again, type="leave")
        again.link.close()

    heard(server, hostile)
    assert "metrics: Dictionary should have at most 64 items" in caplog.text
    assert all(len(known.metrics) <= protocol.MAX_METRICS for _, known in server.runs[0].peers)


def test_sites_with_metrics_of_their_own_each_are_shown_and_the_one_that_selects_is_among_them(
    server: Server, tmp_path: Path
) -> None:
    def own(name: str) -> dict[str, float]:
        return {f"{name}{i:02d}": 1.0 for i in range(63)} | {"loss": 2.0}

    def sites() -> int:
        with closing(Session(SiteSettings(server=server.endpoint, site="a"))) as session:
            assert session.is_running()
            session.begin(SPECS, {}, writer(0))
            session.score(own("a"), 1)
            raw = RawSite(server.endpoint, "b")
            say(raw, type="score", version=0, metrics=own("b"), examples=1)
            (model,) = ask_status(server.endpoint, DEADLINE).versions
            assert len(model.metrics) == protocol.MAX_METRICS
            assert model.metrics["loss"] == 2.0
            raw.link.close()
            session.submit(writer(1), 1)
            while session.is_running():
                session.begin(SPECS, {}, writer(0))
                session.end_task()
        return 1

    result, _ = run(server, sites)
    assert result.ok
    summary = json.loads((tmp_path / "runs/t/summary.json").read_text())
    assert len(summary["versions"][0]["metrics"]) == 2 * 63 + 1
    assert read_summary(tmp_path / "runs/t").versions[0].metrics["loss"] == 2.0


def test_a_value_beyond_the_numbers_neither_selects_nor_hides_a_model() -> None:
    good = [SiteScore("a", 5, {"loss": 2.0}), SiteScore("b", 5, {"loss": 4.0})]
    huge = [SiteScore("a", 5, {"loss": 2.0}), SiteScore("b", 1 << 23, {"loss": 1.7e308})]
    both = [SiteScore("a", 1 << 23, {"loss": -1.7e308}), *huge[1:]]
    assert pooled_metrics(good) == {"loss": 3.0}
    assert pooled_metrics(huge) == {}
    assert pooled_metrics(both) == {}
    assert best_version({0: both, 1: huge, 2: good}, "loss", "min", 2) == 2
    assert best_version({0: both, 1: huge, 2: good}, "loss", "max", 2) == 2


def test_files_for_other_programs_hold_no_nan() -> None:
    text = protocol.strict_json({"a": [math.nan, 1.0, {"b": -math.inf}], "c": (math.inf,)})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, 1.0, {"b": None}],
        "c": [None],
    }
