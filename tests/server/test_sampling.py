"""Rounds in which some of the sites train: who is chosen, waited for and replaced."""

from __future__ import annotations

from fedcore.server.rounds.actions import Choose, SendDropped, SendTask, StartCollect
from fedcore.server.rounds.rounds import Rounds

from .playing import ahead, part, sampling, trained, update


def play_sampled(rounds: Rounds, order: str) -> list[list[str]]:
    """Let all join in this order and deliver what they owe, round after round; return who trained."""
    actions = [action for site in order for action in rounds.joined(site, site, 0)]
    history = []
    while rounds.round < 50:
        history.append(trained(actions))
        heard = [a for site in history[-1] for a in rounds.ready(site, rounds.round, update(site))]
        assert heard == [
            *ahead(history[-1][0], rounds.round),
            StartCollect(rounds.round, tuple(part(s) for s in history[-1])),
        ]
        rounds.reduced()
        actions = rounds.committed(rounds.round, 1)
    return history


def test_a_sample_depends_on_the_seed_and_the_round_and_not_on_who_came_first() -> None:
    history = play_sampled(sampling(list("abcde"), 2, seed=7), "abcde")
    assert history == play_sampled(sampling(list("abcde"), 2, seed=7), "ecbda")
    assert history != play_sampled(sampling(list("abcde"), 2, seed=8), "abcde")
    assert all(len(chosen) == 2 for chosen in history)
    counts = [sum(site in chosen for chosen in history) for site in "abcde"]
    assert min(counts) >= 8, "each should be chosen in about two of five rounds"


def test_the_first_sample_waits_for_all_sites_but_not_for_ever() -> None:
    rounds = sampling(["a", "b", "c"], 2)
    assert rounds.joined("a", "a", 0) == rounds.joined("b", "b", 10) == []
    assert rounds.tick(29) == []
    assert trained(rounds.tick(30)) == ["a", "b"]
    assert rounds.joined("c", "c", 31) == []
    assert rounds.ready("a", 1, update("a")) == ahead("a")
    assert rounds.ready("b", 1, update("b")) == [StartCollect(1, (part("a"), part("b")))]


def test_a_sampled_round_does_not_wait_for_a_site_that_never_came() -> None:
    rounds = sampling(["a", "b", "c"], 1)
    rounds.joined("a", "a", 0)
    assert trained(rounds.tick(30)) == ["a"]
    assert rounds.ready("a", 1, update("a")) == [StartCollect(1, (part("a"),))]


def test_a_choice_is_written_down_before_anyone_is_asked_to_train() -> None:
    rounds = sampling(["a", "b", "c"], 2, seed=1)
    actions = [a for site in "abc" for a in rounds.joined(site, site, 0)]
    first, second = trained(actions)
    assert actions[0] == Choose(1, (first, second))
    for site in (first, second):
        rounds.ready(site, 1, update(site))
    rounds.reduced()
    actions = rounds.committed(1, 1)
    assert actions[0] == Choose(2, tuple(trained(actions)))


def test_a_chosen_site_that_is_lost_is_replaced() -> None:
    rounds = sampling(["a", "b", "c"], 2, seed=1)
    actions = [a for site in "abc" for a in rounds.joined(site, site, 0)]
    first, second = trained(actions)
    (third,) = set("abc") - {first, second}
    assert rounds.ready(first, 1, update(first)) == ahead(first)
    assert rounds.lost(second, "gone", 5) == [
        Choose(1, ("a", "b", "c")),
        SendTask(third, "train", 1),
    ]
    assert rounds.ready(third, 1, update(third)) == [
        StartCollect(1, tuple(part(site) for site in sorted([first, third])))
    ]


def test_an_update_of_a_site_that_was_not_chosen_is_turned_away() -> None:
    rounds = sampling(["a", "b"], 1)
    (chosen,) = trained([a for site in "ab" for a in rounds.joined(site, site, 0)])
    (other,) = {"a", "b"} - {chosen}
    assert rounds.ready(other, 1, update(other)) == [
        SendDropped(other, 1, "it was not chosen for round 1")
    ]


def test_with_too_few_left_a_sampled_round_closes_with_the_quorum() -> None:
    rounds = sampling(["a", "b"], 2, quorum=1)
    for site in "ab":
        rounds.joined(site, site, 0)
    assert rounds.lost("b", "gone", 5) == []
    assert rounds.ready("a", 1, update("a")) == [StartCollect(1, (part("a"),))]
