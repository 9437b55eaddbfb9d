"""Failed rewards are listed with sample and cause, told once, and end the run if they are too many."""

import json

import pytest

from megavlm.monitor.reward_failures import FILE_NAME, JudgedAnswer, RewardFailures


def answer(number: int, *failures: str, **parts) -> JudgedAnswer:
    return JudgedAnswer(f"a.jsonl:{number}", number, parts, failures)


@pytest.fixture
def said() -> list[str]:
    return []


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]


def test_each_failure_is_listed_and_each_reward_is_told_once(tmp_path, said):
    failures = RewardFailures(tmp_path, 0, 0.5, said.append)
    bad = answer(1, "own: it raised: x", "math: no result after 10 s", own=None, math=None)
    failures.take(1, [answer(0, own=1.0, math=1.0), bad])
    failures.take(2, [answer(2, "own: é\n", own=None, math=0.0)])
    failures.take(3, [answer(0, own=1.0, math=1.0)])
    first = {"step": 1, "sample": "a.jsonl:1", "answer": 1}
    assert lines(tmp_path) == [
        {**first, "reward": "own", "cause": "it raised: x"},
        {**first, "reward": "math", "cause": "no result after 10 s"},
        {"step": 2, "sample": "a.jsonl:2", "answer": 2, "reward": "own", "cause": "é\n"},
    ]
    assert len(said) == 2
    assert "a.jsonl:1: the reward own: it raised: x" in said[0]
    RewardFailures(tmp_path, 1, 0.5, said.append)
    assert [line["step"] for line in lines(tmp_path)] == [1, 1]


def test_the_share_to_which_a_reward_does_not_apply_is_told_once(tmp_path, said):
    failures = RewardFailures(tmp_path, 0, 0.5, said.append)
    for step in (1, 2):
        failures.take(step, [answer(0, a=1.0, b=None), answer(1, a=1.0, b=2.0), answer(2, "a: x", a=None, b=1.0)])
    assert said[1].startswith("the reward b does not apply to 33.3 % of the answers of this step")
    assert len(said) == 2


def test_too_many_failures_end_the_run(tmp_path, said):
    failures = RewardFailures(tmp_path, 0, 0.25, said.append)
    good, bad = answer(0, a=1.0), answer(1, "a: it raised", a=None)
    failures.take(1, [bad] * 99)
    assert failures.failure() is None  # too few to judge
    failures.take(2, [good] * 297)
    assert failures.failure() is None  # exactly a quarter
    failures.take(3, [bad])
    error = failures.failure()
    assert "of the last 397 answers, 100 (25.2 %) got no reward because a reward failed" in error.message
    assert "reward_pool.max_failed_fraction = 0.25\n  100 × a: it raised" in error.message
    assert str(tmp_path / FILE_NAME) in error.remedy
    failures.take(4, [good] * 9000)
    assert failures.failure() is None
    failures.take(5, [bad] * 1000)  # only the last 1000 count
    assert "of the last 1,000 answers, 1,000 (100.0 %)" in failures.failure().message
    failures.take(6, [good] * 1000)
    failures.take(7, [JudgedAnswer("s", 0, {"a": None}, ["a: x"], is_counted=True)] * 900)
    assert failures.failure() is None  # weight 0: the answers have a total
    assert len(lines(tmp_path)) == 99 + 1 + 100 + 100  # a step lists 100 at most


def test_any_failure_is_too_many_if_none_is_allowed(tmp_path, said):
    failures = RewardFailures(tmp_path, 0, 0.0, said.append)
    failures.take(1, [answer(0, a=1.0)] * 99 + [answer(1, "a: x", a=None)])
    assert failures.failure() is not None
