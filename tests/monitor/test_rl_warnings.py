"""Warnings in words: when each is said, when it is said again, and that a resumed run says the same."""

import json
import math

import pytest

from megavlm.monitor.metrics import REQUIRED, MetricsWriter, read_metrics
from megavlm.monitor.rl_warnings import RlWarnings, history

HEALTHY = {
    "reward": 0.4, "reward_std": 0.3, "flat_groups": 0.3, "kl": 0.05, "entropy": 0.8, "clip_share": 0.01,
    "ratio_max": 3.0, "mismatch_kl": 5e-4, "mismatch_max": 1.5, "answer_tokens": 200.0, "truncated_share": 0.05,
    "reward_failures": 0,
}  # fmt: skip


def run_of(**columns):
    """Lines of a healthy run but for these columns."""
    count = max(map(len, columns.values()))
    lines = [{**HEALTHY, "step": step} for step in range(1, count + 1)]
    for name, values in columns.items():
        for line, value in zip(lines, values, strict=False):
            line[name] = value
    return lines


def said_by(lines, watch=None):
    watch = watch or RlWarnings()
    return [(line["step"], warning) for line in lines for warning in watch.take(line)]


# What goes wrong → values, the step at which it is said, since which step, words of what was seen, settings that help.
CASES = {
    "entropy": ([0.8, 0.4, 0.19, 0.19, 0.1], 5, 3, "0.100 nats per token, 12 % of the 0.800", ["align.epsilon_high"]),
    "flat_groups": ([0.5] + [0.9] * 6, 6, 2, "in 90 % of the groups", ["rollout.group_size", "rollout.temperature"]),
    "kl": ([0.1, 1.1, 2.0, 30.0, 50.0], 4, 2, "is 30.0 nats per token", ["align.beta", "train.lr"]),
    "mismatch_kl": ([0.02] * 4, 3, 1, "mismatch_kl is 0.0200 nats", ["align.correction"]),
    "ratio_max": ([2.0, 11.0, 500.0, 11.0], 4, 2, "a factor of 11.0", ["train.lr", "align.epsilon_high"]),
    "truncated_share": (
        [0.1, 0.25, 0.3, 0.5],
        *(4, 2, "50 % were cut off at rollout.max_new_tokens (their mean length is 200 tokens)"),
        ["rollout.max_new_tokens", "align.mask_truncated"],
    ),
    "reward_failures": ([0, 3], 2, 2, "those of 3 answers", ["reward_failures.jsonl"]),
}


@pytest.mark.parametrize("field", CASES)
def test_each_is_said_once_with_what_was_seen_and_what_helps(field):
    values, step, since, seen, settings = CASES[field]
    ((when, warning),) = said_by(run_of(**{field: values}))
    assert (when, warning.kind, warning.since) == (step, field, since)
    assert str(warning).startswith(f"since step {since}, ")
    assert seen in warning.seen
    for setting in settings:
        assert setting in warning.helps


@pytest.mark.parametrize("field", CASES)
def test_less_than_that_is_not_said(field):
    """One line fewer; or with a good line in between."""
    values, step, *_ = CASES[field]
    good = HEALTHY[field]
    assert said_by(run_of(**{field: values[: step - 1]})) == []
    if field != "reward_failures":
        assert said_by(run_of(**{field: [*values[: step - 1], good, *values[step - 1 :]]})) == []


def test_it_is_said_again_only_when_it_had_gone_away():
    bad, good = [2.0] * 4, [0.1]
    flicker = said_by(run_of(kl=[*bad, *good * 4, *bad, *good * 4, *bad]))
    assert [step for step, _ in flicker] == [3]
    lines = run_of(kl=[*bad, *good * 5, *bad])
    assert [(step, warning.since) for step, warning in said_by(lines)] == [(3, 1), (12, 10)]
    assert [(warning.since, end) for warning, end in history(lines)] == [(1, 9), (10, None)]


def test_values_that_are_no_numbers_change_nothing():
    none = [None, math.nan, math.inf]
    lines = run_of(ratio_max=[*none, 20.0, *none, 20.0, *none, 20.0])
    del lines[5]["ratio_max"]
    assert [step for step, _ in said_by(lines)] == [12]


def test_a_run_of_another_method_or_without_entropy_is_never_warned():
    others = [{**dict.fromkeys(REQUIRED, 1e9), "step": step, "accuracy": 0.0} for step in range(1, 9)]
    assert said_by(others) == []
    assert said_by(run_of(entropy=[0.0] * 9)) == []  # deterministic from the start: nothing has collapsed


def test_a_resumed_run_says_the_same(tmp_path):
    columns = {name: [*values, *[HEALTHY[name]] * 6, *values] for name, (values, *_) in CASES.items()}
    lines = [{**dict.fromkeys(REQUIRED, 1.0), **line} for line in run_of(**columns)]
    lines[2]["kl"] = math.inf  # null in the file
    whole = said_by(lines)
    assert {warning.kind for _, warning in whole} == set(CASES)
    with MetricsWriter(tmp_path) as writer:
        for line in lines:
            writer.write(line)
    text = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [warning for warning, _ in history(read_metrics(tmp_path))] == [warning for _, warning in whole]
    for stop in range(len(lines)):
        before = [json.loads(line) for line in text[:stop]]
        assert said_by(lines[stop:], RlWarnings(before)) == [said for said in whole if said[0] > stop]


def test_an_entropy_that_falls_and_stays_above_half_a_nat_has_not_collapsed():
    assert said_by(run_of(entropy=[5.0, 1.0, 1.0, 1.0])) == []


def test_answers_of_older_weights_may_differ():
    lines = [{"step": n, "mismatch_kl": 1.0, "mismatch_max": 2.0, "staleness": 0.0} for n in range(1, 6)]
    watch, ahead = RlWarnings(), RlWarnings()
    assert [found for line in lines for found in watch.take(line)]
    assert not [found for line in lines for found in ahead.take({**line, "staleness": 1.0})]
