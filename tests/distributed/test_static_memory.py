"""Weights, gradients and optimizer state: of a rank without memory, byte for byte what a real rank allocates."""

import pytest
import torch
from parity import ROWS, mostly_slow, settings_of
from test_dry_run import alone

# name: (processes, toy, parallel settings, options of settings_of, section adapter)
BF16, ADAM = {"precision": "bf16", "optimizer": "adam"}, {"optimizer": "adam"}
LORA = {"type": "lora", "rank": 4}
FROZEN = ("vision", "projector")
LAYOUTS = {
    "one process": (1, "dense", {}, BF16, {}),
    "one process, untied, float32": (1, "dense-untied", {}, ADAM, {}),
    "DP2": (2, "dense", {}, BF16, {}),
    "TP2": (2, "dense-untied", {"tensor": 2}, BF16, {}),
    "PP2 × VPP2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}, BF16, {}),
    "CP2, tower frozen": (2, "dense", {"context": 2}, {**BF16, "freeze": FROZEN}, {}),
    "DP2, unfrozen later": (2, "dense", {}, {**BF16, "freeze": FROZEN, "unfreeze_after": {"projector": 1}}, {}),
    "DP2, SGD": (2, "dense", {}, {"precision": "bf16", "optimizer": "sgd"}, {}),
    "DP2, GaLore": (2, "dense", {}, {"precision": "bf16", "optimizer": "galore", "galore_rank": 8}, {}),
    "MoE EP2": (2, "moe", {"expert": 2}, BF16, {}),
    "DP2, state on the host": (2, "dense", {}, {**BF16, "offload_optimizer": True}, {}),
    "EP2, moments in bf16": (2, "moe", {"expert": 2}, {**BF16, "adam_moments": "bf16"}, {}),
    "DP2, LoRA": (2, "dense", {}, BF16, LORA),
    "4 bits": (1, "dense", {}, BF16, {**LORA, "quantize": "nf4"}),
    "4 bits, scales too": (1, "moe", {}, BF16, {**LORA, "quantize": "nf4_double"}),
}
QUICK = {"PP2 × VPP2", "MoE EP2", "DP2, unfrozen later", "4 bits", "DP2, state on the host"}


def real(folder, checkpoint, root, records, settings):
    """Runs on every rank: what ``StaticCount`` counts after the steps, and what is alive of all that was allocated."""
    import gc

    from packed import packed_rows

    from megavlm.config.settings import Settings
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.runtime.session import start
    from megavlm.tracing.live_memory import LiveMemory
    from megavlm.tracing.static_memory import StaticCount
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    settings = Settings(**settings)
    with LiveMemory(torch.device("cpu")) as memory:
        session = start(settings, training=True)
        groups = session.groups
        rows = packed_rows(folder, root, records, settings, ROWS) if groups.is_leader else []
        each = len(ROWS) // groups.dp_size
        mine = rows[groups.dp_rank * each : (groups.dp_rank + 1) * each]
        optimizers = Optimizers(session.vlm, settings.train)
        feed = Feed(session.vlm, iter(mine * settings.train.steps) if groups.is_leader else None)
        step = Step(session.vlm, optimizers, feed, each, CrossEntropy(["data"], 64))
        for number in range(1, settings.train.steps + 1):
            optimizers.unfreeze(number)
            step()
        del feed, step, rows, mine
        packed_rows.__globals__["_packed"].cache_clear()
        gc.collect()
        alive = memory.live
    return StaticCount()(session.vlm, optimizers), alive


def planned(settings, world: int):
    """The same of each rank, without its memory and without the others."""
    from megavlm.align.registry import make_method
    from megavlm.config.settings import Settings
    from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent
    from megavlm.tracing.static_memory import StaticCount, make_state

    settings, found = Settings(**settings), []
    with alone():
        for rank in range(world):
            method = make_method("sft", settings)
            with absent_rank(that_can_be_absent(settings), method, rank, world, at_end=True) as (_, (model,)):
                make_state(model.optimizers)
                found.append(StaticCount()(model.vlm, model.optimizers))
    return found


@pytest.mark.parametrize("layout", mostly_slow(LAYOUTS, QUICK.__contains__))
def test_each_rank_holds_what_was_planned(layout, toys, request, world1):
    size, kind, parallel, options, adapter = LAYOUTS[layout]
    if adapter.get("quantize"):
        pytest.importorskip("bitsandbytes")
    folder = toys.folder(kind)
    settings = settings_of(folder, parallel, **options, moe=kind == "moe")
    settings["model"]["load"] = str(toys.checkpoint(kind))
    settings["adapter"], settings["train"]["steps"] = adapter, 2 if "later" in layout else 1
    arguments = folder, toys.checkpoint(kind), toys.root, toys.records, settings
    measured = request.getfixturevalue(f"world{size}").run(real, *arguments)
    (expected,) = world1.run(planned, settings, size)
    for (counted, alive), plan in zip(measured, expected, strict=True):
        assert plan == counted
        # The count leaves nothing out. What is alive besides: Megatron's buffer for gathered rows with TP, the last
        # hidden states that its interleaved schedule has held, the last routing of each dispatcher, and numbers of
        # steps; together less than six rows of 256 tokens of width 128 in bf16.
        assert 0 <= alive - counted.total - counted.on_host < 6 * 256 * 128 * 2, (alive, counted)
        assert (counted.on_host > 0) == ("host" in layout)
