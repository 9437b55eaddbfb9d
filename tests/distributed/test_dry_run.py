"""The tuning recipes, each on a rank of the cluster that it is meant for: numbers held, against formulas by hand.

Ranks are built without memory, and rows go through dense ones (``megavlm.plan.dry_run``). That what they compute is
right is checked with real tensors on toys, in the other files of this folder.
"""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import pytest
from cluster_recipes import CONFIGS, MODELS, world_of

from megavlm.cli.main import main
from megavlm.cli.verbs import VERBS
from megavlm.config.load import load_settings

CASES = [(model, verb, tuner) for model in MODELS for verb in ("sft", "rm", "dpo") for tuner in ("", "-lora")]
CASES += [("2b", "kto", tuner) for tuner in ("", "-lora")]
CASES += [(model, "grpo", tuner) for model in MODELS for tuner in ("", "-lora")]
CASES += [(model, "ppo", tuner) for model in ("2b", "8b", "235b-a22b") for tuner in ("", "-lora")]
# One of each kind of model (tied, untied, MoE), of each method, with adapters and without: what a method adds is the
# same on all models, and each case takes 5 to 10 seconds.
QUICK = [("2b", verb, "") for verb in ("sft", "rm", "kto", "grpo")]
QUICK += [("8b", "sft", "-lora"), ("8b", "ppo", "-lora"), ("235b-a22b", "dpo", ""), ("235b-a22b", "rm", "-lora")]
RANK = 16  # of LoRA, the default


@contextlib.contextmanager
def alone():
    """A rank of the pool as a user's process at the top of the checkout: in no world."""
    import torch.distributed as dist

    dist.destroy_process_group()
    before = dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        del os.environ[name]
    try:
        with contextlib.chdir(CONFIGS.parent):
            yield
    finally:
        os.environ.clear()
        os.environ |= before


def dry_runs(cases: list) -> dict:
    """Runs on every rank: each does its share of the cases, in worlds of their own instead of the pool's."""
    import torch.distributed as dist

    from megavlm.plan.dry_run import dry_run

    here, size, found = dist.get_rank(), dist.get_world_size(), {}
    with alone():
        for model, verb, tuner in cases[here::size]:
            os.environ["MEGAVLM_MODEL"] = model
            settings = load_settings(CONFIGS / f"{'align' if verb in ('grpo', 'ppo') else 'tune'}/{verb}{tuner}.yaml")
            found[model, verb, tuner] = (settings, dry_run(settings, verb, world_of(model)))
    return found


@pytest.fixture(scope="module")
def found(world2, request):
    """The results of all cases that are to be tested, by case."""
    cases = [
        tuple(item.callspec.params[name] for name in ("model", "verb", "tuner"))
        for item in request.session.items
        if "found" in getattr(item, "fixturenames", ())
    ]
    first, second = world2.run(dry_runs, cases, timeout=900)  # all the slow ones together, on a busy machine
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
    layers = (first and layout.first_stage_layers) or (last and layout.last_stage_layers) or layers
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


@pytest.mark.parametrize(
    ("model", "verb", "tuner"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case not in QUICK else []) for case in CASES],
)
def test_a_rank_holds_its_share_and_all_that_learns_has_gradients(found, model: str, verb: str, tuner: str) -> None:
    settings, ranks = found[model, verb, tuner]
    layout, world, tower = settings.parallel, world_of(model), of_the_tower(model)
    models = ["model", "critic"] if verb == "ppo" else ["model"]
    stages = sorted({0, world - world // layout.pipeline})  # the first and the last one
    assert [(held.rank, held.model) for held in ranks] == [(rank, name) for rank in stages for name in models]
    for held in ranks:
        scores = verb == "rm" or held.model == "critic"
        first, last = held.rank == 0, held.rank > 0 or layout.pipeline == 1
        decoder = of_the_decoder(model, layout, first=first, last=last)
        head = decoder["head"] * scores
        full = decoder["shared"] + decoder["experts"] + head
        lora = decoder["shared adapters"] + decoder["expert adapters"]
        assert held.parameters == tower | {"language": full + lora * bool(tuner)}
        learn = {"projector": 0, "shared": decoder["shared adapters"] + head, "experts": decoder["expert adapters"]}
        if not tuner:
            shared = decoder["shared"] + (head - decoder["output layer"]) * scores  # scores use no output layer
            projector = tower["projector"] * ("projector" not in settings.model.freeze)
            learn = {"projector": projector, "shared": shared, "experts": decoder["experts"]}
        assert held.learning == {
            "vision": 0,
            "projector": learn["projector"],
            "language": learn["shared"] + learn["experts"],
        }
        assert held.reached == (held.learning if "b-a" not in model else None)

        # bytes: bf16 weights; float32 gradients; of the optimizer's share a float32 copy and two means. Data ranks and
        # context ranks share the optimizer.
        data = world // (layout.tensor * layout.pipeline)
        expert_data = world // (layout.expert * layout.expert_tensor * layout.pipeline)
        shares = learn["projector"] / world + learn["shared"] / data + learn["experts"] / expert_data
        shares_base = bool(tuner) and held.model == "critic"  # with the policy, which holds it
        assert held.weights == 2 * sum((held.learning if shares_base else held.parameters).values())
        # Megatron pads each bucket to a multiple of its data ranks and of 128
        assert held.gradients == pytest.approx(4 * sum(held.learning.values()), rel=1e-3)
        assert held.optimizer == pytest.approx(12 * shares, rel=1e-3)


# processes, parallel, other settings: what the recipes do not have
LAYOUTS = {
    "TP2 × PP2": (4, {"tensor": 2, "pipeline": 2}, {}),
    "TP2 × CP2 × PP2": (8, {"tensor": 2, "context": 2, "pipeline": 2}, {}),
    "PP2 × VPP2": (4, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "frames over the world, offloaded": (2, {}, {"vision": {"balance": "world", "offload": True, "recompute": True}}),
    "SGD": (2, {}, {"train": {"optimizer": "sgd"}}),
    "GaLore": (2, {}, {"train": {"optimizer": "galore", "galore_rank": 16}}),
    "float32": (2, {"tensor": 2, "sequence": False}, {"train": {"precision": "fp32"}}),
    "TE, FP8": (2, {}, {"model": {"kernels": "te"}, "train": {"precision": "fp8"}}),
    "DoRA": (2, {"tensor": 2}, {"adapter": {"type": "dora"}}),
    "FourierFT": (2, {"pipeline": 2}, {"adapter": {"type": "fourierft", "targets": ["q_proj", "attn.qkv"]}}),
    "4 bits": (2, {}, {"adapter": {"type": "lora", "quantize": "nf4"}}),
}


def layouts(folder: Path) -> dict:
    """Runs on every rank: each does its share of the layouts."""
    import torch.distributed as dist

    from megavlm.align.registry import METHODS
    from megavlm.config.settings import Settings
    from megavlm.plan.dry_run import dry_run

    here, size, found = dist.get_rank(), dist.get_world_size(), {}
    with alone():
        for name, (world, parallel, others) in list(LAYOUTS.items())[here::size]:
            sections = {"model": {}, "train": {}} | others
            sections["model"] |= {"hf": folder, "load": "none"}
            sections["train"] |= {"lr": 1e-3, "steps": 2}
            sections |= {"data": {"seq_length": 256, "train": [{"path": "none"}]}, "parallel": parallel}
            of_rows = {"train": sections["train"] | {"global_batch_size": 8}}
            of_answers = {"rollout": {"prompts": 4, "max_new_tokens": 16}, "reward": [{"name": "exact"}]}
            verbs = sorted(METHODS.keys() - {"pretrain", "sft"})
            for verb in ("sft", verbs[list(LAYOUTS).index(name) % len(verbs)]):
                size = of_answers if METHODS[verb].samples else of_rows
                found[name, verb] = dry_run(Settings(**sections | size), verb, world)
    return found


def test_any_layout_and_method_goes_through(world2, toys) -> None:
    """Each layout with sft and another method in turn: a method adds its loss and its head, whatever the layout."""
    first, second = world2.run(layouts, toys.folder("dense"))
    found = first | second
    assert len(found) == 2 * len(LAYOUTS)
    assert {verb for _, verb in found} == {"sft", "rm", "dpo", "kto", "grpo", "ppo"}
    for (name, verb), ranks in found.items():
        assert len(ranks) == LAYOUTS[name][1].get("pipeline", 1) * (2 if verb == "ppo" else 1)
        for held in ranks:
            assert sum(held.learning.values()) > 0
            assert held.reached == held.learning, (name, verb)
    held = {name: found[name, "sft"][0] for name in LAYOUTS}
    decoder = held["TE, FP8"].parameters["language"]
    assert held["SGD"].optimizer == 4 * sum(held["SGD"].learning.values())  # the copy, on every data rank
    assert held["SGD"].optimizer < held["GaLore"].optimizer < 2 * held["SGD"].optimizer  # Adam's would be thrice
    assert held["float32"].weights == 4 * sum(held["float32"].parameters.values())
    in_bf16 = 2 * sum(held["4 bits"].parameters.values())
    assert 0.5 * 2 * decoder < in_bf16 - held["4 bits"].weights < 0.75 * 2 * decoder  # embedding and norms stay


def test_bytes_in_4_bits_are_those_of_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes")
    import torch

    from megavlm.adapters.nf4 import Nf4, nbytes_of

    for shape in ((128, 64), (513, 100), (300, 128)):
        for double in (False, True):
            assert nbytes_of(shape[0] * shape[1], double=double) == Nf4(torch.ones(shape), double=double).nbytes


def command(arguments: list[str]) -> tuple[int, str]:
    """Runs on every rank: the command's exit status, and what it printed."""
    with alone(), contextlib.redirect_stdout(io.StringIO()) as shown:
        os.environ["MEGAVLM_MODEL"] = "30b-a3b"
        return main(arguments), shown.getvalue()


def test_the_command_tells_what_a_rank_holds(world1) -> None:
    wanted = ["validate", "configs/tune/dpo-lora.yaml", "--world-size", "32", "--no-files", "--dry-run", "dpo"]
    ((status, shown),) = world1.run(command, wanted)
    shown = " ".join(shown.split())  # lines are wrapped
    assert status == 0
    assert "rank 0 parameters trainable vision" in shown
    decoder = of_the_decoder("30b-a3b", load_settings(CONFIGS / "models/30b-a3b.yaml").parallel, first=True, last=False)
    assert re.search(rf"language \S+ {decoder['shared adapters'] + decoder['expert adapters']:,} GiB", shown)
    assert re.search(r"GiB: weights \S+ \+ gradients \S+ \+ optimizer \S+ = \S+, without activations", shown)
    assert "no forward pass" in shown


@pytest.mark.parametrize(
    ("verb", "override", "told"),
    [
        ("pretrain", "train.lr=1e-5", "pretrain needs stage"),
        ("sft", "stage=1", "sft has no stages"),
        ("dpo", "train.steps=null", "dpo needs train.steps"),
        ("a2c", "train.lr=1e-5", "invalid choice: 'a2c'"),
    ],
)
def test_a_dry_run_needs_what_its_verb_needs(verb: str, override: str, told: str, capsys) -> None:
    arguments = ["validate", str(CONFIGS / "tune/sft.yaml"), override, "--no-files", "--dry-run", verb]
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


def test_help_offers_what_can_be_run() -> None:
    from megavlm.align.registry import METHODS

    assert set(VERBS["validate"].flags["dry_run"]["choices"]) == set(METHODS)
