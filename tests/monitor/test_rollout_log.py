"""rollouts.jsonl: the fields that readers rely on, what a resume keeps, and that nothing in it grows without limit."""

import itertools
import json
import math

import torch

from megavlm.monitor import rollout_log
from megavlm.monitor.rollout_log import LoggedAnswer, LoggedGroup, RolloutLog, read_rollouts


def answer(text="seven<|im_end|>", **changes):
    fields = {"reward": 1.0, "parts": {"exact": 1.0}, "advantage": 0.5, "tokens": 2, "finish": "stop"} | changes
    return LoggedAnswer(text, **fields)


def group(*answers, **changes):
    fields = {"sample": "train.jsonl:3", "question": "Which?", "media": ["7.png"], "reference": "7"} | changes
    return LoggedGroup(answers=list(answers), **fields)


def test_a_line_has_the_fields_that_readers_rely_on(tmp_path):
    given = answer(reward=torch.tensor(0.25, dtype=torch.float64), advantage=math.nan, parts={"a": math.inf, "b": None})
    failed = answer("", reward=None, finish="length", failures=["math: TimeoutError"])
    written = RolloutLog(tmp_path).write(7, [group(given, failed, reference=None)])
    (line,) = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 7,
        "groups": [
            {
                "sample": "train.jsonl:3",
                "question": "Which?",
                "media": ["7.png"],
                "reference": None,
                "answers": [
                    {"text": "seven<|im_end|>", "reward": 0.25, "parts": {"a": None, "b": None}, "advantage": None,
                     "tokens": 2, "finish": "stop", "failures": [], "turns": []},
                    {"text": "", "reward": None, "parts": {"exact": 1.0}, "advantage": 0.5,
                     "tokens": 2, "finish": "length", "failures": ["math: TimeoutError"], "turns": []},
                ],
                "media_left_out": 0,
                "answers_left_out": 0,
            }
        ],
    }  # fmt: skip
    (read,) = read_rollouts(tmp_path)
    assert (read.step, read.groups) == (7, written)


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    log = RolloutLog(tmp_path)
    for step in (2, 4, 6):
        log.write(step, [group(answer())])
    with log.path.open("a") as file:
        file.write('{"step": 5, "groups": [{"sample": 3}]}\n{"step": 8, "gro')
    assert [step.step for step in read_rollouts(tmp_path)] == [2, 4, 6]  # what has another form is ignored
    RolloutLog(tmp_path, resume_step=4).write(6, [group(answer("again"))])
    again = read_rollouts(tmp_path)
    assert [step.step for step in again] == [2, 4, 6]
    assert again[-1].groups[0].answers[0].text == "again"
    assert RolloutLog(tmp_path, 6, enabled=False).write(8, [group(answer())]) == []
    assert len(read_rollouts(tmp_path)) == 3


def test_long_and_many_things_are_cut_and_counted(tmp_path):
    text = "start" + "x" * 1_000_000 + "\\boxed{7}\ud800"  # half a surrogate pair, which no file can contain
    frames = {"frames": [f"{number}.png" for number in range(101)], "fps": 4}
    media = ["a.png", "b.png", frames, [f"{number}.png" for number in range(9)], "c.png", "d.png"]
    many = group(*[answer(text, failures=[text] * 100)] * 20, media=media, question=text, reference=text)
    (first, *_), count = RolloutLog(tmp_path).write(1, [many] * 9), rollout_log.MAX_GROUPS
    (read,) = read_rollouts(tmp_path)
    assert read.groups == [first] * count
    assert (len(first.answers), first.answers_left_out) == (16, 4)
    assert first.media == ["a.png", "b.png", {"frames": ["50.png"], "fps": 4}, ["4.png"]]
    assert first.media_left_out == 2
    for cut in (first.question, first.answers[0].text):
        assert len(cut) <= 2000
        assert cut.startswith("startx")
        assert cut.endswith("x\\boxed{7}?")
        assert "[… 998," in cut
    assert max(map(len, [first.reference, *first.answers[0].failures])) <= 500
    assert len(first.answers[0].failures) == 8
    assert (tmp_path / "rollouts.jsonl").stat().st_size < 500_000  # 4 × (2 × 2,000 + 16 × (2,000 + 8 × 500)) = 400,000


def test_the_file_keeps_steps_of_the_whole_run_and_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(rollout_log, "MAX_STEPS", 8)
    log = RolloutLog(tmp_path)
    for step in range(1, 101):
        if step == 50:
            log = RolloutLog(tmp_path, resume_step=49)
        log.write(step, [group(answer())])
        steps = [logged.step for logged in read_rollouts(tmp_path)]
        assert len(steps) <= 8
        assert (steps[0], steps[-1]) == (1, step)
    assert steps == sorted(steps)
    assert max(after - before for before, after in itertools.pairwise(steps)) <= 100 / 8 * 4  # 4 of 8 lines remain
