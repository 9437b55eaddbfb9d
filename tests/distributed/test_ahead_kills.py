"""A run that samples ahead is killed again and again, its server lives on: no prompt is lost, none is learned twice."""

import random

import pytest
from killing import Commands, Kill
from test_kill import reached
from toy import toy_records, write_records
from vllm_runs import grpo_config

from megavlm.monitor.metrics import read_metrics
from megavlm.monitor.rollout_log import read_rollouts

STEPS, AHEAD, RECORDS = 40, 2, 44  # 160 prompts: more than three times each record


@pytest.fixture(scope="module")
def commands():
    commands = Commands(reports=False)
    yield commands
    commands.close()


@pytest.mark.slow
def test_killed_ten_times_at_random_moments(commands, served, toys, tmp_path):
    """The prompts of each step are those of a run that nothing has interrupted, of which the leader has all."""
    records = toy_records(toys.root)
    data = write_records(toys.root / "for_kills.jsonl", [records[number % 8] for number in range(RECORDS)])
    settings = [f"data.train=[{{path: {data}}}]", "data.workers=1", "parallel.tensor=2", "checkpoint.every=2"]
    arguments = lambda output: [
        "grpo", str(grpo_config(served, toys, output, STEPS, ahead=AHEAD)), "checkpoint.keep=2", *settings
    ]  # fmt: skip
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert commands.run(arguments(straight), 2, straight).statuses == [0, 0], straight.with_suffix(".log").read_text()
    draw = random.Random(16)
    starts = []
    for number in range(10):
        # Five of them come three steps or more after the last checkpoint, so that a slow disk has one in between.
        done, rank, more, delay = reached(killed), draw.randrange(2), draw.randrange(6), draw.random()
        kill = Kill(rank, done + more if more else 0, (0.5 if more else 8) * delay, writing=number == 5)
        outcome = commands.run(arguments(killed), 2, killed, kill)
        assert outcome.statuses[rank] == -9
        assert not outcome.survivors
        starts.append(done)
    assert len(set(starts)) > 4, "hardly a kill came after a checkpoint"
    assert commands.run(arguments(killed), 2, killed).statuses == [0, 0], killed.with_suffix(".log").read_text()

    expected, found = (
        [[group.sample for group in step.groups] for step in read_rollouts(run)] for run in (straight, killed)
    )
    assert found == expected
    learned = [sample for step in expected for sample in step]
    assert len(learned) == 4 * STEPS
    for epoch in range(3):
        own = learned[epoch * RECORDS : (epoch + 1) * RECORDS]
        assert len(set(own)) == len(own), "an epoch has a record twice"
    for run in (straight, killed):
        lines = read_metrics(run)
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert max(line["staleness"] for line in lines) == AHEAD
        assert lines[-1]["epoch/for_kills"] == pytest.approx(4 * STEPS / RECORDS)
