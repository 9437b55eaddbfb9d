"""What a plan says of its assumptions, with settings and figures by hand."""

from dataclasses import replace

import pytest

from megavlm.config.settings import Settings
from megavlm.plan.as_json import caveats, figures
from megavlm.plan.checkpoints import Checkpoint
from megavlm.plan.gpus import gpu_of
from megavlm.plan.plan import Plan
from megavlm.plan.stage import kernels_on_gpus
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


@pytest.mark.parametrize(
    ("kernels", "precision", "expected"),
    [
        ("auto", "bf16", "te"),
        ("te", "fp8", "te"),
        ("auto", "fp32", "portable"),  # for which Transformer Engine has no fused attention
        ("portable", "bf16", "portable"),
        ("te", "bf16", "te"),
    ],
)
def test_the_kernels_that_are_meant(kernels, precision, expected):
    settings = Settings(
        model={"hf": "model", "load": "none", "kernels": kernels},
        data={"seq_length": 8192},
        train={"precision": precision, "lr": 1e-5, "steps": 1, "global_batch_size": 1},
    )
    assert kernels_on_gpus(settings) == expected
    said = {"te": "what Transformer Engine's layers keep in bf16", "portable": "those of the portable kernels"}
    assert said[expected] in caveats(replace(PLAN, kernels=expected))
