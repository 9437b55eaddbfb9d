"""Signals that ask a run to stop, sent to all its ranks at once, as a terminal, torchrun and srun do."""

import signal
from types import SimpleNamespace

import pytest
from killing import Commands, Kill
from test_kill import metrics_of, sft  # noqa: F401 (a fixture)


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
    outcome = commands.run(arguments, 1, output, Kill(0, delay=0.4, number=number))
    log = output.with_suffix(".log").read_text()
    assert outcome.statuses == [128 + number], log
    told = [line for line in log.splitlines() if "error" in line or "Error" in line]
    assert told == [f"error: ended by {name} before the first step of this start; no checkpoint was written"]
    assert not outcome.survivors


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
