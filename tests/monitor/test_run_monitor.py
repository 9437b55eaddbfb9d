"""What a run tells about its samples."""

from types import SimpleNamespace

from megavlm.monitor.run_monitor import RunMonitor
from megavlm.records.remarks import LITERAL_MARK, REPEATED_PROMPT, WORDS


def test_remarks_are_told_once_and_counted_in_each_step_that_has_any():
    said = []
    monitor = object.__new__(RunMonitor)  # without its files
    monitor._errors = SimpleNamespace(take=lambda step, counts, skipped: {"bad_samples": 0})
    monitor._remarked, monitor.say, monitor._first_step = set(), said.append, 9
    none = dict.fromkeys(WORDS, 0.0)
    steps = [none, none | {REPEATED_PROMPT: 3.0}, none | {REPEATED_PROMPT: 2.0, LITERAL_MARK: 1.0}]
    lines = [monitor.count_samples(step, counts, []) for step, counts in enumerate(steps, start=1)]
    assert lines == [
        {"bad_samples": 0},
        {"bad_samples": 0, "repeated_prompts": 3},
        {"bad_samples": 0, "repeated_prompts": 2, "literal_marks": 1},
    ]
    assert len(said) == 2
    assert "the prompt, which was removed from them: 3 (in step 2;" in said[0]
    assert "<image> or <video>" in said[1]
