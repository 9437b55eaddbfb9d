"""data_errors.jsonl: counts over a long run, and what a step costs after many faults."""

import json
from types import SimpleNamespace

import pytest

from megavlm.monitor import data_errors, sample_counts
from megavlm.monitor.data_errors import DataErrors
from megavlm.monitor.sample_counts import SampleCounts
from megavlm.records.skipped_samples import BROKEN, TOO_LONG, TOO_LONG_YET, SkippedSample, excess, shares


class Unlooked(set):
    """A set that may be asked for single members only."""

    def __iter__(self):
        raise AssertionError("all faults of the run were looked at")


@pytest.fixture
def errors(tmp_path, monkeypatch):
    """errors(resume_step): a new DataErrors of one rank, of a source of a million samples."""
    groups = SimpleNamespace(world_host=None)
    monkeypatch.setattr(data_errors.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(DataErrors, "_gathered", lambda self, mine: mine)
    monkeypatch.setattr(data_errors, "broadcast_object", lambda value, group: value)
    monkeypatch.setattr(sample_counts, "all_gather_objects", lambda value, group: [value])
    loader = SimpleNamespace(sources=[SimpleNamespace(file=range(10**6))], drawn=[(0, 0)], ends=None, epoch=10**6)

    def made(step=0):
        limits = {"data.max_bad_fraction": 1.0, "data.max_dropped_fraction": 1.0}
        samples = SampleCounts(["talks"], loader, groups)
        return DataErrors(tmp_path, step, limits, samples, loader, groups, say=lambda text: None)

    return made


def take(errors, step: int, skipped: list[SkippedSample]) -> dict[str, int]:
    counts = {"skipped_samples": len(skipped), "used/talks": 8 + len(skipped), "newly_read/talks": 8 + len(skipped)}
    fields = errors.take(step, counts, skipped)
    del fields["epoch/talks"]
    return fields


def skipped(number: int, kind: str) -> SkippedSample:
    return SkippedSample(0, f"a.jsonl:{number}", kind, "cause", number)


def test_a_step_looks_at_its_own_faults_alone(errors):
    """However many the run has had: counted by what is touched, not by time."""
    recorded = errors()
    bad = [skipped(n, TOO_LONG if n % 4 == 0 else BROKEN) for n in range(400)]
    assert take(recorded, 1, bad) == {"bad_samples": 300, "dropped_samples": 100}
    for name, value in vars(recorded).items():
        if hasattr(value, "__len__") and len(value) == len(bad):
            setattr(recorded, name, Unlooked(value))
    assert take(recorded, 2, []) == {"bad_samples": 300, "dropped_samples": 100}
    assert take(recorded, 3, bad[:3]) == {"bad_samples": 300, "dropped_samples": 100}  # of an earlier epoch
    new = [skipped(400, BROKEN)]
    assert take(recorded, 4, new) == {"bad_samples": 301, "dropped_samples": 100}


def test_what_only_a_ramp_drops_is_told_and_never_too_much():
    kinds, limits = {TOO_LONG_YET: 9, TOO_LONG: 1}, {"data.max_bad_fraction": 0.0, "data.max_dropped_fraction": 0.1}
    assert excess(kinds, 10, limits) is None
    assert shares(kinds, 10) == (
        "1 is too long for a row (10.0 %), 9 are too long for the rows of data.length_ramp (90.0 %)"
    )


def test_a_run_that_continues_counts_from_its_file(errors, tmp_path):
    first = errors()
    take(first, 1, [skipped(1, BROKEN), skipped(2, TOO_LONG)])
    take(first, 2, [skipped(3, BROKEN)])
    with (tmp_path / data_errors.FILE_NAME).open("a") as file:
        file.write(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 1, "sample": ["x"], "kind": {}}) + "\n")
    again = errors(1)  # a line that this package did not write does not end the run
    assert take(again, 2, []) == {"bad_samples": 1, "dropped_samples": 1}
    assert take(again, 2, [skipped(3, BROKEN)])["bad_samples"] == 2


def test_a_source_of_a_million_broken_samples_takes_little_memory(errors):
    recorded = errors()
    for place in (0, 7, 10**6 - 1):
        take(recorded, 1, [skipped(place, BROKEN)] * 2)
    assert recorded.take(2, {"skipped_samples": 0, "used/talks": 0, "newly_read/talks": 0}, [])["bad_samples"] == 3
    assert sum(map(len, recorded._listed.values())) == 10**6 / 8
