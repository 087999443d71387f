"""A server that was started again: whom it waits for, and how the round under way goes on."""

from __future__ import annotations

import pytest

from fedcore.server.rounds.actions import (
    Choose,
    Commit,
    EndRun,
    GiveUp,
    Participant,
    SendTask,
    StartCollect,
)
from fedcore.server.rounds.participation import Delivery, Roster, SiteState
from fedcore.server.rounds.rounds import Phase

from .playing import NOT_BACK, ahead, collecting, machine, part, sampling, update


def test_after_a_restart_a_site_that_had_joined_is_waited_for_as_long_as_a_lost_one() -> None:
    rounds = machine(["a", "b", "c"], quorum=2, version=1)
    rounds.restarted(["a", "b", "c"], [], 15)
    for site in "ab":
        assert rounds.joined(site, site, 1) == [SendTask(site, "train", 2)]
        assert rounds.ready(site, 2, update(site)) == ahead(site, 2)
    assert rounds.tick(14.9) == []
    assert rounds.tick(15) == [GiveUp("c", NOT_BACK), StartCollect(2, (part("a"), part("b")))]
    assert rounds.tick(15.1) == []
    member = rounds.roster.get("c")
    assert member is not None
    assert (member.state, member.message) == (SiteState.LOST, NOT_BACK)
    rounds.reduced()
    rounds.committed(2, 16)
    assert rounds.phase is Phase.EVALUATING
    assert rounds.joined("c", "c", 17) == [SendTask("c", "evaluate", 2)]


def test_after_a_restart_the_round_closes_at_once_when_all_are_back() -> None:
    rounds = machine(["a", "b"], version=1)
    rounds.restarted(["a", "b"], [], 15)
    for site in "ab":
        rounds.joined(site, site, 1)
    assert rounds.ready("a", 2, update("a")) == ahead("a", 2)
    assert rounds.ready("b", 2, update("b")) == [StartCollect(2, (part("a"), part("b")))]
    assert rounds.tick(15) == []


def test_after_a_restart_a_site_that_had_never_joined_is_waited_for_until_the_deadline() -> None:
    rounds = machine(["a", "b", "c"], quorum=2, version=1)
    rounds.restarted(["a", "b"], [], 15)
    for site in "ab":
        rounds.joined(site, site, 1)
        assert rounds.ready(site, 2, update(site)) == ahead(site, 2)
    assert rounds.tick(15) == []
    assert rounds.tick(101) == [StartCollect(2, (part("a"), part("b")))]


def test_after_a_restart_a_round_below_the_quorum_goes_on_waiting() -> None:
    rounds = machine(["a", "b"], version=1)
    rounds.restarted(["a", "b"], [], 15)
    rounds.joined("a", "a", 1)
    assert rounds.ready("a", 2, update("a")) == ahead("a", 2)
    assert rounds.tick(15) == [GiveUp("b", NOT_BACK)]
    assert rounds.joined("b", "b", 60) == [SendTask("b", "train", 2)]
    assert rounds.ready("b", 2, update("b")) == [StartCollect(2, (part("a"), part("b")))]


def test_after_a_restart_the_last_scores_of_the_sites_that_come_back_count() -> None:
    rounds = machine(["a", "b", "c"], quorum=2, version=2)
    rounds.restarted(["a", "b", "c"], ["a"], 15)
    assert rounds.joined("a", "a", 1) == []
    assert rounds.joined("b", "b", 1) == [SendTask("b", "evaluate", 2)]
    assert rounds.scored("b", 2) == []
    assert rounds.tick(14.9) == []
    assert rounds.tick(15) == [GiveUp("c", NOT_BACK), EndRun(True, "")]


def test_after_a_restart_a_run_whose_last_model_is_scored_ends_when_all_have_heard_of_it() -> None:
    rounds = machine(["a", "b"], version=2)
    rounds.restarted(["a", "b"], ["a", "b"], 15)
    assert rounds.joined("a", "a", 1) == []
    assert rounds.joined("b", "b", 2) == [EndRun(True, "")]


def test_after_a_restart_the_first_sites_that_joined_keep_their_places() -> None:
    roster = Roster(None, 2)
    roster.expect_back(["a", "b"])
    assert roster.missing == 2
    assert roster.refusal("a") is None
    assert roster.refusal("c") == "this run has its 2 sites already: a, b"


def test_a_collection_that_a_killed_server_had_begun_goes_on_whoever_else_is_there() -> None:
    rounds = machine(["a", "b", "c"], quorum=2, version=1)
    rounds.restarted(["a", "b", "c"], [], 15, collecting("ab"))
    for site in "cba":
        rounds.joined(site, site, 1)
    assert rounds.ready("c", 2, update("c")) == []
    assert rounds.ready("a", 2, update("a")) == []
    assert rounds.ready("b", 2, update("b")) == [StartCollect(2, collecting("ab"))]
    assert rounds.reduced() == [Commit(2, collecting("ab"))]


def test_where_a_site_of_it_offers_another_update_the_round_closes_as_any_other() -> None:
    rounds = machine(["a", "b", "c"], quorum=2, version=1)
    rounds.restarted(["a", "b", "c"], [], 15, collecting("ab"))
    for site in "abc":
        rounds.joined(site, site, 1)
    other = Delivery("ee" * 16, 5)
    assert rounds.ready("a", 2, update("a")) == []
    assert rounds.ready("b", 2, other) == []
    everyone = (part("a"), Participant("b", other.set_id, 5), part("c"))
    assert rounds.ready("c", 2, update("c")) == [StartCollect(2, everyone)]


def test_updates_are_pulled_ahead_once_no_collection_is_gone_on_with() -> None:
    rounds = machine(["a", "b", "c", "d"], version=1)
    rounds.restarted(["a", "b", "c"], [], 15, collecting("ab"))
    for site in "ac":
        rounds.joined(site, site, 1)
        assert rounds.ready(site, 2, update(site)) == []
    assert rounds.tick(15) == [GiveUp("b", NOT_BACK), *ahead("a", 2), *ahead("c", 2)]


def test_where_a_site_of_it_does_not_come_back_the_round_closes_as_any_other() -> None:
    rounds = machine(["a", "b", "c"], quorum=2, version=1)
    rounds.restarted(["a", "b", "c"], [], 15, collecting("ab"))
    for site in "ac":
        rounds.joined(site, site, 1)
        assert rounds.ready(site, 2, update(site)) == []
    assert rounds.tick(15) == [GiveUp("b", NOT_BACK), StartCollect(2, collecting("ac"))]


def test_the_site_that_was_giving_the_initial_model_gives_it_to_a_server_started_again() -> None:
    rounds = machine(["a", "b"], version=None)
    rounds.restarted(["a", "b"], [], 15, collecting("b"))
    assert rounds.joined("a", "a", 1) == rounds.declared("a", 1) == []
    assert rounds.joined("b", "b", 2) == []
    assert rounds.declared("b", 2) == [SendTask("b", "initial", 0)]


def test_where_that_site_does_not_come_back_another_one_gives_it() -> None:
    rounds = machine(["a", "b"], version=None)
    rounds.restarted(["a", "b"], [], 15, collecting("b"))
    assert rounds.joined("a", "a", 1) == rounds.declared("a", 1) == []
    assert rounds.tick(14) == []
    assert rounds.tick(15) == [GiveUp("b", NOT_BACK), SendTask("a", "initial", 0)]


def test_the_sites_of_a_sample_whose_updates_were_being_collected_stay_chosen() -> None:
    rounds = sampling(["a", "b", "c", "d"], 2)
    rounds.restarted(["a", "b", "c", "d"], [], 15, collecting("cd"))
    assert [rounds.joined(site, site, 1) for site in "abc"] == [[], [], [SendTask("c", "train", 1)]]
    assert rounds.ready("c", 1, update("c")) == []
    assert rounds.joined("d", "d", 2) == [SendTask("d", "train", 1)]
    assert rounds.ready("d", 1, update("d")) == [StartCollect(1, collecting("cd"))]


@pytest.mark.parametrize("offered", ["the same", "another"])
def test_a_sampled_round_waits_for_a_chosen_site_that_is_expected_back_whatever_the_quorum(
    offered: str,
) -> None:
    rounds = sampling(["a", "b", "c", "d"], 2, quorum=1)
    rounds.restarted(["a", "b", "c", "d"], [], 15, collecting("cd"))
    assert rounds.joined("c", "c", 1) == [SendTask("c", "train", 1)]
    delivery = update("c") if offered == "the same" else Delivery("ee" * 16, 5)
    assert rounds.ready("c", 1, delivery) == []
    assert rounds.joined("d", "d", 2) == [SendTask("d", "train", 1)]
    both = (Participant("c", delivery.set_id, 5), part("d"))
    assert rounds.ready("d", 1, update("d")) == [StartCollect(1, both)]


def test_a_sampled_round_closes_with_the_quorum_once_nobody_chosen_is_expected_back() -> None:
    rounds = sampling(["c", "d"], 2, quorum=1)
    rounds.restarted(["c", "d"], [], 15, collecting("cd"))
    rounds.joined("c", "c", 1)
    assert rounds.ready("c", 1, update("c")) == []
    assert rounds.tick(14.9) == []
    assert rounds.tick(15) == [GiveUp("d", NOT_BACK), StartCollect(1, collecting("c"))]


def test_a_chosen_site_that_does_not_come_back_is_replaced() -> None:
    rounds = sampling(["a", "b", "c", "d"], 2)
    rounds.restarted(["a", "b", "c", "d"], [], 15, collecting("cd"))
    for site in "abc":
        rounds.joined(site, site, 1)
    assert rounds.ready("c", 1, update("c")) == []
    (given_up, written, task, *rest) = rounds.tick(15)
    assert given_up == GiveUp("d", NOT_BACK)
    assert rest == ahead("c")
    assert isinstance(task, SendTask)
    assert task.site in ("a", "b")
    assert written == Choose(1, tuple(sorted(("c", "d", task.site))))
    assert rounds.ready(task.site, 1, update(task.site)) == [
        StartCollect(1, tuple(sorted((part("c"), part(task.site)), key=lambda p: p.site)))
    ]


def test_sites_that_were_chosen_before_a_restart_are_waited_for_and_their_updates_count() -> None:
    rounds = sampling(["a", "b", "c", "d"], 2, seed=0)
    rounds.restarted(["a", "b", "c", "d"], [], 15, chosen=["b", "d"])
    assert rounds.joined("b", "b", 1) == [SendTask("b", "train", 1)]
    assert rounds.ready("b", 1, update("b")) == ahead("b")
    assert rounds.joined("a", "a", 2) == rounds.joined("c", "c", 2) == []
    assert rounds.tick(14) == []
    assert rounds.joined("d", "d", 14.5) == [SendTask("d", "train", 1)]
    assert rounds.ready("d", 1, update("d")) == [StartCollect(1, collecting("bd"))]
