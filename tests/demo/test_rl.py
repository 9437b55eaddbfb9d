"""The demo of reinforcement learning without its training: what it runs, and when it says that a bound is missed."""

import pytest

from megavlm.demo import rl
from megavlm.demo.answers import expected_answers
from megavlm.demo.data import read_records, write_records

pytestmark = pytest.mark.usefixtures("own_environment")


def verbs(commands):
    return [command[3] if command[2] == "megavlm" else command[2] for command in commands]


def test_commands(pretrained, started):
    run = rl.Reinforcement(pretrained)
    run.demo.begin(run.out, overwrite=False)
    run.start()
    run.learn()
    assert verbs(started.commands) == ["sft", "infer", "grpo", "infer", "megavlm.report.run_report"]
    started.commands.clear()
    count = -(-len(read_records(run.demo.out / "data" / "questions.jsonl")) // rl.SAMPLE_EVERY)
    (run.out / "sampled").mkdir(parents=True)
    write_records(run.out / "sampled" / "answers.jsonl", ({"index": i, "answer": "?"} for i in range(count)))
    run.reward_model()
    assert len(read_records(run.out / "pairs.jsonl")) > count  # drawn ones, and those of the model
    run.learn_with_critic()
    assert verbs(started.commands) == ["infer", "rm", "ppo", "infer"]
    started.commands.clear()
    for name in rl.OTHERS:
        run.learn_otherwise(name)
    assert verbs(started.commands) == ["grpo"] * len(rl.OTHERS)
    assert all(str(run.out / name) in command[-3] for name, command in zip(rl.OTHERS, started.commands, strict=True))


def test_other_methods_are_run_only_when_that_is_wished(pretrained, monkeypatch):
    learned = []
    for name in ("start", "learn", "reward_model", "learn_with_critic"):
        monkeypatch.setattr(rl.Reinforcement, name, lambda self: None)
    monkeypatch.setattr(rl.Reinforcement, "learn_otherwise", lambda self, name: learned.append(name))
    monkeypatch.setattr(rl.Reinforcement, "check", lambda self, others: len(others) == len(learned))
    assert rl.main(["--out", str(pretrained)]) == 0
    assert not learned
    assert rl.main(["--out", str(pretrained), "--all"]) == 2  # its folder exists
    assert rl.main(["--out", str(pretrained), "--all", "--overwrite"]) == 0
    assert learned == list(rl.OTHERS)


@pytest.mark.parametrize(
    ("changed", "missed"),
    [({}, None), ({"after": 0.64}, "GRPO"), ({"after_ppo": 0.64}, "PPO"), ({"gspo": 0.29}, "gspo")],
)
def test_each_bound_is_held(pretrained, capsys, changed, missed):
    run = rl.Reinforcement(pretrained)
    expected = expected_answers(run.demo.questions)
    shares = {"before": 0.5, "after": 0.65, "after_ppo": 0.65, **dict.fromkeys(rl.OTHERS, 0.3)} | changed
    for name in ("before", "after", "after_ppo"):
        (run.out / name).mkdir(parents=True)
        given = [right if i < shares[name] * len(expected) else "?" for i, right in enumerate(expected)]
        write_records(run.out / name / "answers.jsonl", ({"index": i, "answer": a} for i, a in enumerate(given)))
    for name in rl.OTHERS:
        (run.out / name).mkdir()
        rewards = [0.1, 0.3, 0.9, shares[name] - 0.1, shares[name] + 0.1]  # 0.2 at the beginning
        write_records(run.out / name / "metrics.jsonl", ({"step": i, "reward": r} for i, r in enumerate(rewards, 1)))
    assert run.check(tuple(rl.OTHERS)) is (missed is None)
    lines = [line for line in capsys.readouterr().out.splitlines() if "MISSED" in line]
    assert len(lines) == (missed is not None)
    assert not lines or missed in lines[0]


def test_the_start_and_the_questions_are_those_of_the_configurations():
    """Each other loss or advantage that grpo has is in the demo."""
    from megavlm.align.loss_tables import advantages_of, losses_of

    assert set(rl.OTHERS) == (set(losses_of("grpo")) | set(advantages_of("grpo"))) - {"grpo"}
