"""The model card tells what the run's files tell, up to the exported step, and no folder of this machine."""

import json
from pathlib import Path

import pytest
import yaml

from megavlm.config.load import resolved_yaml
from megavlm.config.settings import Settings
from megavlm.hub.card import Card
from megavlm.hub.facts import RunFacts, hub_name, license_of


def line(step, **more):
    """A line of a run, whose numbers can be added in the head; ``dogs`` are a second source."""
    return {
        "step": step, "loss": 4.0 - step, "lr": 1e-3, "grad_norm": 1.0, "tokens": 1000, "target_tokens": 100,
        "images": 3, "videos": 1, "samples/cats": 6, "target_tokens/cats": 70, "epoch/cats": 0.25 * step, **more,
    }  # fmt: skip


def run_of(folder: Path, lines: list[dict], **sections) -> Path:
    folder.mkdir(parents=True)
    values = {"hf": "/somewhere/secret/model", "load": "/somewhere/secret/model", **sections.pop("model", {})}
    settings = Settings(model=values, output=folder, **sections)
    (folder / "config.yaml").write_text(resolved_yaml(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


@pytest.fixture
def facts(tmp_path):
    lines = [line(1, **{"eval/loss": 2.5}), line(2, **{"samples/dogs": 5, "target_tokens/dogs": 9, "epoch/dogs": 2.0})]
    lines += [line(3, **{"eval/loss": 1.5}), line(4)]
    run = run_of(
        tmp_path / "runs" / "sft",
        lines,
        model={"freeze": ["vision"]},
        data={"train": [{"path": "/somewhere/secret/cats.jsonl"}], "seq_length": 4096},
        train={"steps": 10, "lr": 1e-3, "schedule_steps": 10},
        adapter={"type": "lora", "rank": 8},
        reward=[{"python": "/somewhere/secret/rewards.py:brief"}],
    )
    return RunFacts(run, 3)


def test_sums_are_those_of_the_lines_up_to_the_step(facts):
    assert [one["step"] for one in facts.run.lines] == [1, 2, 3]
    assert facts.is_exact
    cats, dogs = facts.sources
    assert (cats.name, cats.samples, cats.target_tokens, cats.passes) == ("cats", 18, 210, 0.75)
    assert (dogs.name, dogs.samples, dogs.target_tokens, dogs.passes) == ("dogs", 5, 9, 2.0)


def test_the_source_with_the_most_samples_comes_first(tmp_path):
    facts = RunFacts(run_of(tmp_path / "run", [line(1, **{"samples/ants": 5, "epoch/ants": 0.5})]), 1)
    assert [source.name for source in facts.sources] == ["cats", "ants"]
    facts = RunFacts(run_of(tmp_path / "other", [line(1, **{"samples/elks": 7, "epoch/elks": 0.5})]), 1)
    assert [source.name for source in facts.sources] == ["elks", "cats"]


def test_the_card_of_a_model(facts, tmp_path):
    card = Card("mine", "qwen3_vl", facts, base="Qwen/Qwen3-VL-8B-Instruct", license="apache-2.0", limits="data.x=1")
    card.write(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "Qwen/Qwen3-VL-8B-Instruct",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "image-text-to-text",
        "tags": ["megavlm", "qwen3_vl", "sft"],
    }
    for expected in (
        "after step 3 of supervised fine-tuning (`megavlm sft`)",
        "| cats | 18 | 210 | 0.750 |\n| dogs | 5 | 9 | 2.00 |",
        "In all: 3,000 tokens, 300 target tokens, 9 pictures, 3 videos.",
        "3 steps of supervised fine-tuning; the run was set up for 10. Parts that did not learn: vision.",
        "| `adapter.rank` | `8` |",
        "| `reward[0].python` | `rewards.py:brief` |",
        "| `data.seq_length` | `4096` |",
        "| loss | 3.000 | 1.000 |",  # three lines are too few to be averaged
        "| on held-out data | first | last |\n|---|---|---|\n| loss | 2.500 | 1.500 |",
        "![The loss over the steps of training](loss.png)",
        "these limits of pictures and videos: data.x=1.",
        "transformers 5.",
    ):
        assert expected in body
    for unknown in ("secret", "schedule_steps", "None", "nan"):
        assert unknown not in text


def test_a_line_for_each_second_step_counts_twice_and_says_about(tmp_path):
    facts = RunFacts(run_of(tmp_path / "run", [line(2), line(4, **{"epoch/dogs": 0.0})]), 4)
    text = Card("mine", "qwen3_vl", facts).text()
    assert "| cats | about 24 | about 280 | 1.00 |" in text
    assert "In all: about 4,000 tokens, about 400 target tokens" in text


def test_the_counts_of_an_only_source_are_those_of_the_steps(tmp_path):
    """As metrics.jsonl has them then: without samples/NAME."""
    lines = [{"step": n, "loss": 1.0, "tokens": 9, "target_tokens": 5, "images": 1, "videos": 0, "samples": 4,
              "epoch/cats": n / 2} for n in (1, 2)]  # fmt: skip
    text = Card("mine", "qwen3_vl", RunFacts(run_of(tmp_path / "run", lines), 2)).text()
    assert "| cats | 8 | 10 | 1.00 |" in text
    assert "In all: 18 tokens, 10 target tokens, 2 pictures, 0 videos." in text


def test_what_is_not_known_is_not_said(tmp_path):
    text = Card("mine", "qwen3_vl", None).text()
    assert "converted by megavlm from a checkpoint that is not part of a run" in text
    assert yaml.safe_load(text.split("---\n")[1]).keys() == {"library_name", "pipeline_tag", "tags"}
    assert "## Result" not in text
    nothing = Card("mine", "qwen3_vl", RunFacts(run_of(tmp_path / "run", []), 3)).text()
    assert "## Result" not in nothing


@pytest.mark.parametrize(
    ("verb", "fields", "settings"),
    [
        ("pretrain", {}, {"stage": 2}),
        ("sft", {}, {}),
        ("dpo", {"pairs": 4, "accuracy": 0.75, "margin": 0.5, "rewards/chosen": 1.0}, {}),
        ("rm", {"pairs": 4, "accuracy": 0.75, "margin": 0.5, "scores/mean": 0.0}, {}),
        ("kto", {"z0": 0.1, "accuracy": 0.75, "margin": 0.5}, {}),
        ("grpo", {"reward": 0.5, "reward_std": 0.1}, {}),
        ("ppo", {"reward": 0.5, "reward_std": 0.1, "value_loss": 0.2}, {}),
    ],
)
def test_the_verb_is_told_by_the_fields(verb, fields, settings, tmp_path):
    facts = RunFacts(run_of(tmp_path / "run", [line(1, **fields), line(2, **fields)], **settings), 2)
    assert facts.verb == verb
    text = Card("mine", "qwen3_vl", facts, has_head=verb == "rm").text()
    assert f"`megavlm {verb}`" in text
    assert ("stage 2" in text) == (verb == "pretrain")
    assert ("| 75.0 % | 75.0 % |" in text) == ("accuracy" in fields)
    assert ("pipeline_tag" in text) == (verb != "rm")


def test_runs_before_it_are_named(tmp_path):
    first = run_of(tmp_path / "stage0", [line(1)], stage=0)
    second = run_of(tmp_path / "sft", [line(1)], model={"load": first})
    third = run_of(tmp_path / "dpo", [line(1, pairs=4)], model={"load": second / "checkpoints" / "step_00000001"})
    assert RunFacts(third, 1).before == ["pretrain", "sft"]
    assert "Before it came `pretrain` → `sft`." in Card("mine", "qwen3_vl", RunFacts(third, 1)).text()


def test_a_run_before_it_that_cannot_be_read_is_left_out(tmp_path):
    first = run_of(tmp_path / "stage0", [line(1)], stage=0)
    second = run_of(tmp_path / "sft", [line(1)], model={"load": first})
    facts = RunFacts(second, 1)
    (first / "config.yaml").write_text("model: {load: 5}")
    assert facts.before == []
    assert "model.load is 5 instead of a path" in facts.left_out[0]
    assert "What came before is not known in full" in Card("mine", "qwen3_vl", facts).text()


def test_the_base_and_its_licence(tmp_path):
    folder = tmp_path / "models--Qwen--Qwen3-VL-8B-Instruct" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    assert hub_name(folder) == "Qwen/Qwen3-VL-8B-Instruct"
    assert hub_name(tmp_path / "models" / "8b") is None
    assert license_of(folder) is None
    (folder / "README.md").write_text("---\nlicense: apache-2.0\npipeline_tag: x\n---\nlicense: other\n")
    assert license_of(folder) == "apache-2.0"
    (folder / "README.md").write_text("license: other\n")
    assert license_of(folder) is None
