"""How a start continues the run in its output folder: what it says of the learning rate, and when it refuses."""

from types import SimpleNamespace

import pytest

from megavlm.base.errors import RunFailure
from megavlm.config.settings import Settings
from megavlm.optim.optimizers import Optimizers
from megavlm.optim.schedule import Schedule
from megavlm.output.folder import StartOptions, plan_start, prepare_output
from megavlm.output.lock import RunLock
from megavlm.training.continuing import remarks_on
from megavlm.training.run import _prepare


@pytest.fixture
def settings(tmp_path):
    """settings(…): of a run in one output folder, with these settings of the section train."""
    return lambda **train: Settings(model={"hf": "hf"}, output=tmp_path / "run", train={"lr": 1e-3, **train})


def optimizers_after(steps, train):
    """With the schedule of the ``train`` section after this number of steps, and no parameters."""
    optimizers = object.__new__(Optimizers)
    optimizers.scheduler = Schedule(SimpleNamespace(param_groups=[]), train)
    optimizers.scheduler.step(increment=steps)
    return optimizers


def said(settings, before, after, *change):
    """What a start with ``after`` says of a run that was started with ``before`` and has done 20 steps."""
    prepare_output(settings(**before))
    (settings().output / "checkpoints" / "step_00000020").mkdir(parents=True)
    start = plan_start(settings(**after), StartOptions(change=change))
    return remarks_on(start, optimizers_after(20, start.settings.train), 20)


def test_a_longer_run_says_what_both_schedules_give(settings):
    # cosine from 1e-3 to 0: after 20 of 30 steps ½ (1 + cos 120°) = 0.25 of it, after 20 of 60 steps 0.75
    changed, schedule = said(settings, {"steps": 30}, {"steps": 60})
    assert changed == "from step 21 on, train.steps is 60 (it was 30)"
    assert "the schedule of this run has 30 steps: the learning rate of step 21 is 0.00025, and after" in schedule
    assert "A schedule of 60 steps would set it to 0.00075: train.schedule_steps=60 --change train.sch" in schedule


def test_a_schedule_that_is_asked_for_says_what_it_changes(settings):
    told = said(settings, {"steps": 30}, {"steps": 60, "schedule_steps": 60}, "train.schedule_steps")
    assert "from step 21 on, train.schedule_steps is 60 (it was 30)" in told
    assert told[-1] == "the learning rate of step 21 is 0.00075; with the settings before it was 0.00025"


def test_more_epochs_keep_the_schedule(settings):
    first = {"steps": None, "epochs": 2.0, "schedule_steps": 30, "min_lr": 1e-5}
    told = said(settings, first, {**first, "epochs": 3.0, "schedule_steps": None})
    assert told[0] == "from step 21 on, train.epochs is 3.0 (it was 2.0)"
    assert "has 30 steps, after which the learning rate stays at train.min_lr = 1e-05" in told[1]
    assert len(told) == 2


def test_a_run_that_is_as_before_says_nothing(settings):
    assert said(settings, {"steps": 30}, {"steps": 30}) == []


def test_a_run_whose_checkpoints_cannot_be_read_does_not_begin_again(settings):
    """The file system may be at fault; a run that began again would write over them."""
    prepare_output(settings())
    root = settings().output / "checkpoints"
    (root / "step_00000020").mkdir(parents=True)
    with RunLock(settings().output) as lock, pytest.raises(RunFailure, match=f"none of the checkpoints in {root}"):
        _prepare(settings(), lock, StartOptions())
    assert [path.name for path in root.iterdir()] == ["step_00000020"]
