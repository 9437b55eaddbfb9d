"""Signals that ask a run to stop, sent to all its ranks at once, as a terminal, torchrun and srun do."""

import signal
from types import SimpleNamespace

import pytest
from killing import Commands, Kill
from test_grpo import grpo  # noqa: F401 (a fixture)
from test_kill import metrics_of, same_bits, sft  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def commands():
    commands = Commands()
    yield commands
    commands.close()


def test_ctrl_c_of_two_ranks_saves_and_the_clock_has_saved_before(commands, sft, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    arguments = sft(output, 50, ["checkpoint.every=null", "checkpoint.every_minutes=1e-6", "checkpoint.keep=99"])
    outcome = commands.run(arguments, 2, output, Kill(0, 2, number=signal.SIGINT))
    log = output.with_suffix(".log").read_text()
    assert outcome.statuses == [0, 0], log
    assert log.count("stopping after this step (press Ctrl-C again to stop at once)") == 1
    last = metrics_of(output)[-1]["step"]
    assert f"stopped at step {last}" in log
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == [
        f"step_{step:08}" for step in range(1, last + 1)
    ]
    assert not (output / "run.lock").exists()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_before_the_first_step_one_line_says_that_nothing_was_saved(commands, sft, tmp_path, number, name):  # noqa: F811
    output = tmp_path / "run"
    arguments = sft(output, 4, ["train.memory_check=true"])
    outcome = commands.run(arguments, 1, output, Kill(0, locked=True, number=number))
    log = output.with_suffix(".log").read_text()
    assert outcome.statuses == [128 + number], log
    told = [line for line in log.splitlines() if "error" in line or "Error" in line]
    assert told == [f"error: ended by {name} before the first step of this start; no checkpoint was written"]
    assert not outcome.survivors


LEFT = {
    "DP2": ["checkpoint.every=null"],  # the step before is saved now
    "PP2": ["checkpoint.every=1", "parallel.pipeline=2", "data.workers=2"],  # it is saved already
}


@pytest.mark.parametrize("layout", LEFT)
def test_a_step_that_is_being_sampled_is_left_and_begins_again(commands, grpo, tmp_path, layout):  # noqa: F811
    """Sampling takes seconds here, and the signal comes half a second after the first step: as a rule in the second."""
    long = ["train.steps=2", "rollout.max_new_tokens=200", "data.seq_length=512", "rollout.log_every=1"]
    arguments = lambda output: grpo(output, [*long, *LEFT[layout]])
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert commands.run(arguments(straight), 2, straight).statuses == [0, 0], straight.with_suffix(".log").read_text()
    outcome = commands.run(arguments(stopped), 2, stopped, Kill(1, 1, 0.5, number=signal.SIGTERM))
    log = stopped.with_suffix(".log").read_text()
    assert outcome.statuses == [0, 0], log
    assert "stopped at step 1; step 2 begins again when the run continues" in log
    assert [line["step"] for line in metrics_of(stopped)] == [1]
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step_00000001"]
    assert commands.run(arguments(stopped), 2, stopped).statuses == [0, 0], stopped.with_suffix(".log").read_text()
    assert metrics_of(stopped) == metrics_of(straight)
    assert (stopped / "rollouts.jsonl").read_text() == (straight / "rollouts.jsonl").read_text()
    assert same_bits(*(run / "checkpoints" / "step_00000002" for run in (straight, stopped)))


def decide(minutes_of):
    """On every rank: decisions of two steps after the clock has begun, the first of them with a signal on rank 1."""
    import torch.distributed as dist

    from megavlm.config.settings import ParallelSettings
    from megavlm.platform import init
    from megavlm.training.stop_signal import StopSignal

    group = init(ParallelSettings()).world_host
    signals = SimpleNamespace(asked=dist.get_rank() == 1, defer=lambda: None)
    stop = StopSignal(group, signals, minutes_of[dist.get_rank()])
    stop.begin()
    first = stop.decide()
    signals.asked = False
    stop.saved()
    return [tuple(first), tuple(stop.decide())]


def test_all_ranks_decide_together_and_the_clock_of_the_first_counts(world2):
    assert world2.run(decide, [60.0, 1e-9]) == [[(True, False), (False, False)]] * 2
    assert world2.run(decide, [1e-9, 60.0]) == [[(True, True), (False, True)]] * 2
