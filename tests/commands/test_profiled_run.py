"""A run with log.phases and train.profile: metrics.jsonl, the trace and the report tell where its time went."""

import gzip
import json

import pytest
from parity import Toys
from test_train_verbs import megavlm, metrics_of, sft_config

from megavlm.monitor.phases import PHASES


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


UNUSED = ("reference", "sampling")  # phases that sft does not have


def test_a_profiled_run(toys, tmp_path):
    config = sft_config(toys, tmp_path, steps=2)
    megavlm("sft", config, "log.phases=true", "train.profile.start=2", "train.profile.steps=1")
    lines = metrics_of(tmp_path / "run")
    for line in lines:
        split = [line.pop(f"phase/{name}") for name in PHASES]
        assert sum(split) == pytest.approx(line["seconds"], rel=0.1, abs=0.05)
        assert all(seconds > 0 for name, seconds in zip(PHASES, split, strict=True) if name not in UNUSED)
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    events = {event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert {"step 2", "data", "tower", "exchange", "decoder", "head", "reduction", "optimizer"} <= events
    assert "step 1" not in events
    assert "Seconds of a step" in (tmp_path / "run" / "report.html").read_text()
