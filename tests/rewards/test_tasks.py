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


def test_a_stalled_machine_leaves_a_moment():
    late = task(2)
    late.failed("no result", 50.0, has_ended=True)
    assert late.limit == 0.05
