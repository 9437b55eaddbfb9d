"""How a start continues the run in its output folder: what it says of the learning rate, and when it refuses."""

import json
from types import SimpleNamespace

import pytest

from megavlm.base.errors import RunFailure, UserError
from megavlm.config.eval_section import EvalSettings
from megavlm.config.load import load_settings
from megavlm.config.settings import Settings
from megavlm.optim.optimizers import Optimizers
from megavlm.optim.schedule import Schedule
from megavlm.output.folder import Start, StartOptions, plan_start, prepare_output
from megavlm.output.lock import RunLock
from megavlm.training import epochs, run
from megavlm.training.continuing import remarks_on
from megavlm.training.epochs import expect_steps
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


def test_steps_instead_of_epochs_are_told_without_a_schedule_of_none(settings):
    told = said(settings, {"epochs": 2.0, "schedule_steps": 30}, {"steps": 40})
    assert any("A schedule of 40 steps would set it to" in words for words in told)
    assert not any("None" in words for words in told)


@pytest.mark.parametrize("train", [{"warmup_steps": 31}, {"batch_ramp": {30: 2}, "global_batch_size": 4}, {}])
def test_what_does_not_fit_the_steps_of_epochs_is_told_before_they_begin(settings, train, monkeypatch):
    monkeypatch.setattr(epochs, "on_first_rank", lambda function, group: function())
    begin = prepare_output(settings(epochs=2.0, **train))
    file, loader = settings().output / "config.yaml", SimpleNamespace(expected_steps=lambda: (30, True))
    before = file.read_text()
    if "warmup_steps" in train:
        with pytest.raises(UserError, match=r"train.warmup_steps is 31, but train.epochs = 2 takes 30 steps"):
            expect_steps(begin, loader, SimpleNamespace(world_host=None))
        assert file.read_text() == before
        return
    begin, said = expect_steps(begin, loader, SimpleNamespace(world_host=None))
    assert begin.settings.train.schedule_steps == 30
    assert said[1:] == (["the run may end before this: train.batch_ramp, up to step 30"] if train else [])
    assert load_settings(file).train.schedule_steps == 30


@pytest.mark.parametrize(("when", "best"), [("never", 2), ("earlier", 8), ("now", None)])
def test_the_best_value_is_that_of_the_held_out_data_of_now(settings, when, best, monkeypatch):
    """The lowest loss is that of step 2, before data.eval changes after step 4."""
    monkeypatch.setattr(run, "on_first_rank", lambda function, group: function())
    now = settings().model_copy(update={"eval": EvalSettings(every=2, best="eval/loss")})
    now.output.mkdir()
    lines = [{"step": step, "eval/loss": loss} for step, loss in {2: 1.0, 4: 2.0, 6: 5.0, 8: 4.0}.items()]
    (now.output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change = {"step": 4, "time": "", "setting": "data.eval[0].path", "old": "a", "new": "b"}
    if when == "earlier":
        (now.output / "changes.jsonl").write_text(json.dumps(change) + "\n")
    changed = {"eval.rows": (None, 3)} if when == "now" else {}
    checkpoints = SimpleNamespace(link=lambda step, last: (step, []))
    assert run._best(Start("resume", now, now, changed), 8, checkpoints, None)[0].step == best


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
