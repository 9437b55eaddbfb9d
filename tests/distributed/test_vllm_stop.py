"""A stop signal while a real server samples: the step is left, the server ends, and the next start goes on."""

import signal

import pytest
from killing import Commands, Kill
from vllm_processes import processes_in
from vllm_runs import grpo_config
from vllm_served import CLOSE

from megavlm.monitor.metrics import read_metrics
from megavlm.monitor.rollout_log import read_rollouts


@pytest.fixture(scope="module")
def commands():
    commands = Commands()
    yield commands
    commands.close()


@pytest.mark.slow  # a minute and a half
def test_a_step_that_a_server_samples_is_left(python, commands, toys, tmp_path):
    """Sampling takes seconds here, and the signal comes half a second after the first step."""
    output, steps = tmp_path / "run", 3
    config = grpo_config(None, toys, output, steps, cache_gib=0.25, max_new_tokens=400)
    # Two ranks of one layout, so that the leader's answers are all.
    arguments = ["grpo", str(config), "parallel.tensor=2", "data.seq_length=1024", "checkpoint.every=null"]
    outcome = commands.run(arguments, 2, output, Kill(1, 1, 0.5, number=signal.SIGTERM))
    log = output.with_suffix(".log").read_text()
    assert outcome.statuses == [0, 0], log
    assert log.count("stopping without this step, whose answers are sampled again when the run continues") == 1
    assert "stopped at step 1; step 2 begins again when the run continues" in log
    assert not outcome.survivors
    assert not processes_in(output)
    assert [path.name for path in (output / "vllm").iterdir()] == ["server0.log"]  # and no weights for it
    assert [line["step"] for line in read_metrics(output)] == [1]
    assert [step.step for step in read_rollouts(output)] == [1]
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000001"]

    assert commands.run(arguments, 2, output).statuses == [0, 0], output.with_suffix(".log").read_text()
    assert not processes_in(output)
    lines, rollouts = read_metrics(output), read_rollouts(output)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert lines[1]["mismatch_max"] < CLOSE  # a start begins with answers of its present weights
    learned = [group.sample for step in rollouts for group in step.groups]
    assert len(learned) == 4 * steps
    assert len(set(learned[:8])) == 8, "a prompt of the step that was left was lost, or one was learned twice"
    assert lines[-1]["epoch/for_grpo"] == pytest.approx(steps / 2)
