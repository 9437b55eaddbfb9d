"""`megavlm grpo` from outside: what it samples in several layouts, kills, bad rewards, and prompts that do not fit."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import forked_command
import psutil
import pytest
from killing import Commands, Kill
from test_kill import is_continued
from toy import toy_records, write_records

from megavlm.monitor.metrics import read_metrics

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def commands():
    commands = Commands(reports=False)
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def grpo(toys, tmp_path_factory):
    """grpo(output, overrides, records, reward): arguments of a run; by default on the questions of the toy records."""
    folder = tmp_path_factory.mktemp("grpo")

    def arguments(output, overrides=(), records=None, reward="letters") -> list[str]:
        name = output.name if records else "asked"
        data = write_records(toys.root / f"{name}.jsonl", records or toy_records(toys.root))
        config = {
            "model": {"hf": str(toys.folder("dense")), "load": str(toys.checkpoint("dense"))},
            "data": {"train": [{"path": str(data)}], "seq_length": 256, "workers": 1},
            "train": {
                "optimizer": "adam",
                "lr": 1e-4,
                "precision": "fp32",
                "warmup_steps": 1,
                "memory_check": False,
            },
            "align": {"beta": 0.1},
            "rollout": {"prompts": 4, "group_size": 3, "max_new_tokens": 5, "temperature": 0.7},
            "reward": [{"python": f"{HERE / 'grpo_rewards.py'}:{reward}", "timeout": 2.0}],
            "reward_pool": {"workers": 1, "max_failed_fraction": 1.0},
            "checkpoint": {"every": 2, "keep": 2},
            "log": {"wandb": {"mode": "off"}},
        }
        path = folder / f"{output.name}.yaml"
        path.write_text(json.dumps(config))
        return ["grpo", str(path), f"output={output}", *overrides]

    return arguments


# processes and settings; the order of the prompts follows from the number of all data workers
LAYOUTS = {
    "one process": (1, ["data.workers=2"]),
    "DP2": (2, []),
    "TP2": (2, ["data.workers=2", "parallel.tensor=2"]),
    "PP2 × VPP2": (2, ["data.workers=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "CP2": (2, ["data.workers=2", "parallel.context=2", "data.pad_multiple=4"]),
}


def test_every_layout_samples_the_same_answers_and_learns_the_same(commands, grpo, tmp_path):
    """The first step samples the same tokens. In the second, weights and so probabilities differ by roundings."""
    found = {}
    for name, (size, overrides) in LAYOUTS.items():
        output = tmp_path / name.replace(" ", "")
        arguments = grpo(output, ["train.steps=2", "align.updates=2", "align.mini_batches=2", *overrides])
        assert commands.run(arguments, size, output).statuses == [0] * size, output.with_suffix(".log").read_text()
        found[name] = (
            read_metrics(output),
            [json.loads(line)["groups"] for line in (output / "rollouts.jsonl").read_text().splitlines()],
        )
    lines, groups = found.pop("one process")
    assert len({answer["text"] for group in groups[0] for answer in group["answers"]}) > 6
    assert 0 < lines[0]["reward"] < 1
    assert lines[0]["mismatch_max"] < 1e-4  # log-probabilities of some -7 nats in float32
    for name, (others, other_groups) in found.items():
        texts = {group["sample"].rpartition(":")[2]: group["answers"] for group in other_groups[0]}
        mine = {group["sample"].rpartition(":")[2]: group["answers"] for group in groups[0]}
        assert all(texts[sample] == mine[sample] for sample in texts), name  # with DP2, those of rank 0
        for line, other in zip(lines, others, strict=True):
            for field in ("reward", "reward_std", "answer_tokens", "target_tokens", "samples", "flat_groups"):
                assert other[field] == pytest.approx(line[field], rel=1e-6), (name, field)
            for field in ("loss", "kl", "entropy", "ratio_max", "grad_norm"):
                assert other[field] == pytest.approx(line[field], rel=2e-3, abs=1e-5), (name, field)


def test_sampling_and_updates_share_a_frozen_tower(commands, grpo, tmp_path):
    """In the updates nothing is encoded, not even by the context-parallel rank that has not sampled the prompt."""
    found = {}
    for name in ("one process", "CP2"):
        size, overrides = LAYOUTS[name]
        output = tmp_path / name.replace(" ", "")
        arguments = grpo(output, ["train.steps=2", "align.mini_batches=2", "model.freeze=[vision]", *overrides])
        assert commands.run(arguments, size, output).statuses == [0] * size, output.with_suffix(".log").read_text()
        found[name] = read_metrics(output)
    for line, other in zip(*found.values(), strict=True):
        for one in (line, other):
            assert one["frames"] >= one["frames_kept"] > one["frames_encoded"] == 0
        assert other["frames_kept"] == line["frames_kept"]
        assert line["grad_norm/projector"] > line["grad_norm/vision"] == 0
        for field in ("loss", "kl", "entropy", "grad_norm", "grad_norm/projector"):
            assert other[field] == pytest.approx(line[field], rel=2e-3, abs=1e-5), field


def test_killed_and_started_again_it_samples_and_learns_the_same(commands, grpo, tmp_path):
    kills = [
        lambda done: Kill(rank=0, step=done + 1, writing=True),
        lambda done: Kill(rank=1, step=done + 1, delay=0.1),
        lambda done: Kill(rank=0, delay=1.0),
    ]
    arguments = lambda output: grpo(output, ["train.steps=6", "align.mini_batches=2"])
    is_continued(commands, arguments, tmp_path / "straight", tmp_path / "killed", kills, 6)
    texts = [(tmp_path / run / "rollouts.jsonl").read_text() for run in ("straight", "killed")]
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_killed_ten_times_at_random_moments(commands, grpo, tmp_path):
    draw = random.Random(14)
    kills = [lambda done: Kill(rank=0, step=done + 1, writing=True)]
    for _ in range(9):
        rank, ahead, delay = draw.randrange(2), draw.randrange(3), draw.random()
        kills.append(
            lambda done, rank=rank, ahead=ahead, delay=delay: Kill(rank, done + ahead if ahead else 0, 3 * delay)
        )
    # ten kills of up to three seconds of steps: none may come when the run has ended
    arguments = lambda output: grpo(output, ["train.steps=90", "rollout.replace_flat=2"])
    is_continued(commands, arguments, tmp_path / "straight", tmp_path / "killed", kills, 90)


TROUBLE = ["raises", "hangs", "dies", "is not a number", "is a string", "does not apply", "is equal", "is fine"]


def test_a_bad_reward_costs_only_its_answers(grpo, toys, tmp_path):
    records = [record | {"trouble": kind} for record, kind in zip(toy_records(toys.root), TROUBLE, strict=True)]
    output = tmp_path / "bad"
    overrides = ["train.steps=1", "train.warmup_steps=0", "rollout.prompts=8", "align.beta=0", "data.workers=0"]
    result = forked_command.run(grpo(output, overrides, records, "troublesome"))
    assert result.returncode == 0, result.stdout + result.stderr
    line = read_metrics(output)[0]
    assert line["reward_failures"] == 5 * 3
    assert line["groups"] == 8
    assert line["flat_groups"] == 7 / 8  # only that which is fine teaches anything
    assert line["grad_norm"] > 0
    failed = [json.loads(text) for text in (output / "reward_failures.jsonl").read_text().splitlines()]
    causes = {TROUBLE[int(one["sample"].rpartition(":")[2]) - 1]: one["cause"] for one in failed}
    assert set(causes) == set(TROUBLE[:5])
    assert "no reward today" in causes["raises"]
    assert "2 s" in causes["hangs"] or "no result" in causes["hangs"]


def test_flat_groups_are_replaced_and_cut_answers_can_be_left_out(grpo, toys, tmp_path):
    """Of eight prompts, every second has equal rewards: two of the first four are replaced by two more."""
    kinds = ["is fine", "is equal"] * 4
    records = [record | {"trouble": kind} for record, kind in zip(toy_records(toys.root), kinds, strict=True)]
    output = tmp_path / "dynamic"
    overrides = ["train.steps=1", "train.warmup_steps=0", "align.beta=0", "data.workers=0", "data.shuffle=false"]
    overrides += ["rollout.replace_flat=1", "align.mask_truncated=true", "align.overlong_cache=4"]
    result = forked_command.run(grpo(output, overrides, records, "troublesome"))
    assert result.returncode == 0, result.stdout + result.stderr
    line = read_metrics(output)[0]
    assert line["groups"] == 6  # the first four, and two for the two flat ones
    assert line["samples"] == 3 * 3  # of the three groups with a spread: records 1, 3 and 5
    assert line["truncated_share"] == 1.0  # toys never end an answer by themselves
    assert line["target_tokens"] == 0
    assert line["grad_norm"] == 0.0
    assert line["entropy"] is None  # nothing was learned from, so nothing was measured
    groups = json.loads((output / "rollouts.jsonl").read_text())["groups"]
    fine = [answer for group in groups for answer in group["answers"] if group["sample"].endswith(("1", "3"))]
    # all answers have the full length, for which the penalty is 1
    assert all(answer["reward"] == pytest.approx(answer["parts"]["troublesome"] - 1) for answer in fine)


def test_a_reward_model_is_a_reward(grpo, toys, tmp_path):
    from test_preference import pairs_of

    pairs = write_records(toys.root / "rm_pairs.jsonl", pairs_of(toy_records(toys.root)))
    config = {
        "model": {"hf": str(toys.folder("dense")), "load": str(toys.checkpoint("dense"))},
        "data": {"train": [{"path": str(pairs)}], "seq_length": 512, "workers": 0},
        "train": {"steps": 1, "lr": 1e-3, "precision": "fp32", "global_batch_size": 1, "memory_check": False},
        "log": {"wandb": {"mode": "off"}},
    }
    (tmp_path / "rm.yaml").write_text(json.dumps(config))
    result = forked_command.run(["rm", str(tmp_path / "rm.yaml"), f"output={tmp_path / 'rm'}"])
    assert result.returncode == 0, result.stdout + result.stderr
    output, rewards = tmp_path / "judged", "[{model: %s, label: taste, weight: 2}, {name: length, limit: 5}]"
    overrides = ["train.steps=1", "train.warmup_steps=0", "data.workers=0", "align.beta=0"]
    result = forked_command.run(grpo(output, [*overrides, f"reward={rewards % (tmp_path / 'rm')}"]))
    assert result.returncode == 0, result.stdout + result.stderr
    groups = json.loads((output / "rollouts.jsonl").read_text())["groups"]
    for answer in (answer for group in groups for answer in group["answers"]):
        assert answer["reward"] == pytest.approx(2 * answer["parts"]["taste"] + answer["parts"]["length"])
    assert read_metrics(output)[0]["reward/taste"] != 0
    headless = f"reward={rewards % toys.checkpoint('dense')}"
    result = forked_command.run(grpo(tmp_path / "headless", [headless, *overrides]))
    assert result.returncode == 2
    assert "has no reward head" in result.stderr


def test_the_divergence_can_be_a_part_of_the_reward(grpo, tmp_path):
    """RLOO's standard form: each advantage is the reward, less its divergence, less the mean of the others."""
    output = tmp_path / "rloo"
    overrides = ["train.steps=2", "train.warmup_steps=0", "train.lr=3e-3", "data.workers=0", "rollout.log_every=1"]
    overrides += ["align.advantage=rloo", "align.kl_in=reward", "align.beta=0.1", "align.loss=dr_grpo"]
    overrides += ["log.phases=true"]
    result = forked_command.run(grpo(output, overrides))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(text)["groups"] for text in (output / "rollouts.jsonl").read_text().splitlines()]
    for group in (group for groups in lines for group in groups):
        rewards = [one["parts"]["letters"] + 0.1 * one["parts"]["kl"] for one in group["answers"]]
        assert [one["reward"] for one in group["answers"]] == pytest.approx(rewards, abs=1e-9)
        advantages = [reward - (sum(rewards) - reward) / (len(rewards) - 1) for reward in rewards]
        assert [one["advantage"] for one in group["answers"]] == pytest.approx(advantages, abs=1e-6)
    first, second = ([one["parts"]["kl"] for group in groups for one in group["answers"]] for groups in lines)
    assert first == pytest.approx([0.0] * len(first), abs=1e-4)  # the model is still the reference
    assert max(map(abs, second)) > 1e-2
    metrics = read_metrics(output)
    assert metrics[1]["reward/kl"] == pytest.approx(sum(second) / len(second), rel=1e-6)
    assert metrics[1]["kl"] is None  # there is none in the loss
    assert metrics[1]["phase/sampling"] > 0
    assert metrics[1]["phase/other"] < metrics[1]["seconds_rollout"]  # sampling is not counted there


def test_a_run_whose_rewards_all_fail_saves_and_ends(grpo, toys, tmp_path):
    records = [record | {"trouble": "raises"} for record in toy_records(toys.root)]
    output = tmp_path / "failing"
    overrides = [
        *("train.steps=5", "rollout.prompts=8", "rollout.group_size=13", "rollout.max_new_tokens=1"),
        *("reward_pool.max_failed_fraction=0.5", "align.beta=0", "data.workers=0"),
    ]
    result = forked_command.run(grpo(output, overrides, records, "troublesome"))
    assert result.returncode == 2, result.stdout + result.stderr
    assert "no reward today" in result.stderr
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step_00000001"]
    assert read_metrics(output)[0]["grad_norm"] == 0  # nothing was learned from
    assert "no reward today" in (output / "report.html").read_text()


def test_a_prompt_that_leaves_no_room_is_dropped_and_told(grpo, toys, tmp_path):
    records = toy_records(toys.root)[:3]
    records[1]["messages"][0]["content"] = "word " * 300
    output = tmp_path / "long"
    overrides = ["train.steps=1", "train.warmup_steps=0", "rollout.prompts=2", "data.workers=0", "data.shuffle=false"]
    overrides += ["data.max_dropped_fraction=1.0"]
    result = forked_command.run(grpo(output, overrides, records))
    assert result.returncode == 0, result.stdout + result.stderr
    line = json.loads((output / "data_errors.jsonl").read_text().splitlines()[0])
    assert line["sample"].endswith(":2")
    assert "rollout.max_new_tokens = 256 - 5" in line["cause"]


def test_sampler_and_trainer_agree_to_the_bit_in_batch_invariant_mode(grpo, tmp_path):
    output = tmp_path / "invariant"
    overrides = ["train.steps=1", "train.warmup_steps=0", "rollout.prompts=1", "data.workers=0", "align.updates=2"]
    result = forked_command.run(grpo(output, ["rollout.batch_invariant=true", *overrides]))
    assert result.returncode == 0, result.stdout + result.stderr
    line = read_metrics(output)[0]
    assert line["mismatch_max"] == 0.0
    assert line["ratio_max"] > 1  # of the second update


@pytest.mark.slow
def test_no_process_grows_with_the_number_of_steps(grpo, tmp_path):
    """Resident memory of trainer, data worker and reward worker after 200 steps: that after 50, plus at most 3 %."""
    output = tmp_path / "long"
    arguments = grpo(output, ["train.steps=200", "rollout.log_every=5", "checkpoint.every=50"])
    command = subprocess.Popen([sys.executable, "-m", "megavlm", *arguments], stdout=subprocess.DEVNULL)
    trainer, sizes = psutil.Process(command.pid), dict[int, dict[int, int]]()
    for step in (50, 199):
        while len(read_metrics(output) if output.exists() else ()) < step:
            assert command.poll() is None
            time.sleep(0.05)
        sizes[step] = {p.pid: p.memory_info().rss for p in (trainer, *trainer.children(recursive=True))}
    assert command.wait() == 0
    kept = sizes[50].keys() & sizes[199].keys()
    assert len(kept) >= 3
    growth = {pid: sizes[199][pid] / sizes[50][pid] for pid in kept}
    assert max(growth.values()) < 1.03, growth
