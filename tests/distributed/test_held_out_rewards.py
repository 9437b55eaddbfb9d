"""Held-out questions of reinforcement learning with a reward model or an environment: judged as while it learns.

In the first step of a run, answers without chance (``top_k: 1``) to the same questions are those of the evaluation
before it, from the same weights, and so are their rewards; that these are right, tests of training show.
"""

import json
from math import fsum
from pathlib import Path

import pytest
from parity import mostly_slow, settings_of
from test_evaluation import lines_of, train, without
from test_preference import pairs_of
from test_turns import DOORS, STOP
from toy import write_records

QUESTIONS, TOKENS = 8, 5
LAYOUTS = {
    "one process": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2": (2, {"pipeline": 2}),
}
ENVIRONMENT = {"python": f"{DOORS}:Doors", "max_turns": 3, "max_tokens": 90, "workers": 1, "weight": 2.0}


@pytest.fixture(scope="module")
def taste(toys, world1, tmp_path_factory) -> Path:
    """The folder of a run that has trained a reward model."""
    made = settings_of(toys.folder("dense"), {}, steps=1, memory_check=False, optimizer="adam", lr=1e-3)
    made["model"]["load"] = str(toys.checkpoint("dense"))
    made["data"] = {"train": str(write_records(toys.root / "taste.jsonl", pairs_of(toys.records))), "seq_length": 512}
    made["data"]["workers"] = 0
    made |= {"output": str(tmp_path_factory.mktemp("taste") / "rm"), "log": {"wandb": {"mode": "off"}}}
    assert world1.run(train, made, "rm") == [""]
    return Path(made["output"])


@pytest.fixture
def settings(toys, tmp_path, taste):
    """settings(judged, parallel, name, …): a run of one step on the toy's questions, which are held out, too."""

    def settings(judged: str, parallel: dict, name: str, method: str = "grpo", **answers) -> dict:
        made = settings_of(toys.folder("dense"), parallel, steps=1, memory_check=False, optimizer="adam", lr=1e-3)
        del made["train"]["global_batch_size"]
        made["model"]["load"] = str(toys.checkpoint("dense"))
        file = str(write_records(toys.root / "asked.jsonl", toys.records))
        made["data"] |= {"train": file, "eval": file, "workers": 0, "seq_length": 512}
        made["rollout"] = {"prompts": QUESTIONS, "group_size": 2, "max_new_tokens": TOKENS, "top_k": 1, "log_every": 1}
        if method == "ppo":
            made["align"] = {"critic": {"load": str(taste)}}
            del made["rollout"]["group_size"]
        if judged == "environment":
            made |= {"environment": ENVIRONMENT}
            made["rollout"]["stop"] = STOP
        else:
            length = {"name": "length", "limit": 5}
            made |= {"reward": [{"model": str(taste), "label": "taste", "weight": 2.0}, length]}
        made |= {"eval": {"every": 1, "answers": answers}}
        return made | {"output": str(tmp_path / name), "log": {"wandb": {"mode": "off"}}}

    return settings


def groups_of(file: Path, step: int) -> dict[str, dict]:
    """The groups of a step in rollouts.jsonl or held_out_answers.jsonl by the names of their samples."""
    (groups,) = (line["groups"] for line in map(json.loads, file.read_text().splitlines()) if line["step"] == step)
    return {group["sample"]: group for group in groups}


CASES = [(judged, layout) for judged in ("reward model", "environment") for layout in LAYOUTS]


@pytest.mark.parametrize(("judged", "layout"), mostly_slow(CASES, lambda case: case[1] == "DP2"))
def test_held_out_answers_are_judged_as_while_it_learns(judged, layout, settings, tmp_path, request):
    size, parallel = LAYOUTS[layout]
    world = request.getfixturevalue(f"world{size}")
    assert world.run(train, settings(judged, parallel, "with"), "grpo") == [""] * size
    held = groups_of(tmp_path / "with/held_out_answers.jsonl", 0)
    learned = groups_of(tmp_path / "with/rollouts.jsonl", 1)
    assert len(held) == QUESTIONS
    assert len(learned) > 1
    for sample, group in learned.items():
        (answer,) = held[sample]["answers"]
        expected = group["answers"][0]
        assert (answer["text"], answer["turns"]) == (expected["text"], expected["turns"])
        assert answer["parts"] == pytest.approx(expected["parts"], abs=1e-5)  # batches of others: some roundings
        assert answer["reward"] == pytest.approx(expected["reward"], abs=1e-5)
    answers = [group["answers"][0] for group in held.values()]
    names = {"environment": {"environment"}, "reward model": {"taste", "length"}}[judged]
    assert all(answer["parts"].keys() == names for answer in answers)
    assert len({answer["reward"] for answer in answers}) > 2
    start = lines_of(tmp_path / "with/metrics.jsonl")[0]
    assert start["eval/answers/score"] == pytest.approx(fsum(a["reward"] for a in answers) / QUESTIONS, rel=1e-9)
    if judged == "environment":
        assert max(len(answer["turns"]) for answer in answers) > 2
    else:
        tastes = fsum(answer["parts"]["taste"] for answer in answers) / QUESTIONS
        assert start["eval/answers/score/taste"] == pytest.approx(tastes, rel=1e-9)

    made = settings(judged, parallel, "without")
    del made["eval"]
    assert world.run(train, made, "grpo") == [""] * size
    lines = [lines_of(tmp_path / name / "metrics.jsonl") for name in ("with", "without")]
    assert without(lines[0][1:], "eval/") == without(lines[1])
    assert (tmp_path / "with/rollouts.jsonl").read_text() == (tmp_path / "without/rollouts.jsonl").read_text()


@pytest.mark.parametrize("judged", ["reward model", "environment"])
def test_a_rank_without_a_question(judged, settings, world2, tmp_path):
    """One question for two data ranks, which call the reward model and the engine together."""
    assert world2.run(train, settings(judged, {}, "run", samples=1), "grpo") == ["", ""]
    (group,) = groups_of(tmp_path / "run/held_out_answers.jsonl", 1).values()
    line = lines_of(tmp_path / "run/metrics.jsonl")[1]
    assert isinstance(line["eval/answers/score"], float)
    assert line["eval/answers/score"] == group["answers"][0]["reward"]


@pytest.mark.slow
def test_ppo_judges_with_its_reward_model(settings, world1, tmp_path):
    assert world1.run(train, settings("reward model", {}, "run", "ppo"), "ppo") == [""]
    held = groups_of(tmp_path / "run/held_out_answers.jsonl", 0)
    for sample, group in groups_of(tmp_path / "run/rollouts.jsonl", 1).items():
        (answer,), expected = held[sample]["answers"], group["answers"][0]
        assert answer["text"] == expected["text"]
        assert answer["parts"] == pytest.approx(expected["parts"], abs=1e-5)


def test_other_scorers_than_the_rewards(settings, world1, tmp_path):
    """``eval.answers.scorer`` judges alone: neither the environment nor its reward is a part of the score."""
    made = settings("environment", {}, "run", scorer=[{"name": "length", "limit": 5}])
    assert world1.run(train, made, "grpo") == [""]
    answers = [group["answers"][0] for group in groups_of(tmp_path / "run/held_out_answers.jsonl", 0).values()]
    assert all(answer["parts"].keys() == {"length"} for answer in answers)
    assert all(answer["reward"] == answer["parts"]["length"] for answer in answers)
    assert max(len(answer["turns"]) for answer in answers) > 2
