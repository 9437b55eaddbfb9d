"""What a plan says of its assumptions, with settings and figures by hand."""

from dataclasses import replace

import pytest

from megavlm.plan.as_json import caveats, figures
from megavlm.plan.checkpoints import Checkpoint
from megavlm.plan.gpus import gpu_of
from megavlm.plan.plan import Plan
from megavlm.plan.step_time import StepTime

H100 = gpu_of("h100")
TIME = StepTime(2.0, {}, [], {}, [])
PLAN = Plan(H100, 8, 8, None, 8, 8192, [], {}, {}, TIME, Checkpoint(1, 1.0, True), steps=1800)


def test_shipped_shares_are_assumptions_and_measured_ones_are_not():
    assert "from assumed shares of it and latencies" in caveats(PLAN)
    measured = replace(H100, operators={**H100.operators, "points": []})
    assert "assumed shares" not in caveats(replace(PLAN, gpu=measured))


@pytest.mark.parametrize("ramps", [["train.batch_ramp"], ["data.length_ramp", "train.unfreeze_after"]])
def test_steps_behind_ramps_are_planned(ramps):
    assert figures(PLAN)["hours"] == 1
    assert "ramp" not in caveats(PLAN)
    assert f"as the last ones are behind {' and '.join(ramps)}" in caveats(replace(PLAN, ramps=ramps))


def test_the_hours_of_epochs_are_not_known():
    assert "epochs" not in caveats(PLAN)
    assert figures(replace(PLAN, steps=None))["hours"] is None
    assert "given in epochs, so that its hours are not known" in caveats(replace(PLAN, steps=None))
