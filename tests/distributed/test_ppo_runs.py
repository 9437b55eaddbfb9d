"""`megavlm ppo` from outside: started again it goes on with the same bits, and what stays frozen stays as it was."""

import json
from pathlib import Path

import forked_command
import pytest
import torch
from killing import Commands, Kill
from parity import settings_of
from test_kill import is_continued, metrics_of, same_bits
from test_preference import pairs_of
from toy import toy_records, write_records

from megavlm.convert.mcore_checkpoint import McoreCheckpoint
from megavlm.monitor.metrics import read_metrics

HERE = Path(__file__).parent
ON_HOST = ["train.recompute=full", "train.offload_activations=true"]


@pytest.fixture(scope="module")
def ppo(toys, tmp_path_factory):
    """ppo(output, overrides): arguments of a run on the questions of the toy records."""
    folder = tmp_path_factory.mktemp("ppo")
    data = write_records(toys.root / "ppo.jsonl", toy_records(toys.root))
    config = {
        "model": {"hf": str(toys.folder("dense")), "load": str(toys.checkpoint("dense"))},
        "data": {"train": [{"path": str(data)}], "seq_length": 256, "workers": 0},
        "train": {"lr": 1e-4, "precision": "fp32", "warmup_steps": 1, "schedule": "constant", "memory_check": False},
        "align": {"mini_batches": 2, "critic": {"lr": 1e-3, "alone_steps": 1}},
        "rollout": {"prompts": 4, "group_size": 2, "max_new_tokens": 5, "temperature": 0.7},
        "reward": [{"python": f"{HERE / 'grpo_rewards.py'}:letters"}],
        "reward_pool": {"workers": 1},
        "log": {"wandb": {"mode": "off"}},
    }
    (folder / "ppo.yaml").write_text(json.dumps(config))
    return lambda output, overrides=(): ["ppo", str(folder / "ppo.yaml"), f"output={output}", *overrides]


@pytest.fixture(scope="module")
def reward_model(toys, tmp_path_factory):
    """reward_model(adapter): the folder of a run of megavlm rm, of all weights or of a LoRA adapter."""
    folder, made = tmp_path_factory.mktemp("rewards"), {}
    pairs = write_records(toys.root / "ppo_pairs.jsonl", pairs_of(toy_records(toys.root)))
    config = {
        "model": {"hf": str(toys.folder("dense")), "load": str(toys.checkpoint("dense"))},
        "data": {"train": [{"path": str(pairs)}], "seq_length": 512, "workers": 0},
        "train": {"steps": 1, "lr": 1e-3, "precision": "fp32", "global_batch_size": 1, "memory_check": False},
        "log": {"wandb": {"mode": "off"}},
    }
    (folder / "rm.yaml").write_text(json.dumps(config))

    def make(adapter: bool = False) -> Path:
        if adapter not in made:
            made[adapter] = folder / f"rm-{adapter}"
            overrides = ["adapter.type=lora", "adapter.rank=4", "model.freeze=[vision,projector]"] if adapter else []
            done(["rm", str(folder / "rm.yaml"), f"output={made[adapter]}", *overrides])
        return made[adapter]

    return make


def done(arguments: list[str]) -> str:
    result = forked_command.run(arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def weights_in(output: Path, step: int, prefix: str = "") -> dict[str, torch.Tensor]:
    stored = McoreCheckpoint(output / f"checkpoints/step_{step:08}")
    keys = [key for key in stored.tensors if key.startswith(f"{prefix}language.")]
    return {key.removeprefix(prefix): stored.read(key) for key in keys}


def test_both_models_go_on_with_the_same_bits(ppo, reward_model, toys, tmp_path):
    """Of the three steps, the critic learns alone in the first. It starts from a reward model, which also judges."""
    reward = f"reward=[{{model: {reward_model()}, label: taste}}]"
    overrides = [reward, f"align.critic.load={reward_model()}", "align.offload=[reference,reward,critic]"]
    straight, halted = tmp_path / "straight", tmp_path / "halted"
    done(ppo(straight, [*overrides, "train.steps=3", "checkpoint.every=1", "checkpoint.keep=3"]))
    for steps in (2, 3):
        elsewhere = ["train.memory_check=true", "train.offload_optimizer=true", *ON_HOST]
        done(ppo(halted, [*overrides, f"train.steps={steps}", *elsewhere]))
    assert metrics_of(halted) == metrics_of(straight)
    final = "checkpoints/step_00000003"
    assert same_bits(halted / final, straight / final)
    start = McoreCheckpoint(toys.checkpoint("dense"))
    of_policy, of_critic = ([weights_in(straight, n, prefix) for n in (1, 2)] for prefix in ("", "critic."))
    assert all(torch.equal(value, start.read(key)) for key, value in of_policy[0].items())  # the critic was alone
    assert any(not torch.equal(value, start.read(key)) for key, value in of_policy[1].items())
    assert any(not torch.equal(value, of_critic[0][key]) for key, value in of_critic[1].items())
    lines = read_metrics(straight)
    assert (lines[0]["loss"], lines[0]["lr"], lines[0]["grad_norm"]) == (0.0, 0.0, 0.0)
    assert lines[1]["grad_norm"] > 0
    for line in lines:
        assert line["value_loss"] > 0
        assert line["critic_grad_norm"] > 0
        assert line["flat_groups"] < 1
        assert {"returns", "explained_variance", "value_clip_share", "kl", "seconds_critic"} <= line.keys()
    assert lines[1]["critic_lr"] == pytest.approx(1e-3)
    assert lines[2]["kl"] != 0


def test_with_adapters_one_base_serves_all_models(ppo, reward_model, tmp_path):
    """The reward model is an adapter, too, and the critic starts from it. No base weights are saved."""
    rm = reward_model(adapter=True)
    models = [f"reward=[{{model: {rm}, label: taste}}]", f"align.critic.load={rm}", "align.critic.alone_steps=0"]
    models += ["model.freeze=[vision,projector]"]
    overrides = [*models, "adapter.type=lora", "adapter.rank=3"]
    straight, halted = tmp_path / "straight", tmp_path / "halted"
    done(ppo(straight, [*overrides, "train.steps=3"]))
    for steps in (2, 3):
        elsewhere = ["align.offload=[reference,critic,reward]", "train.offload_optimizer=true", *ON_HOST]
        done(ppo(halted, [*overrides, f"train.steps={steps}", *elsewhere]))
    assert metrics_of(halted) == metrics_of(straight)
    final = "checkpoints/step_00000003"
    stored, other = McoreCheckpoint(straight / final), McoreCheckpoint(halted / final)
    assert all(torch.equal(stored.read(key), other.read(key)) for key in stored.tensors)
    weights = {key for key in stored.tensors if "optimizer." not in key}
    assert {key.removeprefix("critic.").partition(".")[0] for key in weights} == {"adapter", "language"}
    assert {key for key in weights if "language." in key and "adapter." not in key} == {
        "critic.language.score_head.weight"
    }
    # the same reward model beside a policy of which all weights learn, and which therefore cannot share them
    whole = tmp_path / "whole"
    done(ppo(whole, [*models, "train.steps=1"]))
    lines, others = read_metrics(straight), read_metrics(whole)
    assert others[0]["reward/taste"] == pytest.approx(lines[0]["reward/taste"], rel=1e-5)
    assert others[0]["value_loss"] == pytest.approx(lines[0]["value_loss"], rel=1e-5)
    done(["export", ppo(straight)[1], f"output={straight}", "--adapter", "--out", str(tmp_path / "adapter")])


def own_parameters(settings: dict) -> dict[str, set[str]]:
    """Runs on every rank: of each further model, the parameters that have another storage than the policy's."""
    from megavlm.config.settings import Settings
    from megavlm.model.vlm import PARTS
    from megavlm.reinforcement.critic import add_critic
    from megavlm.reinforcement.reward_models import RewardModels
    from megavlm.runtime.parking import own_weights
    from megavlm.runtime.session import start

    settings = Settings(**settings)
    session = start(settings, training=True)
    RewardModels(session, settings.reward, None)
    add_critic(session)
    found = {}
    for model in ("critic", "reward/taste"):
        vlm = session.models[model].vlm
        own = {id(weight) for weight in own_weights(vlm, [session.vlm])}
        modules = [module for part in PARTS for module in vlm.modules_of(part)]
        named = [pair for module in modules for pair in module.named_parameters()]
        found[model] = {name.partition(".")[0] for name, weight in named if id(weight) in own}
    return found


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_base_weights_are_in_memory_once(quantize, reward_model, toys, world1):
    settings = settings_of(toys.folder("dense"), {}, seq_length=256, optimizer="adam", freeze=("vision", "projector"))
    settings["model"]["load"] = str(toys.checkpoint("dense"))
    settings["adapter"] = {"type": "lora", "rank": 4, "quantize": quantize}
    settings["reward"] = [{"model": str(reward_model(adapter=True)), "label": "taste"}]
    settings["align"] = {"critic": {"load": str(reward_model(adapter=True))}}
    (found,) = world1.run(own_parameters, settings)
    assert found == {"critic": {"adapters", "score_head"}, "reward/taste": {"adapters", "score_head"}}


@pytest.mark.slow
def test_killed_three_times(ppo, tmp_path):
    commands = Commands(reports=False)
    kills = [
        lambda done: Kill(rank=0, step=done + 1, writing=True),
        lambda done: Kill(rank=1, step=done + 1, delay=0.1),
        lambda done: Kill(rank=0, delay=1.0),
    ]
    overrides = ["train.steps=6", "data.workers=1", "checkpoint.every=2", "checkpoint.keep=2", "parallel.tensor=2"]
    try:
        arguments = lambda output: ppo(output, overrides)
        is_continued(commands, arguments, tmp_path / "straight", tmp_path / "killed", kills, 6)
    finally:
        commands.close()
