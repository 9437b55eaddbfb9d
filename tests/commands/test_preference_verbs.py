"""`megavlm dpo` and `kto` as a user runs them."""

import json
import math
import re
import shutil

import pytest
from parity import VARYING, Toys
from test_train_verbs import megavlm, metrics_of, sft_config
from toy import write_records

from megavlm.align.registry import make_method
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.convert import hf_to_mcore

REJECTED = ["A dog.", "Nothing at all.", "No.", "Five, I think.", "Tea.", "Green.", "A letter.", "Yes, the same."]


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="module")
def pairs(toys) -> list[dict]:
    """Each toy record's prompt with two answers."""
    return [
        {**record, "messages": record["messages"][:-1], "chosen": record["messages"][-1]["content"], "rejected": other}
        for record, other in zip(toys.records, REJECTED, strict=True)
    ]


@pytest.fixture
def config(toys, tmp_path):
    """Adam on rows of 512 tokens, packed."""
    path = sft_config(toys, tmp_path, steps=6, lr=3e-4, optimizer="adam", global_batch_size=2)
    settings = json.loads(path.read_text())
    settings["data"] |= {"seq_length": 512, "packing": "best_fit", "workers": 2, "shuffle": True}
    path.write_text(json.dumps(settings))
    return path


def steady(lines):
    return [{name: value for name, value in line.items() if name not in VARYING} for line in lines]


def test_dpo_starts_at_its_reference_and_prefers_what_is_chosen(toys, pairs, config, tmp_path):
    """The reference file is made once: for a run that continues, in another layout too, and for another run."""
    data = f"data.train={write_records(toys.root / 'pairs.jsonl', pairs)}"
    done = megavlm("dpo", config, data, "checkpoint.every=3", "train.memory_check=true")
    assert "memory check: " in done.stdout
    assert re.search(r"^step 6/6  loss [\d.]+ +accuracy [\d.]+ % +margin [\d.]+ ", done.stdout, re.M)
    run = tmp_path / "run"
    assert "pairs whose chosen answer has the higher reward" in (run / "report.html").read_text()
    lines = metrics_of(run)
    assert lines[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert lines[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["loss"] < 0.9 * math.log(2)
    assert lines[-1]["margin"] > 0
    assert lines[-1]["accuracy"] > 0.8
    assert all(line["samples"] == 2 * line["pairs"] and line["frames_encoded"] == line["frames"] for line in lines)

    shutil.rmtree(run / "checkpoints" / "step_00000006")
    made = (run / "reference.safetensors").stat().st_mtime_ns
    megavlm("dpo", config, data, "checkpoint.every=3", "parallel.pipeline=2", "--nproc", 2)
    assert (run / "reference.safetensors").stat().st_mtime_ns == made
    for line, before in zip(metrics_of(run), lines, strict=True):
        for name in ("loss", "margin", "grad_norm"):
            assert line[name] == pytest.approx(before[name], rel=1e-4, abs=1e-6)

    reused = (f"output={tmp_path / 'reused'}", f"align.reference={run / 'reference.safetensors'}")
    megavlm("dpo", config, data, "checkpoint.every=3", *reused)
    assert not (tmp_path / "reused" / "reference.safetensors").exists()
    assert steady(metrics_of(tmp_path / "reused")) == steady(lines)

    other = f"data.train={write_records(toys.root / 'other.jsonl', pairs[1:])}"
    done = megavlm("dpo", config, other, f"output={tmp_path / 'other'}", reused[1], status=2)
    assert "was written with other data" in done.stderr
    done = megavlm("dpo", config, data, f"output={tmp_path / 'long'}", reused[1], "data.seq_length=256", status=2)
    assert "other settings of data" in done.stderr


def test_kto_on_two_ranks_is_kto_on_one(toys, pairs, config, tmp_path):
    judged = [
        {"messages": p["messages"], "completion": p[side], "label": side == "chosen",
         **{name: p[name] for name in ("images", "videos") if name in p}}
        for p in pairs for side in ("chosen", "rejected")
    ]  # fmt: skip
    data = f"data.train={write_records(toys.root / 'judged.jsonl', judged)}"
    lines = {}
    for name, layout in (("one", ()), ("two", ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "--nproc", 2))):
        megavlm("kto", config, data, f"output={tmp_path / name}", "train.lr=1e-3", *layout)
        lines[name] = metrics_of(tmp_path / name)
    for one, two in zip(*lines.values(), strict=True):
        for name in ("loss", "grad_norm", "z0", "accuracy", *(["margin"] if one["margin"] is not None else [])):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5)
        assert one["desirable"] + one["undesirable"] >= 2
    first, last = lines["one"][0], lines["one"][-1]
    assert first["loss"] == pytest.approx(0.5, rel=1e-4)  # 1 − σ(0)
    assert last["loss"] < 0.49
    assert last["rewards/desirable"] > last["rewards/undesirable"]
    assert last["margin"] == pytest.approx(last["rewards/desirable"] - last["rewards/undesirable"])
    for line in lines["one"]:  # no margin without answers of both kinds
        assert (line["margin"] is None) == (line["desirable"] == 0 or line["undesirable"] == 0)


@pytest.mark.parametrize("verb", ["dpo", "kto"])
def test_a_reference_in_the_step_is_the_one_of_the_file(verb, toys, pairs, config, tmp_path):
    """Of DPO with adapters, in two tensor-parallel processes, stopped half-way; of KTO with all weights."""
    if verb == "dpo":
        data = f"data.train={write_records(toys.root / 'pairs.jsonl', pairs)}"
        changes = ("adapter.type=lora", "model.freeze=[vision, projector]", "parallel.tensor=2", "--nproc", 2)
    else:
        judged = [
            {"messages": pair["messages"], "completion": pair[side], "label": side == "chosen",
             **{name: pair[name] for name in ("images", "videos") if name in pair}}
            for pair in pairs for side in ("chosen", "rejected")
        ]  # fmt: skip
        data, changes = f"data.train={write_records(toys.root / 'judged.jsonl', judged)}", ()
    common = (data, "train.lr=1e-3", *changes)
    megavlm(verb, config, *common, f"output={tmp_path / 'file'}")
    for steps in (3, 6):
        step = ("align.reference_at=step", f"train.steps={steps}")
        megavlm(verb, config, *common, *step, f"output={tmp_path / 'step'}")
    assert not (tmp_path / "step" / "reference.safetensors").exists()
    in_file, in_step = metrics_of(tmp_path / "file"), metrics_of(tmp_path / "step")
    assert abs(in_file[-1]["loss"] - in_file[0]["loss"]) > 0.01
    for one, other in zip(in_file, in_step, strict=True):
        for name in ("loss", "grad_norm"):  # float32 log-probabilities of rows that are packed in another way
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6)
        assert other["frames_encoded"] == other["frames"]


def test_bad_input_is_said_plainly(toys, pairs, config):
    """Files without a sample that can be used end the run; what else may be wrong is in tests/data/test_units.py."""
    data = f"data.train={write_records(toys.root / 'bad.jsonl', [{**pairs[3], 'margin': 'large'}])}"
    done = megavlm("dpo", config, data, status=2)
    assert "margin must be a number" in done.stderr
    assert "Traceback" not in done.stderr
    record = {"prompt": "Two and two?", "completion": "Four."}
    data = f"data.train={write_records(toys.root / 'bad.jsonl', [record])}"
    assert '"label": true' in megavlm("kto", config, data, status=2).stderr


@pytest.mark.parametrize(
    ("verb", "changed", "message"),
    [
        ("dpo", {"align": {"loss": "hinge", "gamma": 1.0}}, "hinge has no option gamma"),
        ("dpo", {"align": {"desirable_weight": 2.0}}, "is not used by dpo"),
        ("dpo", {"align": {"loss": "orpo", "reference": "x"}}, "has no reference model: the setting would be ignored"),
        ("dpo", {"data": {"too_long": "truncate"}}, "must not be truncated"),
        ("dpo", {"align": {"reference_at": "step", "reference": "x"}}, "align.reference_at is step"),
        ("dpo", {"align": {"loss": "simpo", "reference_at": "step"}}, "has no reference model"),
        ("dpo", {"model": {"hf": "x", "load": "y"}, "train": {"kl_to_start": 0.1}}, "dpo does not use it"),
        ("kto", {"align": {"loss": "ipo"}}, "is not used by kto"),
        ("kto", {"stage": 1}, "has no stages"),
        ("sft", {"data": {"eval": "a"}, "eval": {"every": 1, "best": "eval/margin"}}, "sft does not measure it"),
        ("grpo", {"data": {"eval": "a"}, "eval": {"every": 1, "rows": 2}}, "grpo computes no held-out loss"),
        ("ppo", {"data": {"eval": "a"}, "eval": {"every": 1, "best": "eval/loss"}}, "ppo does not measure it"),
        (
            "sft",
            {"data": {"eval": "a"}, "eval": {"every": 1, "best": "eval/answers/score"}},
            "eval.answers.samples is null, so that no answers are judged",
        ),
        ("dpo", {"data": {"eval": "a"}, "eval": {"every": 1, "answers": {"samples": 2}}}, "how are the answers judged"),
        (
            "rm",
            {"data": {"eval": "a"}, "eval": {"every": 1, "answers": {"samples": 2, "scorer": "exact"}}},
            "a reward model gives scores and no answers",
        ),
        (
            "sft",
            {
                "data": {"eval": "a"},
                "eval": {"every": 1, "answers": {"samples": 2, "scorer": "exact", "max_new_tokens": 99999}},
            },
            "eval.answers.max_new_tokens is 99999, but a row has data.seq_length",
        ),
        (
            "rm",
            {"model": {"hf": "x", "freeze": ["language"]}, "train": {"unfreeze_after": {"language": 1}}},
            "the reward head",
        ),
    ],
)
def test_settings_that_would_be_ignored(verb, changed, message):
    with pytest.raises(UserError, match=message):
        make_method(verb, Settings(**{"model": {"hf": "x"}, **changed}))


def test_a_reward_model_scores_what_is_chosen_higher(toys, pairs, config, tmp_path):
    """Trained, used from its checkpoint on two ranks, exported, converted back, used on pairs: the same scores."""
    data = f"data.train={write_records(toys.root / 'pairs.jsonl', pairs)}"
    megavlm("rm", config, data, "train.lr=1e-3", "train.steps=12", "parallel.tensor=2", "--nproc", 2)
    lines = metrics_of(tmp_path / "run")
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert lines[-1]["accuracy"] == 1.0
    assert lines[-1]["margin"] > lines[0]["margin"]
    answered = [
        {"messages": [*pair["messages"], {"role": "assistant", "content": pair[side]}],
         **{name: pair[name] for name in ("images", "videos") if name in pair}}
        for pair in pairs for side in ("chosen", "rejected")
    ]  # fmt: skip
    held = f"data.eval={write_records(toys.root / 'answered.jsonl', answered)}"

    def scores(load, name, *more):
        megavlm("score", config, f"model.load={load}", held, f"output={tmp_path / name}", "--reward", *more)
        found = [json.loads(line) for line in (tmp_path / name / "scores.jsonl").read_text().splitlines()]
        assert [line["index"] for line in found] == list(range(16))
        return [line["score"] for line in found]

    one = scores(tmp_path / "run", "one")
    assert all(chosen > rejected for chosen, rejected in zip(one[::2], one[1::2], strict=True))
    two = scores(tmp_path / "run", "two", "parallel.tensor=2", "--nproc", 2)
    assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    megavlm("export", config, f"model.load={tmp_path / 'run'}", "--out", tmp_path / "hf")
    hf_to_mcore(tmp_path / "hf", tmp_path / "back", progress=False)
    # the pairs as they are: both answers of each
    held_out, output = f"data.eval={toys.root / 'pairs.jsonl'}", f"output={tmp_path / 'back-pairs'}"
    done = megavlm("score", config, f"model.load={tmp_path / 'back'}", held_out, output, "--reward")
    found = [json.loads(line) for line in (tmp_path / "back-pairs" / "scores.jsonl").read_text().splitlines()]
    assert [(line["index"], line["side"]) for line in found] == [
        (i, s) for i in range(8) for s in ("chosen", "rejected")
    ]
    assert [line["score"] for line in found] == pytest.approx(one, rel=1e-5, abs=1e-6)
    assert "the chosen answer has the higher score in 8 of 8 pairs (100.0%)" in " ".join(done.stdout.split())
    done = megavlm("score", config, held, f"output={tmp_path / 'none'}", "--reward", status=2)
    assert "has no reward head" in done.stderr
