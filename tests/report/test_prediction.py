"""Predicted beside measured in the report of a run."""

import json

from megavlm.report.plan_memory import GIB
from megavlm.report.prediction import Comparison, predictions
from megavlm.report.run import RecordedRun

PLAN = {
    "device": "NVIDIA H100 80GB HBM3", "gpu": {"name": "H100 SXM 80 GB"}, "world_size": 8, "mix": "full rows",
    "caveats": "Not counted: CUDA.", "stages": [
        {"total": 50 * GIB, "moments": [{"name": "load", "total": 50 * GIB}, {"name": "decoder", "total": 40 * GIB}]},
        {"total": 60 * GIB},
    ],
    "time": {"seconds": 2.0},
    "tokens_per_second": 1000.0, "mfu": 0.4,
}  # fmt: skip
LINES = [
    {
        "step": step,
        "memory_gib": 38.0 + step,
        "seconds": seconds,
        "tokens_per_second": 16000 / seconds,
        "mfu": 0.8 / seconds,
    }
    for step, seconds in enumerate((9.0, 2.5, 2.4, 2.6), start=1)
]


def test_on_a_gpu(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    found = predictions(RecordedRun(tmp_path, {}, LINES))
    assert (found.gpu, found.device) == ("H100 SXM 80 GB", "NVIDIA H100 80GB HBM3")
    assert found.rows == (  # rank 0 is on the first stage; the first step includes the start
        Comparison("peak memory of rank 0, GiB", "40.00", "42.00", "1.05"),
        Comparison("seconds of a step", "2.000", "2.500", "1.25"),
        Comparison("tokens per second and GPU", "1.00k", "800", "0.800"),
        Comparison("MFU", "40.0 %", "32.0 %", "0.800"),
    )


def test_on_a_cpu_no_memory_is_compared(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN | {"device": None}))
    lines = [line | {"mfu": None} for line in LINES]
    memory, seconds, _, mfu = predictions(RecordedRun(tmp_path, {}, lines)).rows
    assert (memory.measured, memory.ratio) == ("–", "–")
    assert (mfu.measured, mfu.ratio) == ("–", "–")
    assert seconds.measured == "2.500"


def test_of_reinforcement_learning_no_time_is_compared(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(PLAN))
    (memory,) = predictions(RecordedRun(tmp_path, {}, [line | {"reward": 0.5} for line in LINES])).rows
    assert memory.measured == "42.00"


def test_without_a_plan(tmp_path):
    run = RecordedRun(tmp_path, {}, LINES)
    assert predictions(run) is None
    (tmp_path / "plan.json").write_text('{"error": "no <such> GPU"}')
    assert predictions(run).error == "no <such> GPU"
    for damaged in ("{", "[]", "{}", json.dumps(PLAN | {"stages": []})):
        (tmp_path / "plan.json").write_text(damaged)
        assert predictions(run).error == "plan.json is damaged, or of another version"
