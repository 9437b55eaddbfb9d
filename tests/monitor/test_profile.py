"""Traces of single steps: only what was asked for, and no run ends for one that cannot be written."""

import gzip
import json

import pytest
import torch

from megavlm.base.errors import UserError
from megavlm.config.profile_section import ProfileSettings
from megavlm.monitor.phases import Phases
from megavlm.monitor.profile import Profile


def run(folder, *, rank=0, numbers=range(1, 5), **settings):
    """Steps with one product each; returns the names of the events of the trace, None if there is none."""
    phases = Phases()
    profile = Profile(ProfileSettings(**settings), folder, rank, 2, phases)
    for number in numbers:
        with profile.step(number), phases.step(), phases("decoder"):
            torch.ones(2, 2).mm(torch.ones(2, 2))
        with phases.named("checkpoint"):
            pass
    files = sorted((folder / "profile").glob("*")) if (folder / "profile").is_dir() else []
    if not files:
        return None
    (file,) = files  # nothing unfinished beside it
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return file.name, [event["name"] for event in events]


def test_the_steps_that_were_asked_for(tmp_path):
    name, events = run(tmp_path, start=2, steps=2)
    assert name == "steps_2-3.rank_0.json.gz"
    counts = {name: events.count(name) for name in ("step 1", "step 2", "step 3", "step 4", "decoder", "aten::mm")}
    assert counts == {"step 1": 0, "step 2": 1, "step 3": 1, "step 4": 0, "decoder": 2, "aten::mm": 2}
    assert events.count("checkpoint") == 1  # between the two


def test_a_run_that_continues_within_them(tmp_path):
    name, events = run(tmp_path, numbers=range(3, 5), start=2, steps=2)
    assert name == "steps_3-3.rank_0.json.gz"
    assert "step 3" in events


def test_other_ranks_and_none(tmp_path):
    assert run(tmp_path, rank=1, start=2) is None
    assert run(tmp_path) is None


def test_a_trace_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    assert run(tmp_path, start=1, steps=1) is None
    assert "cannot be written" in caplog.text


def test_a_rank_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match="names rank 2, but the last of the 2 processes is rank 1"):
        Profile(ProfileSettings(start=1, ranks=[0, 2]), tmp_path, 0, 2, Phases())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"profile": {"steps": 3}}, "train.profile.steps is 3, but train.profile.start is null"),
        ({"profile": {"ranks": [1]}}, "train.profile.ranks is"),
        ({"profile": {"start": 0}}, "greater than or equal to 1"),
        ({"profile": {"start": 1, "steps": 101}}, "less than or equal to 100"),
        ({"profile": {"start": 1, "ranks": []}}, "at least 1 item"),
        ({"profile": {"start": 1, "ranks": [-1]}}, "greater than or equal to 0"),
        ({"steps": 5, "profile": {"start": 5}}, "traces of steps 5 to 6, but train.steps is 5"),
    ],
)
def test_values_that_are_told(section, message):
    from pydantic import ValidationError

    from megavlm.config.train_section import TrainSettings

    with pytest.raises((ValidationError, UserError), match=message.replace("(", r"\(")):
        TrainSettings(**section)
