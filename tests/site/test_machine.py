"""A site machine answers, repeats and reports as the protocol asks; the test is the server and the clock."""

from __future__ import annotations

from typing import Any

import pytest

from fedcore import protocol as p
from fedcore._core import Layout
from fedcore.encoding import EncodedUpdate
from fedcore.errors import LayoutError, RefusedError, TransferTimeout
from fedcore.layout import layout_hash, table
from fedcore.model_file import create_model
from fedcore.site import outputs as out
from fedcore.site.machine import SiteMachine
from fedcore.site.settings import SiteSettings

RUN = "0" * 31 + "1"
LAYOUT = Layout([("w", "F32", [4])], 4096)
HASH = layout_hash(LAYOUT)
DECLARE = p.Declare(tensors=table(LAYOUT))
UPDATE = EncodedUpdate.raw(create_model(None, LAYOUT))


def machine(**settings: Any) -> SiteMachine:
    """Return a machine that has asked to join at time 100."""
    made = SiteMachine(SiteSettings(server="tcp://127.0.0.1:1", site="a", **settings))
    made.join(100.0)
    assert [type(m) for m in sent(made)] == [p.Join]
    return made


def welcome(run: str = "r", run_id: str = RUN) -> p.Welcome:
    return p.Welcome(
        run=run, run_id=run_id, rounds=3, chunk_bytes=4096, has_model=True, version="1"
    )


def joined(**settings: Any) -> SiteMachine:
    made = machine(**settings)
    made.handle(welcome(), 100.0)
    made.declare(DECLARE)
    made.handle(p.Accepted(layout_hash=HASH), 100.0)
    made.take_outputs()
    return made


def task(kind: Any = "train", round_: int = 1, **fields: Any) -> p.Task:
    return p.Task(kind=kind, round=round_, rounds=3, version=round_ - (kind == "train"), **fields)


def ready(round_: int = 1) -> p.Ready:
    sets = [p.NamedSet(id=f"{round_:032x}", layout=HASH)]
    return p.Ready(round=round_, sets=sets, weight=5)


def sent(made: SiteMachine) -> list[Any]:
    return [output.message for output in made.take_outputs() if isinstance(output, out.Send)]


def only(made: SiteMachine, kind: type) -> list[Any]:
    return [output for output in made.take_outputs() if isinstance(output, kind)]


def test_a_join_without_an_answer_is_sent_again_when_it_is_due() -> None:
    made = machine()
    assert made.due() == 100.0 + p.REPEAT_SECONDS
    made.tick(made.due() - 0.1)
    assert not sent(made)
    made.tick(made.due())
    assert [type(m) for m in sent(made)] == [p.Join]
    assert made.due() == 100.0 + 2 * p.REPEAT_SECONDS


def test_a_machine_does_nothing_before_it_joins_and_after_the_end() -> None:
    made = SiteMachine(SiteSettings(server="tcp://127.0.0.1:1", site="a"))
    assert made.due() is None
    made.tick(1e9)
    made.reconnected(1e9)
    assert not made.take_outputs()
    made = joined()
    made.handle(p.Finish(ok=True, outcome="complete"), 101.0)
    assert len(only(made, out.Finished)) == 1
    assert made.due() is None


def test_what_is_sent_within_a_run_names_the_run() -> None:
    made = machine()
    made.handle(welcome(), 100.0)
    made.declare(DECLARE)
    made.send(p.Log(round=1, step=2, metrics={"loss": 0.5}))
    assert [m.run_id for m in sent(made)] == [RUN, RUN]


def test_a_site_declares_again_to_a_server_that_asks_it_to_rejoin() -> None:
    made = joined()
    made.handle(p.Rejoin(), 110.0)
    assert [type(m) for m in sent(made)] == [p.Join]
    made.handle(welcome(), 110.0)
    assert [type(m) for m in sent(made)] == [p.Declare]


def test_an_update_is_announced_until_it_is_settled() -> None:
    made = joined()
    made.handle(task(), 100.0)
    made.publish(ready(), UPDATE)
    made.end_task("train", 1)
    published = made.take_outputs()
    assert [type(o) for o in published] == [out.Tasked, out.Publish, out.Send]
    made.tick(105.0)
    made.handle(p.Accepted(layout_hash=HASH), 106.0)
    assert [m.round for m in sent(made)] == [1, 1]
    made.handle(p.Commit(version=1, included=True, participants=["a"]), 107.0)
    withdrawn, settled, committed = made.take_outputs()
    assert withdrawn == out.Withdraw(ready().model.id)
    assert (settled.ready.round, settled.counts, settled.late) == (1, True, False)
    assert committed.rounds == 3
    assert (made.included, made.ready) == (1, None)


@pytest.mark.parametrize("included", [1, None])
def test_a_later_task_settles_an_update_whose_commit_was_lost(included: int | None) -> None:
    made = joined()
    made.handle(task(), 100.0)
    made.publish(ready(), UPDATE)
    made.handle(task(round_=2, included=included), 110.0)
    (settled,) = only(made, out.Settled)
    assert (settled.counts, settled.late) == (included == 1, True)


def test_a_dropped_update_is_withdrawn_and_does_not_count() -> None:
    made = joined()
    made.handle(task(), 100.0)
    made.publish(ready(), UPDATE)
    made.take_outputs()
    made.handle(p.Dropped(round=2, message="another round"), 101.0)
    assert made.take_outputs() == [out.Dropped(2, "another round")]
    made.handle(p.Dropped(round=1, message="too late"), 101.0)
    dropped, withdrawn, settled = made.take_outputs()
    assert (dropped.why, withdrawn.set_id, settled.counts) == ("too late", f"{1:032x}", False)


def test_a_site_that_trains_shows_from_time_to_time_that_it_is_there() -> None:
    made = joined()
    made.handle(task(), 100.0)
    made.take_outputs()
    made.tick(105.0)
    assert [type(m) for m in sent(made)] == [p.Alive]


def test_a_reconnected_site_repeats_soon_what_may_be_lost() -> None:
    made = joined()
    made.handle(task(), 100.0)
    made.tick(105.0)
    made.take_outputs()
    made.reconnected(106.0)
    assert made.due() == pytest.approx(107.5)
    made.reconnected(107.0)
    assert made.due() == pytest.approx(107.5), "a second cut puts nothing off"


def test_a_score_is_sent_again_with_its_task_and_not_before_the_task_is_done() -> None:
    made = joined()
    made.handle(task("evaluate", 3), 100.0)
    score = p.Score(version=3, metrics={"loss": 1.0}, examples=2)
    made.report(score)
    assert len(sent(made)) == 1
    made.handle(task("evaluate", 3), 101.0)
    assert not sent(made)
    made.end_task("evaluate", 3)
    made.handle(task("evaluate", 3), 102.0)
    assert [m.metrics for m in sent(made)] == [{"loss": 1.0}]
    assert made.has_done_all


def test_a_name_that_is_in_use_is_asked_for_less_and_less_often_and_not_for_ever() -> None:
    made = machine(connect_timeout=20.0)
    in_use = p.Refused(code="name-in-use", message="in use")
    now, gaps = 100.0, []
    for _ in range(7):
        made.handle(in_use, now)
        due = made.due()
        assert due is not None
        gaps.append(due - now)
        now = due
        made.tick(now)
    assert gaps == pytest.approx([1, 1.5, 2.25, 3.375, 5, 5, 5])
    assert len(only(made, out.HeldElsewhere)) == 1
    assert made.held
    assert made.held_too_long(119.9) is None
    with pytest.raises(RefusedError, match="in use"):
        raise made.held_too_long(120.1) or AssertionError
    assert not made.held


def test_a_site_asks_a_busy_server_again_and_reports_each_reason_once() -> None:
    made = machine()
    made.join(100.0)
    sent(made)
    for now in (100.1, 105.1, 110.1):
        made.handle(p.Refused(code="busy", message="its database is locked"), now)
        made.tick(now + 5.0)
    assert [event.why for event in only(made, out.Busy)] == ["its database is locked"]
    assert (made.error, made.busy) == (None, "its database is locked")
    made.handle(welcome(), 116.0)
    assert (made.welcome, made.busy) == (welcome(), "")


def test_a_site_that_gave_up_its_name_leaves_it_to_others_until_it_is_asked_again() -> None:
    made = machine(connect_timeout=20.0)
    in_use = p.Refused(code="name-in-use", message="in use")
    made.handle(in_use, 100.0)
    assert made.held_too_long(120.1) is not None
    sent(made)
    made.tick(200.0)
    assert (made.due(), sent(made)) == (None, [])
    for late in (in_use, welcome()):
        made.handle(late, 201.0)
    assert [type(message) for message in sent(made)] == [p.Leave]
    assert made.welcome is None
    made.ask_again(300.0)
    assert [type(message) for message in sent(made)] == [p.Join]
    made.handle(welcome(), 301.0)
    assert (made.error, made.welcome) == (None, welcome())


def test_a_site_that_had_no_answer_in_time_takes_no_part_until_it_is_asked_again() -> None:
    made = machine()
    made.give_up(TransferTimeout("no answer"), "it had no answer for too long")
    assert made.due() is None
    for late in (p.Rejoin(), welcome()):
        made.handle(late, 201.0)
    made.leave("its process ended")
    reasons = [message.reason for message in sent(made)]
    assert reasons == ["it had no answer for too long, and it asks no more", "its process ended"]
    made.ask_again(300.0)
    made.handle(welcome(), 301.0)
    assert (made.error, made.welcome) == (None, welcome())


@pytest.mark.parametrize(("code", "kind"), [("layout", LayoutError), ("key", RefusedError)])
def test_a_refused_site_ends_and_does_not_come_again(code: str, kind: type) -> None:
    made = joined()
    made.handle(p.Refused(code=code, message="no"), 101.0)
    assert isinstance(made.error, kind)
    assert len(only(made, out.Failed)) == 1
    made.handle(p.Rejoin(), 102.0)
    made.tick(1e9)
    made.leave("the end")
    assert not sent(made)


def test_a_server_with_another_run_is_left_by_the_name_of_that_run() -> None:
    made = joined()
    made.handle(welcome(run_id="f" * 32), 101.0)
    (leave,) = sent(made)
    assert (leave.type, leave.run_id) == ("leave", "f" * 32)
    assert isinstance(made.error, RefusedError)
    assert "rollback" in str(made.error)


def test_a_run_that_was_not_asked_for_is_an_error() -> None:
    made = machine(run="mine")
    made.handle(welcome(), 100.0)
    assert "serves run 'r', and not 'mine'" in str(made.error)


def test_a_message_of_another_run_or_no_message_changes_nothing() -> None:
    made = joined()
    made.receive(p.encode(p.Finish(ok=True, outcome="complete", run_id="f" * 32)), 101.0)
    made.receive(b"{", 101.0)
    assert [type(o) for o in made.take_outputs()] == [out.Malformed]
    assert made.finish is None


def test_each_warning_of_the_server_is_reported_once() -> None:
    made = joined()
    for _ in range(2):
        made.handle(p.Accepted(layout_hash=HASH, warnings=["another tokenizer"]), 101.0)
    assert made.take_outputs() == [out.Warned("another tokenizer")]


def test_a_server_of_another_version_ends_a_site_that_has_not_joined() -> None:
    made = machine()
    made.other_version(9)
    assert "speaks protocol 9" in str(made.error)
    made = joined()
    made.other_version(9)
    assert made.error is None


def model(number: int) -> dict[str, Any]:
    tensors = table(LAYOUT)
    return {"sets": [p.OpenSet(id=f"{number:032x}", layout=HASH, tensors=tensors)]}


def test_a_model_is_pulled_once_and_its_task_goes_on() -> None:
    made = joined()
    first = task(**model(7))
    made.handle(first, 100.0)
    made.take_outputs()
    made.pull(first)
    (pull,) = made.take_outputs()
    assert isinstance(pull, out.Pull)
    assert made.pulls(first)
    made.pulled("f" * 32, 101.0)
    assert made.pulls(first), "that was another download"
    made.pulled(pull.set.id, 101.0)
    assert made.take_outputs() == [out.Pulled(first)]
    assert made.has_pulled(first)
    made.stop_pull()
    assert not made.take_outputs()


def test_a_set_that_is_not_published_any_more_gives_its_task_back() -> None:
    made = joined()
    first = task(**model(7))
    made.handle(first, 100.0)
    made.pull(first)
    made.pulled(f"{7:032x}", 101.0, "unknown")
    assert made.task is None
    assert not made.has_pulled(first)


def test_another_model_ends_the_download_of_the_one_before() -> None:
    made = joined()
    first, second = task(**model(7)), task(round_=2, **model(8))
    made.handle(first, 100.0)
    made.pull(first)
    made.take_outputs()
    made.handle(first, 101.0)
    assert not only(made, out.StopPull), "the same task again"
    made.handle(second, 102.0)
    assert only(made, out.StopPull) == [out.StopPull(f"{7:032x}")]
    assert not made.pulls(first)
    assert made.open_task() is second


def test_each_spoiled_download_in_a_row_is_waited_for_longer_up_to_a_minute() -> None:
    made, now, waited = joined(), 1000.0, []
    for _ in range(1100):
        again = task(**model(7))
        made.handle(again, now)
        made.pull(again)
        made.pulled(f"{7:032x}", now, "checksum")
        (spoiled,) = only(made, out.Spoiled)
        waited.append(spoiled.seconds)
        made.tick(now + spoiled.seconds - 0.01)
        assert made.pulls(again)
        now += spoiled.seconds
        due = made.due()
        assert due is not None
        assert due <= now
        made.tick(now)
        assert not made.pulls(again)
        assert made.task is None, "the server sends it again"
    assert waited == [1, 2, 4, 8, 16, 32, *[60] * 1094]
    good = task(**model(7))
    made.handle(good, now)
    made.pull(good)
    made.pulled(f"{7:032x}", now)
    made.pull(good)
    made.pulled(f"{7:032x}", now, "length")
    assert only(made, out.Spoiled) == [out.Spoiled(1.0)]


def test_a_spoiled_download_is_not_waited_for_once_there_is_another_model() -> None:
    made = joined()
    first = task(**model(7))
    made.handle(first, 100.0)
    made.pull(first)
    made.pulled(f"{7:032x}", 100.0, "checksum")
    made.take_outputs()
    made.handle(task(**model(8)), 100.1)
    assert not made.pulls(first)
    assert not only(made, out.StopPull), "nothing is under way"
