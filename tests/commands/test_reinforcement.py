"""`megavlm grpo`, `validate` and `data inspect` of its configurations: prompts and rewards are checked beforehand."""

import json

import pytest
from toy import write_records

from megavlm.cli.main import main

ASKED = {"prompt": "How many?", "answer": "Two."}
LONG = {"prompt": "word " * 100, "answer": "Two."}  # fits in a row, but leaves no room for an answer
REWARDS = {
    "missing.py": (None, "the file of the reward good is"),
    "broken.py": ("def good(completions):\n    return 1 +\n", "broken.py:2 cannot be used: SyntaxError"),
    "other.py": ("def bad(completions):\n    return []\n", "has no function good → its functions: bad"),
}


@pytest.fixture
def command(tmp_path, model_folder, capsys):
    """command(verb, records, reward, *arguments): status, and what was printed on both streams, with single spaces."""

    def command(verb, records, reward, *arguments):
        write_records(tmp_path / "data.jsonl", records)
        config = {
            "model": {"hf": str(model_folder), "load": str(model_folder)},
            "data": {"train": [{"path": str(tmp_path / "data.jsonl")}], "seq_length": 256},
            "train": {"steps": 500, "lr": 1e-6},
            "rollout": {"prompts": 6, "group_size": 4, "max_new_tokens": 200},
            "reward": [reward],
            "output": str(tmp_path / "run"),
        }
        (tmp_path / "grpo.yaml").write_text(json.dumps(config))
        out = ["--out", str(tmp_path / "out")] if verb == "data inspect" else []
        capsys.readouterr()
        status = main([*verb.split(), str(tmp_path / "grpo.yaml"), *arguments, *out])
        printed = capsys.readouterr()
        return status, " ".join(printed.out.split()), " ".join(printed.err.split())

    return command


@pytest.mark.parametrize("verb", ["validate", "data inspect"])
def test_prompts_must_leave_room_for_an_answer(command, verb, tmp_path):
    status, out, error = command(verb, [ASKED] * 9 + [LONG], {"name": "exact"}, "data.max_dropped_fraction=0.2")
    assert status == 0, error
    assert "data for grpo, guessed from rollout.prompts" in out
    if verb == "validate":
        assert "6 prompts × 4 answers = 24 answers of at most 200 tokens, at most 24 per data-parallel rank" in out
        assert "500 steps = 3,000 prompts" in out
        assert "8 prompts of" in out
        assert "targets" not in out
    else:
        assert "skipped: 1 of the 10 inspected samples 1 too long" in out
        assert "data.seq_length - rollout.max_new_tokens = 256 - 200 = 56" in out
        assert "rows of" not in out  # answers are packed, not prompts
        page = (tmp_path / "out" / "index.html").read_text()
        assert "prompts, to which answers are sampled" in page
        assert "tokens of a row" not in page
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["rows"] is None
    assert command("validate", [LONG] * 9, {"name": "exact"})[0] == 2


def test_ppo_samples_one_answer_to_each_prompt_unless_told(command):
    ours = ("rollout.group_size=null", "align.critic.lr=1e-5")
    status, out, error = command("validate", [ASKED], {"name": "exact"}, *ours)
    assert status == 0, error
    assert "data for ppo, guessed from align.critic" in out
    assert "6 prompts × 1 answer = 6 answers" in out
    status, _, error = command("validate", [ASKED], {"name": "exact"}, *ours, "align.critic.load=gone", "--for", "ppo")
    assert status == 2
    assert "align.critic.load is gone, which does not exist" in error


@pytest.mark.parametrize("verb", ["validate", "grpo"])
@pytest.mark.parametrize("file", REWARDS)
def test_a_reward_that_cannot_be_loaded_is_refused_before_anything_starts(command, verb, file, tmp_path):
    text, told = REWARDS[file]
    if text is not None:
        (tmp_path / file).write_text(text)
    status, _, error = command(verb, [ASKED], {"python": f"{tmp_path / file}:good"})
    assert status == 2
    assert told in error
    assert not (tmp_path / "run").exists()
    assert command("validate", [ASKED], {"python": f"{tmp_path / file}:good"}, "--no-files")[0] == 0


def test_fields_that_rewards_need_are_looked_for_in_the_records(command, tmp_path):
    (tmp_path / "own.py").write_text("def own(completions, level, *, unit, spare=1, **columns):\n    return [1.0]\n")
    own = {"python": f"{tmp_path / 'own.py'}:own"}
    records = [ASKED | {"level": 1, "unit": "m"}] * 10 + [{"prompt": "How many?", "level": 2, "answer": {"a": 1}}] * 5
    status, out, error = command("validate", records, {"name": "exact"})
    assert status == 0, error
    assert "data: the reward exact needs the field answer, which 5 of 15 inspected records lack" in out
    status, out, error = command("validate", records, own)
    assert status == 0, error
    assert "the reward own needs the field unit, which 5 of 15 inspected records lack" in out
    assert "field level" not in out
    assert "field spare" not in out
    status, _, error = command("validate", records, {"name": "choice", "field": "letter"})
    assert status == 2
    assert "the reward choice needs the field letter, which none of 15 inspected records has" in error
    talk = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
    status, out, error = command("validate", [{"messages": talk}] * 6, {"name": "exact"})  # the last message answers
    assert status == 0, error
    assert "needs the field" not in out


def test_a_step_with_more_prompts_than_the_data_have_is_told(command):
    _, out, _ = command("validate", [ASKED] * 5, {"name": "exact"})
    assert "a step asks 6 prompts (rollout.prompts), but the data have 5" in out
    assert "a step asks" not in command("validate", [ASKED] * 6, {"name": "exact"})[1]
