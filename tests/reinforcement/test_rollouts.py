"""What becomes of the scores of reward models, and how groups are divided into mini-batches."""

import math

import pytest

from megavlm.reinforcement.judged import with_environment, with_models
from megavlm.reinforcement.rollouts import in_mini_batches
from megavlm.rewards.score import Score
from megavlm.rollout.engine import Answer


def test_the_score_of_a_reward_model_is_added_with_its_weight():
    found = with_models(Score(0.5, {"exact": 1.0}, []), {"taste": 2.0}, {"exact": 0.5, "taste": 0.25})
    assert (found.total, found.parts, found.failures) == (1.0, {"exact": 1.0, "taste": 2.0}, [])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_model_that_gives_no_number_has_failed(value):
    found = with_models(Score(1.0, {"exact": 1.0}, []), {"taste": value}, {"exact": 1.0, "taste": 1.0})
    assert found.total is None
    assert found.parts == {"exact": 1.0, "taste": None}
    assert found.failures == [f"taste: it returned {value}"]


@pytest.mark.parametrize(("groups", "count", "sizes"), [(8, 4, [2, 2, 2, 2]), (3, 2, [1, 2]), (1, 4, [0, 0, 0, 1])])
def test_mini_batches_are_cut_in_order(groups, count, sizes):
    parts = in_mini_batches(list(range(groups)), count)
    assert [len(part) for part in parts] == sizes
    assert [group for part in parts for group in part] == list(range(groups))


def spoken(reward: float | None, *failures: str) -> Answer:
    return Answer([1], [0.0], [0.0], [0.0], "stop", reward=reward, failures=failures)


def test_the_reward_of_an_environment_is_added_with_its_weight():
    weights = {"exact": 0.5, "environment": 2.0}
    found = with_environment(Score(0.5, {"exact": 1.0}, []), spoken(3.0), weights)
    assert (found.total, found.parts, found.failures) == (6.5, {"exact": 1.0, "environment": 3.0}, [])
    alone = with_environment(Score(None, {}, []), spoken(3.0), {"environment": 2.0})
    assert (alone.total, alone.parts) == (6.0, {"environment": 3.0})


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_an_answer_whose_environment_failed_has_no_reward(weight):
    weights = {"exact": 0.5, "environment": weight}
    found = with_environment(Score(0.5, {"exact": 1.0}, []), spoken(None, "step: no"), weights)
    assert found == Score(None, {"exact": 1.0, "environment": None}, ["environment: step: no"])
