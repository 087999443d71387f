"""The views show every fact of a snapshot, and leave the terminal as they found it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedcore.monitor.view import LiveView, PlainLines, human_bytes, human_seconds, render
from fedcore.protocol import StatusReply, UpdateStatus, VersionStatus


def drawn(reply: StatusReply) -> str:
    console = Console(file=io.StringIO(), width=110, color_system=None)
    console.print(render(reply))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_run_the_sites_and_the_models_are_shown(reply: StatusReply) -> None:
    text = drawn(reply)
    assert "run r: training, round 2 of 5, 1 min 15 s, about 3 min 20 s left" in text
    assert "model 4.0 kB, received 12.3 MB, sent 999 B" in text
    assert "1 of 2 sites delivered" in text
    north = next(line for line in text.splitlines() if "north" in line and "delivered" in line)
    assert "1,234" in north
    assert "train_loss 0.5" in north
    assert "lr" not in north
    assert "nothing heard for 3.4 s" in text
    best = next(line for line in text.splitlines() if "(best)" in line)
    assert "round 1 (best)" in best
    assert "9.4 s" in best
    assert "north, south" in best


def test_the_best_model_stays_in_view_in_a_long_run(reply: StatusReply) -> None:
    versions = [VersionStatus(version=v, metrics={"loss": 5.0 + v}) for v in range(50)]
    text = drawn(reply.model_copy(update={"versions": versions, "best_version": 3}))
    assert "round 3 (best)" in text
    assert "round 49 " in text
    assert "round 4 " not in text
    assert len(text.splitlines()) < 30


def test_updates_that_a_rule_left_out_are_shown_with_their_scores(reply: StatusReply) -> None:
    scores = {"a": 0.5, "b": 7.25, "c": 0.75}
    updates = [
        UpdateStatus(site=site, weight=int(site == "a"), score=score)
        for site, score in scores.items()
    ]
    version = VersionStatus(version=1, participants=["a"], updates=updates, measure="norm")
    text = drawn(reply.model_copy(update={"versions": [version]}))
    assert "a; left out: b 7.25, c 0.75 (norm)" in " ".join(text.split())


def test_many_sites_are_counted_by_state_and_the_models_come_first(reply: StatusReply) -> None:
    states = ["training"] * 30 + ["delivered"] * 9 + ["lost"]
    sites = [
        reply.sites[0].model_copy(
            update={"site": f"s{i:02}", "state": state, "examples": 10, "message": ""}
        )
        for i, state in enumerate(states)
    ]
    sites[-1] = sites[-1].model_copy(update={"message": "nothing heard for 3.4 s"})
    versions = [
        VersionStatus(version=v, metrics={"loss": 5.0}, participants=[s.site for s in sites])
        for v in range(30)
    ]
    text = drawn(reply.model_copy(update={"sites": sites, "versions": versions}))
    lines = text.splitlines()
    assert len(lines) < 40
    assert text.index("round 29") < text.index("│ training")
    training = next(line for line in lines if "│ training" in line)
    assert "30" in training
    assert "300" in training
    assert "s00, s01, s02, s03, s04, s05 and 24 more" in training
    assert "nothing heard for 3.4 s" in text
    assert "s00, s01, s02, s03, s04, s05 and 34 more" in text


def test_a_note_stands_below_the_last_picture(reply: StatusReply) -> None:
    lines: list[str] = []
    plain = PlainLines(lines.append)
    plain.show(reply)
    known = len(lines)
    for seconds in (5, 6, 7):
        plain.show(reply, f"no answer for {seconds} s")
    plain.show(reply)
    assert lines[known:] == ["no answer for 5 s", "the server answers again"]
    console = Console(file=io.StringIO(), width=110, color_system=None)
    console.print(render(reply, "no answer for 5 s"))
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines()[-1] == "no answer for 5 s"


def test_chunks_are_the_progress_while_they_come_in(reply: StatusReply) -> None:
    busy = reply.model_copy(update={"phase": "aggregating", "chunks": 40, "chunks_done": 10})
    assert "10 of 40 chunks" in drawn(busy)


def test_a_failed_run_says_why(reply: StatusReply) -> None:
    failed = reply.model_copy(
        update={"phase": "failed", "message": "1 of the 2 updates were there"}
    )
    text = drawn(failed)
    assert "1 of the 2 updates were there" in text
    assert "left" not in text.splitlines()[0]


def test_markup_in_a_sites_message_is_shown_as_it_is(reply: StatusReply) -> None:
    site = reply.sites[0].model_copy(update={"message": "[red]/x[/y]"})
    assert "[red]/x[/y]" in drawn(reply.model_copy(update={"sites": [site]}))


def test_markup_in_the_name_of_a_metric_is_shown_as_it_is(reply: StatusReply) -> None:
    odd = {"[/loss]": 0.5}
    site = reply.sites[0].model_copy(update={"metrics": odd})
    version = VersionStatus(version=0, metrics=odd)
    text = drawn(reply.model_copy(update={"sites": [site], "versions": [version]}))
    assert text.count("[/loss]") == 2


def test_plain_lines_come_once_for_each_change(reply: StatusReply) -> None:
    lines: list[str] = []
    plain = PlainLines(lines.append)
    plain.show(reply)
    assert lines == [
        "initial model, loss 2",
        "model of round 1 of north, south, loss 1 (best)",
        "south: lost (nothing heard for 3.4 s)",
        "run r: training, round 2 of 5",
    ]
    plain.show(reply)
    assert len(lines) == 4
    plain.show(reply.model_copy(update={"phase": "done"}))
    assert lines[4:] == ["run r: done, round 2 of 5"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_the_cursor_comes_back_whatever_happens(
    reply: StatusReply, error: type[BaseException]
) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=110, height=40)

    def interrupted() -> None:
        with LiveView(console) as view:
            view.show(reply)
            raise error

    with pytest.raises(error):
        interrupted()
    text = out.getvalue()
    assert "\x1b[?25l" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0412, "41 ms"), (9.42, "9.4 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3725, "1 h 02 min")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1000, "1.0 kB"), (5.2e9, "5.2 GB"), (3e13, "30.0 TB")]
)
def test_sizes_are_short(count: float, text: str) -> None:
    assert human_bytes(count) == text
