"""The bar of a step's seconds: shares of the whole, and nothing without log.phases."""

import re
from pathlib import Path

import pytest

from megavlm.monitor.phases import PHASES
from megavlm.report.phases import phases_bar
from megavlm.report.run import RecordedRun


def test_shares():
    nothing = dict.fromkeys((f"phase/{name}" for name in PHASES), 0.0)
    start = {"step": 2, **nothing, "phase/data": 50.0}  # left out
    usual = {**nothing, "phase/decoder": 3.0, "phase/head": 0.5, "seconds_checkpoint": 1.0}  # once in two steps
    bar = phases_bar(RecordedRun(Path("run"), {}, [start, {"step": 4, **usual}, {"step": 6, **usual}]))
    widths = [float(width) for width in re.findall(r' width="([\d.]+)"', bar)]
    assert widths == pytest.approx([750.0, 125.0, 125.0])
    assert [name for name in (*PHASES, "checkpoint") if f">{name} " in bar] == ["decoder", "head", "checkpoint"]
    assert "decoder 3.000 s, 75 %" in bar


def test_nothing_without_phases():
    assert not phases_bar(RecordedRun(Path("run"), {}, [{"step": 1, "seconds": 1.0}]))
    assert not phases_bar(RecordedRun(Path("run"), {}, []))
