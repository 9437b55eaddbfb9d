"""The tuning recipes, each on a rank of the cluster that it is meant for: numbers held, against formulas by hand.

Ranks are built without memory, and rows go through dense ones (``megavlm.plan.dry_run``). That what they compute is
right is checked with real tensors on toys, in the other files of this folder.
"""

import json
import os
import re
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = ["2b", "4b", "8b", "32b", "30b-a3b", "235b-a22b"]
CASES = [(model, verb, tuner) for model in MODELS for verb in ("sft", "rm", "dpo") for tuner in ("", "-lora")]
CASES += [("2b", "kto", tuner) for tuner in ("", "-lora")]
RANK = 16  # of LoRA, the default


def world_of(model: str) -> int:
    return int(re.match(r"# world: (\d+)", (CONFIGS / f"models/{model}.yaml").read_text())[1])


def dry_runs() -> dict:
    """Runs on every rank: each does its share of the cases, in worlds of their own instead of the pool's."""
    import torch.distributed as dist

    from megavlm.config.load import load_settings
    from megavlm.plan.dry_run import dry_run

    here, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    os.chdir(CONFIGS.parent)
    found = {}
    for model, verb, tuner in CASES[here::size]:
        os.environ["MEGAVLM_MODEL"] = model
        settings = load_settings(CONFIGS / f"tune/{verb}{tuner}.yaml")
        found[model, verb, tuner] = (settings, dry_run(settings, verb, world_of(model)))
    return found


@pytest.fixture(scope="module")
def found(world2):
    first, second = world2.run(dry_runs)
    return first | second


def of_the_tower(model: str) -> dict[str, int]:
    """Numbers of vision and projector, which every rank has whole."""
    vision = json.loads((CONFIGS / f"models/{model}/config.json").read_text())["vision_config"]
    width, inner, out = vision["hidden_size"], vision["intermediate_size"], vision["out_hidden_size"]
    merge = vision["spatial_merge_size"] ** 2
    linear = lambda i, o: i * o + o
    attention, mlp = linear(width, 3 * width) + linear(width, width), linear(width, inner) + linear(inner, width)
    patch = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    merger = linear(merge * width, merge * width) + linear(merge * width, out)
    levels = len(vision["deepstack_visual_indexes"])
    return {
        "vision": vision["depth"] * (attention + mlp + 4 * width)
        + linear(patch, width)
        + vision["num_position_embeddings"] * width,
        "projector": merger + 2 * width + levels * (merger + 2 * merge * width),
    }


def of_the_decoder(model: str, layout, *, first: bool, last: bool) -> dict[str, int]:
    """Numbers of the decoder on a rank, experts apart; of its LoRA, which has rank × (in + out) for each linear."""
    config = json.loads((CONFIGS / f"models/{model}/config.json").read_text())
    text, tied = config["text_config"], config.get("tie_word_embeddings", False)
    hidden, width, layers = text["hidden_size"], text["head_dim"], text["num_hidden_layers"] // layout.pipeline
    heads, kv = (text[name] * width // layout.tensor for name in ("num_attention_heads", "num_key_value_heads"))
    linears, experts, router = [(hidden, heads), (hidden, kv), (hidden, kv), (heads, hidden)], [], 0
    if "num_experts" in text:  # gate and up are one linear in Hugging Face's model
        inner, router = text["moe_intermediate_size"] // layout.expert_tensor, text["num_experts"] * hidden
        experts = [(hidden, 2 * inner), (inner, hidden)] * (text["num_experts"] // layout.expert)
    else:
        inner = text["intermediate_size"] // layout.tensor
        linears += [(hidden, inner), (hidden, inner), (inner, hidden)]
    words = text["vocab_size"] // layout.tensor * hidden
    ends = words * first + (hidden + words * (not tied or not first)) * last
    weights = lambda pairs: layers * sum(i * o for i, o in pairs)
    adapters = lambda pairs: layers * sum(RANK * (i + o) for i, o in pairs)
    return {
        "shared": weights(linears) + layers * (2 * hidden + 2 * width + router) + ends,
        "experts": weights(experts),
        "shared adapters": adapters(linears),
        "expert adapters": adapters(experts),
        "head": hidden * last,
        "output layer": words * (last and not tied),
    }


@pytest.mark.parametrize(("model", "verb", "tuner"), CASES)
def test_a_rank_holds_its_share_and_all_that_learns_has_gradients(found, model: str, verb: str, tuner: str) -> None:
    settings, ranks = found[model, verb, tuner]
    layout, world, tower = settings.parallel, world_of(model), of_the_tower(model)
    assert [held.rank for held in ranks] == [0, world // 2][: layout.pipeline]  # of one or two stages
    for held in ranks:
        first, last = held.rank == 0, held.rank > 0 or layout.pipeline == 1
        decoder = of_the_decoder(model, layout, first=first, last=last)
        head = decoder["head"] * (verb == "rm")
        full = decoder["shared"] + decoder["experts"] + head
        lora = decoder["shared adapters"] + decoder["expert adapters"]
        assert held.parameters == tower | {"language": full + lora * bool(tuner)}
        learn = {"projector": 0, "shared": decoder["shared adapters"] + head, "experts": decoder["expert adapters"]}
        if not tuner:
            shared = decoder["shared"] + (head - decoder["output layer"]) * (verb == "rm")  # scores use no output layer
            learn = tower | {"shared": shared, "experts": decoder["experts"]}
        assert held.learning == {
            "vision": 0,
            "projector": learn["projector"],
            "language": learn["shared"] + learn["experts"],
        }
        assert held.reached == (held.learning if "b-a" not in model else None)

        # bytes: bf16 weights; float32 gradients; of the optimizer's share a float32 copy and two means
        data = world // (layout.tensor * layout.pipeline * layout.context)
        expert_data = world // (layout.expert * layout.expert_tensor * layout.pipeline)
        shares = learn["projector"] / world + learn["shared"] / data + learn["experts"] / expert_data
        assert held.weights == 2 * sum(held.parameters.values())
        # Megatron pads each bucket to a multiple of its data ranks and of 128
        assert held.gradients == pytest.approx(4 * sum(held.learning.values()), rel=1e-3)
        assert held.optimizer == pytest.approx(12 * shares, rel=1e-3)


def test_help_offers_what_can_be_run() -> None:
    from megavlm.plan.dry_run import METHODS
    from megavlm.verbs import VERBS

    assert set(VERBS["validate"].flags["dry_run"]["choices"]) == set(METHODS)
