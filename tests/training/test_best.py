"""The best value of a metric, and the early end, from lines of metrics."""

import math

import pytest

from megavlm.config.settings import EvalSettings
from megavlm.training.best import Best


def followed(values: list[float | None], **settings) -> Best:
    lines = [{"step": 2 * number, "eval/loss": value, "eval/accuracy": value} for number, value in enumerate(values, 1)]
    return Best(EvalSettings(every=2, **settings), [*lines[:1], {"step": 3, "loss": 0.0}, *lines[1:]])


@pytest.mark.parametrize(
    ("values", "metric", "step", "since"),
    [
        ([3.0, 2.0, 2.5], "eval/loss", 4, 1),
        ([3.0, 3.0, 3.0], "eval/loss", 2, 2),  # equal is no better
        ([0.3, 0.2, 0.25], "eval/accuracy", 2, 2),
        ([None, math.nan, 2.0, math.inf], "eval/loss", 6, 1),  # null, NaN and infinity are never the best
        ([math.nan, None], "eval/loss", None, 2),
        ([], "eval/loss", None, 0),
    ],
)
def test_the_best_step(values, metric, step, since):
    best = followed(values, best=metric)
    assert (best.step, best.since) == (step, since)


def test_the_weights_at_the_start_are_never_the_best():
    """They have no checkpoint. A score is the better, the larger it is."""
    scores = {0: 0.9, 2: 0.1, 4: 0.5, 6: 0.4}
    lines = [{"step": step, "eval/a/answers/score": value} for step, value in scores.items()]
    best = Best(EvalSettings(every=2, best="eval/a/answers/score"), lines)
    assert (best.step, best.value, best.since) == (4, 0.5, 1)
    best.forget()
    best.take({"step": 8, "eval/a/answers/score": 0.2})
    assert (best.step, best.value, best.since) == (8, 0.2, 0)


def test_the_end():
    assert followed([3.0, 2.0, 2.5], best="eval/loss").ending(6) is None
    assert followed([3.0, 2.0, 2.5], best="eval/loss", stop_after=2).ending(6) is None
    told = followed([3.0, 2.0, 2.5, 2.5], best="eval/loss", stop_after=2).ending(8)
    assert (
        told
        == "stopped early at step 8: eval/loss has not improved in 2 evaluations; the best, 2.000, is that of step 4"
    )
    assert followed([None], best="eval/loss", stop_after=1).ending(2).endswith("has not improved in 1 evaluation")


def test_without_a_metric_nothing_is_followed():
    best = followed([3.0])
    assert (best.step, best.since, best.ending(2)) == (None, 0, None)
