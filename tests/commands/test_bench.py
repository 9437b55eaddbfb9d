"""`megavlm bench` as a user runs it: one line of JSON about real steps, and their memory beside what is planned."""

import json
from pathlib import Path

import pytest
import yaml
from parity import Toys
from test_train_verbs import megavlm, sft_config
from toy import write_records

from megavlm.monitor.phases import PHASES


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def line_of(*arguments: object) -> dict:
    """What the command prints, which is one line."""
    (line,) = megavlm("bench", *arguments).stdout.splitlines()
    return json.loads(line)


def test_steps_on_data(toys, tmp_path):
    config = sft_config(toys, tmp_path, steps=1, global_batch_size=4)
    found = line_of(config, "--steps", 2, "--warmup", 1, "data.max_pixels=9216")
    assert not (tmp_path / "run").exists()
    assert (found["steps"], found["step"]["samples"]) == (2, 4)
    assert found["step"]["row_tokens"] == 4 * 128
    assert 0 < found["step"]["tokens"] < 4 * 128
    seconds = found["seconds"]
    assert seconds["worst"] >= seconds["mean"] > 0
    assert set(found["phases"]) == set(PHASES)
    assert sum(found["phases"].values()) == pytest.approx(seconds["mean"], rel=0.1, abs=0.05)
    assert found["tokens_per_second_per_device"] == pytest.approx(found["step"]["tokens"] / seconds["mean"])
    assert (found["machine"]["device"], found["mfu"], found["memory"]["allocated"]) == ("CPU", None, None)
    # As in tests/distributed/test_step_memory.py: the same rows run without memory, and indices are copied there.
    assert found["memory"]["planned"] == pytest.approx(found["memory"]["one_step"], rel=0.005)


def test_synthetic_rows_in_a_pipeline(toys, tmp_path):
    config = sft_config(toys, tmp_path, steps=1)
    words = ["--synthetic", "--pictures", 1, "--steps", 1, "--warmup", 0, "--nproc", 2, "parallel.pipeline=2"]
    absent = [
        "model.load=nowhere",
        "data.train=nowhere.jsonl",
        "data.max_pixels=9216",
        "train.batch_ramp={1: 4}",
        "train.steps=2",
    ]
    found = line_of(config, *words, *absent)
    assert found["layout"]["pipeline"] == found["machine"]["processes"] == 2
    assert found["step"]["images"] == found["step"]["samples"] == 8  # behind the ramp
    assert found["rows"].startswith("each row has 1 sample of 128 tokens, with 1 picture of 6 × 6 patches")
    assert found["memory"]["planned"] == pytest.approx(found["memory"]["one_step"], rel=0.005)


def test_operators_for_the_planner(toys, tmp_path):
    config = sft_config(toys, tmp_path, steps=2, global_batch_size=4)
    file, words = tmp_path / "cpu.yaml", ["data.max_pixels=9216", "train.precision=fp32"]
    line_of(config, "--synthetic", "--steps", 1, "--warmup", 0, "--operators", file, *words)
    facts = yaml.safe_load(file.read_text())
    kinds = {point[0] for point in facts["operators"]["points"]}
    assert kinds == {"product", "attention", "elementwise"}
    assert facts["name"] == "CPU"
    assert 0 < facts["bf16_tflops"] < 100
    plan = json.loads(megavlm("plan", config, "--gpus", 1, "--gpu", file, "--json", *words).stdout)
    assert plan["gpu"]["name"] == "CPU"
    # The plan's seconds are those of the file and nothing else: twice as long operators make a step twice as long.
    slower, twice = tmp_path / "slower.yaml", {**facts["operators"], "overhead": 2 * facts["operators"]["overhead"]}
    twice["points"] = [[*point[:-1], 2 * point[-1]] for point in twice["points"]]
    slower.write_text(yaml.safe_dump({**facts, "operators": twice}))
    slow = json.loads(megavlm("plan", config, "--gpus", 1, "--gpu", slower, "--json", *words).stdout)
    assert slow["time"]["seconds"] == pytest.approx(2 * plan["time"]["seconds"]) != 0
    # A millisecond more for each of the thousands of calls.
    assert 0 <= facts["operators"]["overhead"] < 0.1
    twice["overhead"] += 1e-3
    slower.write_text(yaml.safe_dump({**facts, "operators": twice}))
    slowest = json.loads(megavlm("plan", config, "--gpus", 1, "--gpu", slower, "--json", *words).stdout)
    assert slowest["time"]["seconds"] > slow["time"]["seconds"] + 1
    assert "exists already" in megavlm("bench", config, "--operators", file, status=2).stderr


def test_pairs_and_sampled_answers(toys, tmp_path):
    """No reference file is made for dpo, and grpo samples with the built-in engine."""
    config, steps = sft_config(toys, tmp_path, steps=1, global_batch_size=1), ("--steps", 1, "--warmup", 0)
    pair = {"messages": [{"role": "user", "content": "How many?"}], "chosen": "Two.", "rejected": "None at all."}
    data = f"data.train={write_records(tmp_path / 'pairs.jsonl', [pair] * 4)}"
    found = line_of(config, data, *steps, "--for", "dpo")
    assert (found["verb"], found["step"]["samples"]) == ("dpo", 2)  # both answers
    assert found["memory"]["planned"] == pytest.approx(found["memory"]["one_step"], rel=0.005)
    data = f"data.train={write_records(tmp_path / 'prompts.jsonl', [{'prompt': 'How many?', 'answer': 'Two.'}] * 4)}"
    few = ["rollout.prompts=2", "rollout.group_size=2", "rollout.max_new_tokens=4", "reward=[{name: exact}]"]
    few.append("data.packing=best_fit")
    found = line_of(config, data, *steps, *few, "train.global_batch_size=null", "align.beta=0.1")
    assert found["verb"] == "grpo"
    assert found["phases"]["sampling"] > 0
    assert found["memory"]["one_step"] is None
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_measured(toys, tmp_path):
    config = sft_config(toys, tmp_path, steps=1)
    for words, told in {
        ("model.load=nowhere",): "model.load is nowhere, which does not exist",
        ("--steps", "0"): "argument --steps: '0' is not a whole number of at least 1",
        ("--for", "grpo", "--synthetic", "data.train=[]"): "grpo samples its rows, for which it needs prompts",
    }.items():
        assert told in " ".join(megavlm("bench", config, *words, status=2).stderr.split())
    assert not Path(tmp_path / "run").exists()
