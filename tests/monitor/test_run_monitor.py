"""What a run tells about its samples, and about reinforcement learning that goes wrong."""

from types import SimpleNamespace

from megavlm.monitor.rl_warnings import RlWarnings
from megavlm.monitor.rollout_log import LoggedGroup, RolloutLog, read_rollouts
from megavlm.monitor.run_monitor import RunMonitor
from megavlm.records.remarks import LITERAL_MARK, REPEATED_PROMPT, WORDS


def test_remarks_are_told_once_and_counted_in_each_step_that_has_any():
    said = []
    monitor = object.__new__(RunMonitor)  # without its files
    monitor._errors = SimpleNamespace(take=lambda step, counts, skipped: {"bad_samples": 0})
    monitor._remarked, monitor.say, monitor._first_step = set(), said.append, 9
    monitor._is_first, monitor._loader = True, None
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


def test_warnings_are_said_of_lines_that_are_written_and_answers_go_to_both_logs(tmp_path):
    said, written, sent = [], [], []
    monitor = object.__new__(RunMonitor)
    monitor._metrics, monitor._progress = (
        SimpleNamespace(write=written.append),
        SimpleNamespace(update=lambda line: None),
    )
    monitor._tensorboard = SimpleNamespace(log=lambda line: None)
    monitor._wandb = SimpleNamespace(log=lambda line: None, log_rollouts=lambda *logged: sent.append(logged))
    monitor._warnings, monitor._rollouts, monitor.say = RlWarnings(), RolloutLog(tmp_path), said.append
    for step in range(1, 7):  # only every second line is written, so a resumed run knows no others
        monitor.record({"step": step, "kl": 5.0}, logged=step % 2 == 0)
        assert len(said) == (step == 6)
    assert said[0].startswith("warning: since step 2, the policy runs away from the reference")
    assert [line["step"] for line in written] == [2, 4, 6]
    monitor.record_rollouts(6, [LoggedGroup("a.jsonl:1", "x" * 3000, [], None, [])])
    (logged,) = read_rollouts(tmp_path)
    assert sent == [(6, logged.groups)]
    assert len(logged.groups[0].question) < 3000
