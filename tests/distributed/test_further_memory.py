"""What the planner counts besides what is trained, against the same things on real ranks, in bytes."""

import json

import pytest
import torch
from parity import settings_of
from test_dry_run import alone
from test_te_fp8 import RECIPES, wide  # noqa: F401  (a fixture)

BF16 = {"precision": "bf16", "optimizer": "adam"}
FROZEN = ("vision", "projector")
# name: (processes, toy, parallel settings, options of settings_of)
LAYOUTS = {
    "TP2, tower unfrozen later": (
        2, "dense-untied", {"tensor": 2}, {**BF16, "freeze": FROZEN, "unfreeze_after": {"projector": 1}},
    ),
    "MoE EP2": (2, "moe", {"expert": 2}, BF16),
}  # fmt: skip


def kept(settings: dict, checkpoint) -> tuple[int, int]:
    """Runs on every rank: the bytes of a real copy of the first weights, and of a real reward model."""
    from megavlm.config.settings import Settings
    from megavlm.optim.param_groups import ParamGroups
    from megavlm.runtime.session import start
    from megavlm.tracing.static_memory import StaticCount
    from megavlm.training.start_weights import StartWeights

    settings = Settings(**settings)
    session = start(settings, training=True)
    ParamGroups(session.vlm, settings.train).freeze()
    copies = {copy.untyped_storage() for copy in StartWeights(session)._copies.values()}
    reward = session.add_model("reward", checkpoint, trained=False, score_head=True)
    return sum(storage.nbytes() for storage in copies), StaticCount()(reward.vlm, None).weights


def further(settings: dict, verb: str, world: int) -> list[int]:
    """The same of each rank, as it is planned."""
    from megavlm.align.registry import make_method
    from megavlm.config.settings import Settings
    from megavlm.plan.further_memory import further_memory
    from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent

    settings, found = Settings(**settings), []
    with alone():
        for rank in range(world):
            method = make_method(verb, settings)
            with absent_rank(that_can_be_absent(settings), method, rank, world) as (session, _):
                found.append(further_memory(session, settings, method, [rank]))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_and_models_that_judge(layout, toys, request, world1):
    size, kind, parallel, options = LAYOUTS[layout]
    settings = settings_of(toys.folder(kind), parallel, **options, moe=kind == "moe")
    settings["model"]["load"] = str(toys.checkpoint(kind))
    world = request.getfixturevalue(f"world{size}")
    rl = settings | {
        "reward": [{"model": str(toys.checkpoint(kind))}],
        "align": {"beta": 0.1},
        "rollout": {"prompts": 4, "max_new_tokens": 64},
    }
    rl["train"] = {key: value for key, value in rl["train"].items() if key != "global_batch_size"}
    away = rl | {"align": {"beta": 0.1, "offload": ["reward", "reference"]}}
    tuned = settings | {"train": settings["train"] | {"kl_to_start": 0.1}}
    copies, models = zip(*world.run(kept, settings, toys.checkpoint(kind)), strict=True)
    (planned,) = world1.run(further, tuned, "sft", size)
    assert planned == list(copies)
    assert min(copies) > 0
    (planned,) = world1.run(further, rl, "grpo", size)
    assert planned == [a + b for a, b in zip(copies, models, strict=True)]
    assert world1.run(further, away, "grpo", size) == world1.run(further, settings, "sft", size) == [[0] * size]


def stored(settings: dict) -> tuple[int, int, int]:
    """Runs on every rank: bytes of keys and values of a real pool that is full, what is planned, and its blocks."""
    import numpy as np

    from megavlm.config.settings import Settings
    from megavlm.plan.further_memory import sampling_memory
    from megavlm.rollout.blocks import BLOCK_TOKENS, Blocks, KeyValuePool
    from megavlm.rollout.memory import Memory
    from megavlm.runtime.session import start

    settings = Settings(**settings)
    session = start(settings, training=True, load=False)
    memory = Memory.of(session.vlm, settings.rollout.cache_gib, "rollout.cache_gib")
    blocks = Blocks(memory.blocks)
    slots = blocks.take(memory.blocks * BLOCK_TOKENS)
    pool, config = KeyValuePool(blocks), session.vlm.decoder_config
    heads = config.num_query_groups // session.vlm.parallel.tensor
    new = torch.ones(len(slots), heads, config.kv_channels, dtype=config.params_dtype)
    layers = range(len(session.vlm.language[0].decoder.layers))
    kept = [pool.store(layer, new, new, torch.from_numpy(slots.astype(np.int64))) for layer in layers]
    return sum(x.nbytes for both in kept for x in both), sampling_memory(session, settings, "grpo"), memory.blocks


def test_keys_and_values(toys, world2):
    settings = settings_of(toys.folder("dense"), {"tensor": 2}, **BF16)
    settings["rollout"] = {"prompts": 4, "group_size": 8, "max_new_tokens": 64, "cache_gib": 1e-3}
    for real, planned, blocks in world2.run(stored, settings):
        assert planned == real
        assert blocks > 0
    settings["rollout"] |= {"cache_gib": 0.1, "max_sequences": 24}
    for real, planned, blocks in world2.run(stored, settings):
        # 4 prompts of up to 256 - 64 tokens, and 24 answers of 64 at a time, in blocks of 16 tokens
        assert planned * blocks == (4 * 12 + 24 * 4) * real


def held(settings: dict) -> tuple[int, int]:
    """Runs on every rank: bytes of a real policy and critic, while the critic is in host memory and while it is not."""
    from megavlm.config.settings import Settings
    from megavlm.optim.optimizers import Optimizers
    from megavlm.reinforcement.critic import add_critic
    from megavlm.runtime.session import start
    from megavlm.tracing.static_memory import StaticCount

    def first_step(optimizers):
        for one in (part.optimizer for part in optimizers.optimizer.chained_optimizers):
            for weight in (weight for group in one.param_groups for weight in group["params"]):
                weight.grad = torch.zeros_like(weight)
            one.step()
            one.zero_grad()

    def total():
        count = StaticCount()
        return (count(session.vlm, main) + count(critic.vlm, critic.optimizers)).total

    settings = Settings(**settings)
    session = start(settings, training=True, load=False)
    main, critic = Optimizers(session.vlm, settings.train), add_critic(session)
    first_step(main)
    with critic.awake():
        first_step(critic.optimizers)
        awake = total()
    return total(), awake


def moments(settings: dict, world: int) -> list[int]:
    """As it is planned: what is held while the policy samples, if that needs most, and while the critic learns."""
    from dataclasses import replace

    from megavlm.config.settings import Settings
    from megavlm.convert.hf_shapes import model_shapes
    from megavlm.plan.mix import Mix
    from megavlm.plan.stage import Layout, stage_of

    settings = Settings(**settings)
    shapes = model_shapes(settings.model)
    with alone():
        stage = stage_of(Layout(settings, shapes, "ppo", world, Mix.of(settings, shapes, answers=2), 4, 1.0), 0)
    return [replace(stage, sampling=sampling).fullest(0, 1)[0].total for sampling in (2**40, 0)]


def test_a_critic_that_waits_in_host_memory(toys, world1, world2):
    settings = settings_of(toys.folder("dense"), {}, **BF16, freeze=FROZEN)
    del settings["train"]["global_batch_size"]
    settings |= {"rollout": {"prompts": 4, "max_new_tokens": 64}, "align": {"offload": ["critic"], "beta": 0}}
    settings["model"]["load"] = str(toys.checkpoint("dense"))
    settings["align"]["critic"] = {"load": settings["model"]["load"]}
    (real, _) = world2.run(held, settings)
    (planned,) = world1.run(moments, settings, 2)
    assert planned == list(real)
    assert 1.5 * real[0] < real[1]
    (planned,) = world1.run(moments, settings | {"align": settings["align"] | {"offload": []}}, 2)
    assert planned == [real[1]] * 2


def copies_in_fp8(settings: dict) -> tuple[int, int]:
    """Runs on a rank with Transformer Engine: what its modules keep of their weights in FP8, and what is planned."""
    from test_step_memory import peak

    from megavlm.config.settings import Settings
    from megavlm.plan import further_memory, step_memory

    seen = []

    def of_step(vlm, optimizers, objective, rows, window, where):
        from megavlm.training.step import Step

        step = Step(vlm, optimizers, step_memory.RowsAtHand(vlm, rows), len(rows), objective, window)
        step.gradients(step.feed.rows(len(rows)))
        kept = [
            one
            for chunk in vlm.language
            for module in chunk.modules()
            for one in getattr(module, "_fp8_workspaces", {}).values()
        ]
        storages = {}
        for one in kept:
            for value in one.get_metadata().values():
                if isinstance(value, torch.Tensor):
                    storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        fp8 = Settings(**settings).train.fp8
        planned = [further_memory.fp8_bytes(w.shape, fp8) for w in further_memory._multiplied(vlm)]
        seen.append((sum(storages.values()), sum(planned)))

    before, step_memory.peak_of = step_memory.peak_of, of_step
    try:
        peak(settings, 1, 1)
    finally:
        step_memory.peak_of = before
    return seen[0]


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_copies_in_fp8(recipe, wide, te_world):  # noqa: F811
    settings = settings_of(wide[0], {}, precision="fp8", fp8=RECIPES[recipe])
    settings["model"] |= {"kernels": "te", "load": "random"}
    settings["data"]["max_pixels"] = 96 * 96
    ((real, planned),) = te_world(1).run(copies_in_fp8, settings)
    assert real > 0
    assert planned == real


def beside_servers(settings: dict, world: int) -> tuple[list[int], list[int]]:
    """As it is planned: what each stage holds besides what is trained; and as it is told with few layers."""
    from megavlm.config.settings import Settings
    from megavlm.convert.hf_shapes import model_shapes
    from megavlm.plan.mix import Mix
    from megavlm.plan.stage import Layout, rough_stages_of, stages_of

    settings = Settings(**settings)
    shapes = model_shapes(settings.model)
    layout = Layout(settings, shapes, "grpo", world, Mix.of(settings, shapes, answers=2), 4, 1.0)
    with alone():
        return tuple(
            [stage.static.others for stage in stages] for stages in (stages_of(layout), rough_stages_of(layout, 2**62))
        )


@pytest.mark.parametrize(
    ("pipeline", "devices", "with_server"),
    [(1, [6, 7], [0]), (2, [6, 7], [1]), (2, [], [0]), (4, [4, 5], [2]), (4, [1, 3], [0, 1]), (2, [9], [])],
)
def test_a_stage_has_the_server_that_is_on_any_of_its_ranks(pipeline, devices, with_server, toys, world1, tmp_path):
    config = json.loads((toys.folder("dense") / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 16  # so many that stages in the middle are alike
    (tmp_path / "config.json").write_text(json.dumps(config))
    settings = settings_of(tmp_path, {"pipeline": pipeline}, **BF16)
    settings["model"]["load"] = "none"
    del settings["train"]["global_batch_size"]
    vllm = {"devices": devices, "servers": len(devices) or 1}
    settings |= {"align": {"beta": 0}, "rollout": {"prompts": 8, "max_new_tokens": 64, "engine": "vllm", "vllm": vllm}}
    ((planned, rough),) = world1.run(beside_servers, settings, 8)
    assert [stage for stage, size in enumerate(planned) if size] == with_server
    # Few layers stand for all of them: stages in the middle are one, and no stage is told to have less than it has.
    assert all(told for told, size in zip(rough, planned, strict=True) if size)
    assert bool(rough[-1]) == bool(planned[-1])
