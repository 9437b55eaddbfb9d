"""data_errors.jsonl: counts over a long run, and what a step costs after many faults."""

import json

import pytest

from megavlm.monitor import data_errors
from megavlm.monitor.data_errors import DataErrors
from megavlm.records.skipped_samples import BROKEN, TOO_LONG, SkippedSample


class Unlooked(set):
    """A set that may be asked for single members only."""

    def __iter__(self):
        raise AssertionError("all faults of the run were looked at")


@pytest.fixture
def errors(tmp_path, monkeypatch):
    """errors(resume_step): a new DataErrors of one rank."""
    monkeypatch.setattr(data_errors.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(DataErrors, "_gathered", lambda self, mine: mine)
    return lambda step=0: DataErrors(tmp_path, step, ["talks"], 1.0, groups=None, say=lambda text: None)


def take(errors, step: int, skipped: list[SkippedSample]) -> dict[str, int]:
    broken = sum(sample.kind == BROKEN for sample in skipped)
    return errors.take(step, {"skipped_samples": len(skipped), "records/talks": 8, "broken/talks": broken}, skipped)


def test_a_step_looks_at_its_own_faults_alone(errors):
    """However many the run has had: counted by what is touched, not by time."""
    recorded = errors()
    bad = [SkippedSample(0, f"a.jsonl:{n}", TOO_LONG if n % 4 == 0 else BROKEN, "cause") for n in range(400)]
    assert take(recorded, 1, bad) == {"bad_samples": 300, "dropped_samples": 100}
    for name, value in vars(recorded).items():
        if hasattr(value, "__len__") and len(value) == len(bad):
            setattr(recorded, name, Unlooked(value))
    assert take(recorded, 2, []) == {"bad_samples": 300, "dropped_samples": 100}
    assert take(recorded, 3, bad[:3]) == {"bad_samples": 300, "dropped_samples": 100}  # of an earlier epoch
    new = [SkippedSample(0, "a.jsonl:400", BROKEN, "cause")]
    assert take(recorded, 4, new) == {"bad_samples": 301, "dropped_samples": 100}


def test_a_run_that_continues_counts_from_its_file(errors, tmp_path):
    first = errors()
    take(first, 1, [SkippedSample(0, "a.jsonl:1", BROKEN, "cause"), SkippedSample(0, "a.jsonl:2", TOO_LONG, "cause")])
    take(first, 2, [SkippedSample(0, "a.jsonl:3", BROKEN, "cause")])
    with (tmp_path / data_errors.FILE_NAME).open("a") as file:
        file.write(json.dumps({"step": 1}) + "\n" + json.dumps({"step": 1, "sample": ["x"], "kind": {}}) + "\n")
    again = errors(1)  # a line that this package did not write does not end the run
    assert take(again, 2, []) == {"bad_samples": 1, "dropped_samples": 1}
    assert take(again, 2, [SkippedSample(0, "a.jsonl:3", BROKEN, "cause")])["bad_samples"] == 2
