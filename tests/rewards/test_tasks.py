"""How long the answers of a group may take one by one, and who fails."""

import pytest

from megavlm.rewards.tasks import MOST_DEATHS, Group, Task


def task(count: int) -> Task:
    return Task(Group("key", count, b""), 0, timeout=10.0)


def test_a_group_takes_at_most_twice_its_time():
    slow, spent = task(4), 0.0
    while not slow.is_done and len(slow.causes) < MOST_DEATHS:
        spent += slow.limit
        slow.failed("no result", slow.limit, has_ended=True)
    assert spent == pytest.approx(10 + 3 * 10 / 4)  # the fourth is given up
    assert slow.causes[3] == f"not tried after {MOST_DEATHS} other answers: no result"


def test_an_answer_gets_what_those_before_it_have_left_over():
    mixed = task(3)
    mixed.failed("it raised", 1.0, has_ended=False)
    assert (mixed.answers, mixed.limit) == ([0], pytest.approx(19 / 3))
    mixed.succeeded([1.0], {}, 0.5)
    assert (mixed.answers, mixed.limit) == ([1], pytest.approx(18.5 / 2))
    mixed.failed("it raised", 0.5, has_ended=False)
    assert (mixed.answers, mixed.limit) == ([2], pytest.approx(18))
    assert not mixed.is_done
    mixed.succeeded([None], {"0": "it returned nan"}, 30.0)
    assert mixed.is_done
    assert (mixed.values, mixed.causes) == ([1.0, None, None], {1: "it raised", 2: "it returned nan"})


def test_an_answer_is_to_blame_for_the_second_kill_only():
    killed = lambda: alone.failed("killed", 1.0, has_ended=True, was_killed=True)
    alone = task(1)
    killed()
    assert (alone.answers, alone.limit, alone.is_done) == ([0], 19.0, False)
    killed()
    assert (alone.is_done, alone.causes) == (True, {0: "killed"})
    alone = task(3)
    killed()  # all of them together
    killed()
    alone.succeeded([1.0], {}, 1.0)
    killed()  # the second answer, which has nothing to do with the first one's
    alone.failed("it raised", 1.0, has_ended=False)
    killed()
    killed()
    assert (alone.is_done, alone.values[0], alone.causes) == (True, 1.0, {1: "it raised", 2: "killed"})


def test_a_stalled_machine_leaves_a_moment():
    late = task(2)
    late.failed("no result", 50.0, has_ended=True)
    assert late.limit == 0.05
