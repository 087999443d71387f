"""The round state machine: every rule replayed without sockets or a clock, and random histories."""

from __future__ import annotations

import random

import pytest

from fedcore.server.rounds.actions import (
    Action,
    Commit,
    EndRun,
    GiveUp,
    HoldCollect,
    Participant,
    PullAhead,
    SendDropped,
    SendTask,
    StartCollect,
)
from fedcore.server.rounds.participation import Delivery, SiteState
from fedcore.server.rounds.rounds import Phase, Rounds

from .playing import ahead, collecting, join_all, machine, part, trained, update


def test_an_update_that_counted_and_is_announced_again_is_not_called_late() -> None:
    rounds = machine(["a", "b"], version=None, quorum=1)
    assert rounds.joined("a", "a", 0) == rounds.joined("b", "b", 0) == []
    assert rounds.declared("a", 1) == [SendTask("a", "initial", 0)]
    assert rounds.ready("a", 0, update("a")) == [StartCollect(0, (part("a"),))]
    rounds.reduced()
    assert trained(rounds.committed(0, 2)) == ["a", "b"]
    assert rounds.ready("a", 0, update("a")) == []
    assert rounds.ready("a", 1, update("a")) == ahead("a")
    assert rounds.ready("b", 1, update("b")) == [StartCollect(1, (part("a"), part("b")))]
    rounds.reduced()
    rounds.committed(1, 4)
    assert rounds.ready("a", 1, update("a")) == []
    assert isinstance(rounds.ready("a", 1, Delivery("e" * 32, 5))[0], SendDropped)
    assert isinstance(rounds.ready("a", 0, update("a"))[0], SendDropped)


def test_a_site_whose_initial_model_is_invalid_is_passed_over_until_none_is_left() -> None:
    rounds = machine(["a", "b"], version=None)
    rounds.joined("a", "a", 0)
    rounds.joined("b", "b", 0)
    assert rounds.declared("a", 1) == [SendTask("a", "initial", 0)]
    assert rounds.declared("b", 1) == []
    rounds.ready("a", 0, update("a"))
    not_usable = "the initial model is not usable: NaN"
    passed = [HoldCollect(), SendDropped("a", 0, not_usable), SendTask("b", "initial", 0)]
    assert rounds.rejected("a", "NaN", 2) == passed
    assert rounds.ready("b", 0, update("b")) == [StartCollect(0, (part("b"),))]
    assert rounds.rejected("b", "empty", 3) == [
        HoldCollect(),
        SendDropped("b", 0, "the initial model is not usable: empty"),
        EndRun(False, "no site has a usable initial model: a: NaN; b: empty"),
    ]


def test_another_process_of_a_site_that_was_passed_over_may_give_the_initial_model() -> None:
    rounds = machine(["a", "b"], version=None)
    rounds.joined("a", "a", 0)
    rounds.declared("a", 1)
    rounds.ready("a", 0, update("a"))
    assert rounds.rejected("a", "NaN", 2)[2:] == []
    assert rounds.declared("a", 3) == []
    assert rounds.joined("a", "again", 4) == []
    assert rounds.declared("a", 4) == [SendTask("a", "initial", 0)]


def test_a_site_that_owes_the_initial_model_past_the_deadline_is_passed_over() -> None:
    rounds = machine(["a", "b"], version=None)
    late = "it gave no initial model before the deadline"
    assert rounds.joined("a", "a", 0) == rounds.joined("b", "b", 0) == []
    assert rounds.declared("a", 5) == [SendTask("a", "initial", 0)]
    assert rounds.declared("b", 6) == []
    assert rounds.deadline == 105
    assert rounds.tick(104) == []
    assert rounds.tick(105) == [GiveUp("a", late), HoldCollect(), SendTask("b", "initial", 0)]
    assert rounds.deadline == 205
    assert rounds.ready("b", 0, update("b")) == [StartCollect(0, (part("b"),))]
    assert rounds.tick(300) == []


def test_a_round_closes_when_all_have_delivered_in_the_order_of_names() -> None:
    rounds = machine(["b", "a"])
    join_all(rounds, "b", "a")
    assert rounds.ready("b", 1, update("b")) == ahead("b")
    assert rounds.ready("a", 1, update("a")) == [StartCollect(1, (part("a"), part("b")))]
    assert rounds.reduced() == [Commit(1, (part("a"), part("b")))]
    assert rounds.committed(1, 5) == [SendTask("a", "train", 2), SendTask("b", "train", 2)]


def test_the_same_announcement_twice_is_heard_once() -> None:
    rounds = machine(["a", "b"])
    join_all(rounds, "a", "b")
    assert rounds.ready("a", 1, update("a")) == ahead("a")
    assert rounds.ready("a", 1, update("a")) == []


def test_an_update_that_is_invalid_once_its_site_is_gone_brings_the_site_neither_back_nor_out() -> (
    None
):
    rounds = machine(["a", "b"], quorum=1)
    join_all(rounds, "a", "b")
    assert rounds.ready("b", 1, update("b")) == ahead("b")
    rounds.lost("b", "it left", 1, left=True)
    assert rounds.rejected("b", "its chunks were wrong", 1) == []
    assert rounds.roster.get("b").state is SiteState.LEFT  # type: ignore[union-attr]
    assert rounds.joined("b", "started again", 2) == [SendTask("b", "train", 1)]
    assert rounds.rejected("b", "its chunks were wrong", 2) == []
    assert rounds.ready("a", 1, update("a")) == ahead("a")
    rounds.lost("b", "silent", 3)
    rounds.reduced()
    assert rounds.committed(1, 4) == [SendTask("a", "train", 2)]


def test_a_site_that_never_came_is_waited_for_until_the_deadline() -> None:
    rounds = machine(["a", "b", "c"], quorum=2)
    join_all(rounds, "a", "b")
    rounds.ready("a", 1, update("a"))
    assert rounds.ready("b", 1, update("b")) == ahead("b")
    assert rounds.tick(99.9) == []
    assert rounds.tick(100) == [StartCollect(1, (part("a"), part("b")))]


@pytest.mark.parametrize("now", [99.9, 100, 250])
def test_an_update_that_is_heard_before_the_deadlines_tick_makes_the_quorum(now: float) -> None:
    rounds = machine(["a", "b", "c"], quorum=2)
    join_all(rounds, "a", "b", "c")
    rounds.ready("a", 1, update("a"))
    assert rounds.ready("b", 1, update("b")) == ahead("b")
    assert rounds.tick(max(now, 100)) == [StartCollect(1, (part("a"), part("b")))]
    late = machine(["a", "b", "c"], quorum=2)
    join_all(late, "a", "b", "c")
    late.ready("a", 1, update("a"))
    (end,) = late.tick(max(now, 100))
    assert isinstance(end, EndRun)
    assert not end.ok
    assert late.ready("b", 1, update("b")) == []


def test_a_lost_site_closes_the_round_at_once_when_the_quorum_stands() -> None:
    rounds = machine(["a", "b", "c"], quorum=2)
    join_all(rounds, "a", "b", "c")
    rounds.ready("a", 1, update("a"))
    rounds.ready("b", 1, update("b"))
    assert rounds.lost("c", "silent", 1) == [StartCollect(1, (part("a"), part("b")))]


def test_a_participant_lost_in_mid_upload_is_left_out_entirely() -> None:
    rounds = machine(["a", "b", "c"], quorum=2)
    join_all(rounds, "a", "b", "c")
    for site in "abc":
        rounds.ready(site, 1, update(site))
    assert rounds.lost("b", "silent", 1) == [
        HoldCollect(),
        StartCollect(1, (part("a"), part("c"))),
    ]
    assert rounds.joined("b", "again", 2) == [SendTask("b", "train", 1)]
    assert rounds.ready("b", 1, update("b")) == []


def test_below_the_quorum_the_round_waits_for_the_lost_site_to_come_back() -> None:
    rounds = machine(["a", "b"])
    join_all(rounds, "a", "b")
    rounds.ready("a", 1, update("a"))
    rounds.ready("b", 1, update("b"))
    assert rounds.lost("b", "silent", 1) == [HoldCollect()]
    assert rounds.phase is Phase.TRAINING
    rounds.joined("b", "b", 2)
    assert rounds.ready("b", 1, update("b")) == [StartCollect(1, (part("a"), part("b")))]


def test_an_invalid_update_is_dropped_and_the_rest_counts() -> None:
    rounds = machine(["a", "b", "c"], quorum=2)
    join_all(rounds, "a", "b", "c")
    for site in "abc":
        rounds.ready(site, 1, update(site))
    assert rounds.rejected("b", "NaN", 1) == [
        SendDropped("b", 1, "NaN"),
        HoldCollect(),
        StartCollect(1, (part("a"), part("c"))),
    ]
    assert rounds.ready("b", 1, Delivery("f" * 32, 5)) == [SendDropped("b", 1, "NaN")]


def test_too_few_valid_updates_end_the_run_with_the_names() -> None:
    rounds = machine(["a", "b"])
    join_all(rounds, "a", "b")
    rounds.ready("a", 1, update("a"))
    rounds.ready("b", 1, update("b"))
    end = rounds.rejected("b", "NaN", 1)[-1]
    assert isinstance(end, EndRun)
    assert not end.ok
    assert "delivered: a; not delivered: b (NaN)" in end.message


def test_a_stale_update_is_answered_and_does_not_count() -> None:
    rounds = machine(["a"], version=1)
    assert rounds.joined("a", "a", 0) == [SendTask("a", "train", 2)]
    assert isinstance(rounds.ready("a", 1, update("a"))[0], SendDropped)


def test_a_second_process_of_a_participant_ends_the_first_ones_part() -> None:
    rounds = machine(["a", "b", "c"], quorum=2)
    join_all(rounds, "a", "b", "c")
    for site in "abc":
        rounds.ready(site, 1, update(site))
    assert rounds.joined("b", "another process", 1) == [
        HoldCollect(),
        StartCollect(1, (part("a"), part("c"))),
        SendTask("b", "train", 1),
    ]


def test_the_first_site_gives_the_model_and_another_if_it_is_lost() -> None:
    rounds = machine(["a", "b"], version=None)
    assert rounds.joined("a", "a", 0) == []
    assert rounds.declared("a", 0) == [SendTask("a", "initial", 0)]
    rounds.joined("b", "b", 0)
    assert rounds.declared("b", 0) == []
    assert rounds.lost("a", "silent", 1) == [HoldCollect(), SendTask("b", "initial", 0)]
    assert rounds.ready("b", 0, update("b")) == [StartCollect(0, (part("b"),))]
    assert rounds.reduced() == [Commit(0, (part("b"),))]
    assert rounds.committed(0, 2) == [SendTask("b", "train", 1)]


def test_the_initial_model_goes_on_coming_when_another_site_is_lost() -> None:
    rounds = machine(["a", "b", "c"], version=None)
    for site in ("a", "b", "c"):
        rounds.joined(site, site, 0)
    assert rounds.declared("a", 0) == [SendTask("a", "initial", 0)]
    assert rounds.declared("b", 0) == []
    assert rounds.lost("b", "silent", 1) == []
    assert rounds.ready("a", 0, update("a")) == [StartCollect(0, (part("a"),))]
    assert rounds.lost("c", "its tensors differ", 2, left=True) == []
    assert rounds.reduced() == [Commit(0, (part("a"),))]


def test_an_update_that_comes_while_others_are_collected_takes_the_place_of_a_lost_one() -> None:
    rounds = machine(["a", "b", "c"], quorum=2)
    join_all(rounds, "a", "b", "c")
    assert rounds.ready("a", 1, update("a")) == ahead("a")
    assert rounds.lost("b", "silent", 1) == []
    assert rounds.ready("c", 1, update("c")) == [StartCollect(1, (part("a"), part("c")))]
    assert rounds.joined("b", "b", 2) == [SendTask("b", "train", 1)]
    assert rounds.ready("b", 1, update("b")) == []
    assert rounds.lost("c", "silent", 3) == [
        HoldCollect(),
        StartCollect(1, (part("a"), part("b"))),
    ]


def test_a_collection_that_loses_a_site_goes_on_with_the_quorum_without_waiting_for_a_newcomer() -> (
    None
):
    rounds = machine(["a", "b", "c"], quorum=1)
    join_all(rounds, "a", "b", "c")
    assert rounds.lost("b", "silent", 1) == []
    assert rounds.ready("a", 1, update("a")) == ahead("a")
    assert rounds.ready("c", 1, update("c")) == [StartCollect(1, (part("a"), part("c")))]
    assert rounds.joined("b", "b", 2) == [SendTask("b", "train", 1)]
    assert rounds.lost("c", "silent", 3) == [HoldCollect(), StartCollect(1, (part("a"),))]


def test_the_last_model_is_scored_before_the_end() -> None:
    rounds = machine(["a", "b"], version=2)
    assert rounds.joined("a", "a", 0) == [SendTask("a", "evaluate", 2)]
    assert rounds.joined("b", "b", 0) == [SendTask("b", "evaluate", 2)]
    assert rounds.scored("a", 2) == []
    assert rounds.scored("b", 2) == [EndRun(True, "")]
    assert [member.state for member in rounds.roster] == [SiteState.DELIVERED] * 2


def pulls_ahead(rounds: Rounds, action: PullAhead, version: int) -> bool:
    """Whether it is the update of a site that is there, for the version after this one."""
    members = [(m.name, m.delivery) for m in rounds.roster if m.alive]
    offered = [Participant(name, d.set_id, d.weight) for name, d in members if d is not None]
    training = rounds.phase is Phase.TRAINING
    return training and action.version == version + 1 and action.participant in offered


@pytest.mark.parametrize("seed", range(200))
def test_no_history_breaks_the_rules(seed: int) -> None:
    """Random events in random order; what must hold always is checked after each."""
    dice = random.Random(seed)
    sites = ["a", "b", "c"]
    rounds = machine(sites, quorum=2, rounds=4)
    if seed % 2:
        rounds.restarted(dice.sample(sites, dice.randrange(1, 4)), ["a"], 10 * dice.random())
    now, collecting, versions = 0.0, None, [0]

    def follow(actions: list[Action]) -> None:
        nonlocal collecting
        for action in actions:
            if isinstance(action, PullAhead):
                assert pulls_ahead(rounds, action, versions[-1]), "what nobody offers"
            elif isinstance(action, StartCollect):
                assert collecting is None, "two collections at once"
                assert len(action.participants) >= 2
                assert list(action.participants) == sorted(
                    action.participants, key=lambda p: p.site
                )
                collecting = action
            elif isinstance(action, HoldCollect):
                collecting = None
            elif isinstance(action, Commit):
                assert collecting is not None
                assert action.participants == collecting.participants
                assert action.version == versions[-1] + 1
                versions.append(action.version)
                collecting = None
                follow(rounds.committed(action.version, now))
            elif isinstance(action, EndRun):
                assert action.ok == (versions[-1] == 4)

    for _ in range(300):
        now += dice.random() * 5
        site = dice.choice(sites)
        member = rounds.roster.get(site)
        assert member is not None
        event = dice.randrange(7)
        if event == 0:
            follow(rounds.joined(site, dice.choice(["x", "y"]), now))
        elif event in (1, 2) and member.alive:
            fresh = Delivery(f"{dice.randrange(1 << 60):032x}", dice.randrange(1, 9))
            follow(rounds.ready(site, dice.choice([rounds.round, rounds.round, 1]), fresh))
        elif event == 3:
            follow(rounds.lost(site, "silent", now))
        elif event == 4 and collecting is not None:
            follow(rounds.reduced())
        elif event == 5 and collecting is not None and dice.random() < 0.2:
            follow(rounds.rejected(dice.choice(collecting.participants).site, "NaN", now))
        elif event == 6:
            follow(rounds.scored(site, versions[-1]))
            follow(rounds.tick(now))
        if rounds.over:
            break
        assert (collecting is not None) == (rounds.phase is Phase.AGGREGATING)
        for p in rounds.collecting:
            assert rounds.roster.get(p.site).state is SiteState.UPLOADING  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(100))
def test_who_joined_and_was_not_lost_is_there_whosever_update_is_invalid(seed: int) -> None:
    dice = random.Random(seed)
    rounds, there = machine(["a", "b", "c"], quorum=1, rounds=9), set[str]()
    for number in range(200):
        site, event = dice.choice("abc"), dice.randrange(4)
        if event == 0:
            there.add(site)
            rounds.joined(site, dice.choice("xy"), number)
        elif event == 1 and site in there:
            rounds.ready(site, rounds.round, Delivery(f"{number:032x}", 1))
        elif event == 2:
            there.discard(site)
            rounds.lost(site, "silent", number)
        elif rounds.phase is Phase.TRAINING:
            rounds.rejected(site, "length", number)
        if rounds.phase is Phase.AGGREGATING and dice.random() < 0.3:
            rounds.committed(rounds.round, number)
        if rounds.over:
            break
        assert {member.name for member in rounds.roster if member.alive} == there


def test_a_site_whose_update_does_not_count_may_go_once_that_is_decided() -> None:
    rounds = machine(["a", "b", "c"])
    join_all(rounds, "a", "b", "c")
    for site in "abc":
        actions = rounds.ready(site, 1, update(site))
    assert actions == [StartCollect(1, collecting("abc"))]
    rounds.judged(["b", "c"])
    assert rounds.lost("c", "gone", 2) == []
    assert not rounds.too_slow("b", 200)  # without it there would be too few
    assert rounds.reduced() == [Commit(1, collecting("abc"))]


def test_a_site_whose_update_counts_is_waited_for_if_too_few_are_left() -> None:
    rounds = machine(["a", "b", "c"], quorum=2)
    join_all(rounds, "a", "b", "c")
    for site in "abc":
        rounds.ready(site, 1, update(site))
    rounds.judged(["b", "c"])
    assert rounds.lost("c", "gone", 2) == []
    assert not rounds.too_slow("a", 200)
    assert rounds.lost("a", "gone", 2) == [HoldCollect()]
    assert rounds.joined("a", "a", 3) == [SendTask("a", "train", 1)]
    assert rounds.ready("a", 1, update("a")) == [StartCollect(1, collecting("ab"))]
    assert rounds.lost("b", "gone", 4) == [HoldCollect()]  # nothing is decided of these two
