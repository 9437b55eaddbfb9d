"""What becomes of the scores of reward models, and how groups are divided into mini-batches."""

import math

import pytest

from megavlm.reinforcement.rollouts import _with_models, in_mini_batches
from megavlm.rewards.score import Score


def test_the_score_of_a_reward_model_is_added_with_its_weight():
    found = _with_models(Score(0.5, {"exact": 1.0}, []), {"taste": 2.0}, {"exact": 0.5, "taste": 0.25})
    assert (found.total, found.parts, found.failures) == (1.0, {"exact": 1.0, "taste": 2.0}, [])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_model_that_gives_no_number_has_failed(value):
    found = _with_models(Score(1.0, {"exact": 1.0}, []), {"taste": value}, {"exact": 1.0, "taste": 1.0})
    assert found.total is None
    assert found.parts == {"exact": 1.0, "taste": None}
    assert found.failures == [f"taste: it returned {value}"]


@pytest.mark.parametrize(("groups", "count", "sizes"), [(8, 4, [2, 2, 2, 2]), (3, 2, [1, 2]), (1, 4, [0, 0, 0, 1])])
def test_mini_batches_are_cut_in_order(groups, count, sizes):
    parts = in_mini_batches(list(range(groups)), count)
    assert [len(part) for part in parts] == sizes
    assert [group for part in parts for group in part] == list(range(groups))
