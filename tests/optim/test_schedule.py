"""The learning rate of each step, against values that were worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from megavlm.align.registry import check_method
from megavlm.base.errors import UserError
from megavlm.config.load import load_settings, resolved_yaml
from megavlm.config.settings import Settings
from megavlm.layout.shapes import check_batch_ramp
from megavlm.optim.schedule import Schedule
from megavlm.plan.curve import curve


def train(**settings):
    return Settings(model={"hf": "hf"}, train={"lr": 1.0, **settings}).train


def rates(updates_per_step: int = 1, **settings):
    """rate(n): the learning rate after n steps."""
    schedule = Schedule(SimpleNamespace(param_groups=[]), train(**settings), updates_per_step)

    def rate(steps: int) -> float:
        schedule.num_steps = steps * updates_per_step
        return schedule.get_lr({})

    return rate


CASES = {
    # name: (settings, {steps that are done: rate})
    "wsd": (
        {"schedule": "wsd", "steps": 100, "warmup_steps": 10, "decay_share": 0.2, "min_lr": 0.2},
        {0: 0.0, 5: 0.5, 10: 1.0, 50: 1.0, 80: 1.0, 90: 0.6, 100: 0.2, 120: 0.2},
    ),
    "wsd, 1 - √": (
        {"schedule": "wsd", "steps": 100, "decay_share": 0.4, "decay_shape": "minus_sqrt"},
        {60: 1, 70: 0.5},
    ),
    "wsd, exponential": (
        {"schedule": "wsd", "steps": 100, "decay_share": 0.4, "decay_shape": "exponential"},
        {80: 2 * 0.5**0.5 - 1, 100: 0.0},
    ),
    "inverse square root": (
        {"schedule": "inverse_sqrt", "steps": 50, "warmup_steps": 4, "min_lr": 0.1},
        {2: 0.5, 4: 1.0, 16: 0.5, 36: 1 / 3, 100: 0.2, 10_000: 0.1},  # it has no end
    ),
    "√ of the rows of a ramp": (
        {
            "schedule": "linear",
            "steps": 8,
            "min_lr": 0.2,
            "batch_ramp": {2: 4, 4: 16},
            "global_batch_size": 64,
            "batch_ramp_lr": "sqrt",
        },
        {0: 0.25, 1: 0.25 * 0.9, 2: 0.5 * 0.8, 3: 0.5 * 0.7, 4: 0.6, 7: 0.3, 8: 0.2},
    ),
    "in proportion to the rows of a ramp": (
        {
            "schedule": "constant",
            "steps": 8,
            "warmup_steps": 2,
            "batch_ramp": {3: 16},
            "global_batch_size": 64,
            "batch_ramp_lr": "linear",
        },
        {0: 0.0, 1: 0.125, 2: 0.25, 3: 1.0},
    ),
    "a share of warm-up": ({"steps": 200, "warmup_share": 0.05, "schedule": "constant"}, {5: 0.5, 10: 1.0, 11: 1.0}),
    "a share of the schedule, not of the run": (
        {"steps": 200, "schedule_steps": 100, "warmup_share": 0.1, "schedule": "linear"},
        {5: 0.5, 10: 1.0, 55: 0.5, 100: 0.0, 150: 0.0},
    ),
    "restarts": (
        {"steps": 94, "warmup_steps": 4, "restarts": 2, "min_lr": 0.2},
        # three cosines of 30 steps after the warm-up; the last one ends at the lowest rate
        {4: 1.0, 19: 0.6, 33: 0.2 + 0.4 * (1 + math.cos(math.pi * 29 / 30)), 34: 1.0, 49: 0.6, 64: 1.0, 94: 0.2},
    ),
    "a table": (
        {"schedule": "table", "steps": 50, "schedule_table": {10: 1, 0: 0.5, 30: 0.2}},
        {0: 0.5, 5: 0.75, 10: 1.0, 20: 0.6, 30: 0.2, 99: 0.2},
    ),
}


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_rates_are_those_worked_out_by_hand(name, updates):
    settings, expected = CASES[name]
    rate = rates(updates, **settings)
    assert {steps: rate(steps) for steps in expected} == pytest.approx(expected)


def test_a_parameter_group_has_its_own_rates():
    for settings in ({"restarts": 1, "steps": 40}, {"schedule": "table", "schedule_table": {0: 0.5}, "steps": 40}):
        schedule = Schedule(SimpleNamespace(param_groups=[]), train(**settings))
        schedule.num_steps = 10
        assert schedule.get_lr({"max_lr": 4.0, "min_lr": 0.0}) == pytest.approx(2.0)


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_the_warm_up_is_that_of_transformers(warmup):
    """Also in the first step, which has no rate with any warm-up, even one of a single step."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, warmup, 12)
    rate = rates(steps=12, warmup_steps=warmup)
    for step in range(1, 13):
        assert rate(step - 1) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()
    assert (rate(0) == 0) == (warmup > 0)


def test_a_schedule_of_fewer_steps_ends_with_the_run():
    """20 of 120 steps without updates: after 50 steps with two updates each, cosine has half of its rate."""
    schedule = Schedule(SimpleNamespace(param_groups=[]), train(steps=120), 2, 20)
    schedule.num_steps = 7
    assert schedule.with_settings(train(steps=120)).num_steps == 7
    for other in (schedule, schedule.with_settings(train(steps=120, min_lr=0.5))):
        for steps, share in {0: 1.0, 50: 0.5, 100: 0.0}.items():
            other.num_steps = 2 * steps
            assert other.get_lr({}) == pytest.approx(other.min_lr + share * (1 - other.min_lr))


def test_restarts_are_those_of_a_schedule_without_them_up_to_the_first():
    """Twice the steps with one restart: the first half is the cosine of the whole of a run without one."""
    with_restart, without = rates(steps=80, restarts=1), rates(steps=40)
    assert [with_restart(n) for n in range(40)] == pytest.approx([without(n) for n in range(40)])


def test_the_curve_shows_rise_top_and_end():
    line = curve(train(steps=100, warmup_steps=20, schedule="linear"), width=10)
    picture, told = line.split(" ", 1)
    # rates in steps 1, 12, 23 … 100: 0, 0.55, 0.98, 0.84, 0.7, 0.56, 0.43, 0.29, 0.15, 0.01
    assert picture == "▁▅█▇▆▅▄▃▂▁"
    assert told == "0 in step 1, 0.975 in step 23, 0.0125 in step 100"
    assert curve(train(steps=1)) == "█ 1 in step 1"
    # with ten steps in which a critic learns alone: 0 up to step 10, then a schedule of 90 steps with the same warm-up
    picture, told = curve(train(steps=100, warmup_steps=20, schedule="linear"), 10, idle_steps=10).split(" ", 1)
    assert picture == "▁▁▅█▇▆▅▃▂▁"
    assert told == "0 in step 1, 0.957 in step 34, 0.0143 in step 100"


def test_a_table_of_steps_comes_back_from_config_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("model: {hf: hf}\n")
    given = ["train.schedule=table", "train.schedule_table={0: 0, 100: 1}", "train.lr=1"]
    settings = load_settings(tmp_path / "run.yaml", given)
    assert settings.train.schedule_table == {0: 0.0, 100: 1.0}
    (tmp_path / "config.yaml").write_text(resolved_yaml(settings))
    assert load_settings(tmp_path / "config.yaml") == settings


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.warmup_share=0.1", "train.warmup_steps=3"], "train.warmup_share is 0.1: one of them would be ignored"),
        (["train.steps=3", "train.epochs=2"], "train.steps is 3 and train.epochs is 2: one of them would be ignored"),
        (["train.restarts=2", "train.schedule=linear"], "train.restarts is 2, but train.schedule is linear"),
        (["train.decay_share=0.3"], "train.decay_share is 0.3, but train.schedule is cosine: it would be ignored"),
        (["train.schedule_table={0: 1}"], "but train.schedule is cosine: it would be ignored"),
        (["train.schedule=table"], "train.schedule_table is empty"),
        (["train.schedule=table", "train.schedule_table={0: 1.5}"], "schedule_table"),
        (["train.schedule=table", "train.schedule_table={x: 1}"], "schedule_table"),
        (["train.schedule=table", "train.schedule_table={0: 1}", "train.min_lr=0.1"], "train.schedule is table"),
        (["train.schedule=inverse_sqrt"], "there is no warm-up"),
        (["train.schedule=inverse_sqrt", "train.warmup_steps=2", "train.schedule_steps=9"], "it would be ignored"),
        (["train.batch_ramp={5: 4}"], "train.global_batch_size is not set"),
        (["train.batch_ramp_lr=sqrt"], "train.batch_ramp is empty: it would be ignored"),
        (["train.batch_ramp={5: 4, 9: 2}", "train.global_batch_size=8"], "must grow"),
        (["train.batch_ramp={5: 8}", "train.global_batch_size=8"], "must grow"),
        (["data.length_ramp={5: 64}", "data.seq_length=64"], "must grow"),
        (["train.steps=5", "train.batch_ramp={5: 4}", "train.global_batch_size=8"], "end before the ramp"),
        (["train.steps=5", "data.length_ramp={5: 8}", "data.seq_length=64"], "end before the ramp"),
        (["data.length_ramp={0: 8}", "data.seq_length=64"], "steps count from 1"),
        (["data.length_ramp={5: 30}", "data.seq_length=64", "data.pad_multiple=4"], "data.length_ramp[5] is 30, which"),
        (["data.length_ramp={5: 30}", "data.seq_length=64", "parallel.context=2"], "data.length_ramp[5] is 30, which"),
        (["data.train=[{path: a.jsonl, loss_weight: 0}]"], "loss_weight"),
        (["train.loss.label_smoothing=1"], "train.loss.label_smoothing is 1"),
        (["train.loss.per=batch"], "token | sample | sqrt"),
    ],
)
def test_what_makes_no_sense_is_told(tmp_path, overrides, words):
    (tmp_path / "run.yaml").write_text("model: {hf: hf}\n")
    with pytest.raises(UserError) as caught:
        load_settings(tmp_path / "run.yaml", ["train.lr=1", *overrides])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("verb", "override", "words"),
    [
        ("dpo", "train.loss.per=sample", "train.loss is set, but dpo does not use it"),
        ("kto", "data.length_ramp={1: 8}", "data.length_ramp is set, but kto does not use it"),
        ("rm", "data.train=[{path: a.jsonl, loss_weight: 2}]", "the loss_weight of data.train[0].path is set, but rm"),
        ("grpo", "train.epochs=1", "train.epochs is 1, but the steps of grpo are counted in prompts"),
    ],
)
def test_what_a_method_would_ignore_is_told(tmp_path, verb, override, words):
    (tmp_path / "run.yaml").write_text("model: {hf: hf}\n")
    with pytest.raises(UserError) as caught:
        check_method(verb, load_settings(tmp_path / "run.yaml", [override]))
    assert words in caught.value.message


def test_each_number_of_rows_suits_the_ranks():
    check_batch_ramp({5: 4, 9: 8}, Settings(model={"hf": "hf"}).parallel, 4)
    with pytest.raises(UserError, match=r"train.batch_ramp\[5\] is 2, which is not divisible by the 4 data-parallel"):
        check_batch_ramp({5: 2, 9: 8}, Settings(model={"hf": "hf"}).parallel, 4)
