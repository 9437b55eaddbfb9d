"""The memory check changes no number of the training, on any rank; and one that does not fit says what to do."""

import random
import resource
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from packed import packed_rows
from parity import ROWS, mostly_slow, settings_of
from pool import RankError

# name: (processes, model, parallel settings, other settings)
LAYOUTS = {
    "one process, bf16": (1, "dense", {}, {"precision": "bf16", "optimizer": "adam"}),
    "DP2": (2, "dense", {}, {"optimizer": "adam"}),
    "TP2": (2, "dense", {"tensor": 2}, {"optimizer": "adam"}),
    "PP2 × VPP2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}, {"optimizer": "adam", "recompute": "full"}),
    "PP2, a part is unfrozen later": (
        2,
        "dense",
        {"pipeline": 2},
        {"optimizer": "adam", "freeze": ("vision", "language"), "unfreeze_after": {"language": 2}},
    ),
    "DP2, galore": (2, "dense", {}, {"optimizer": "galore", "galore_rank": 8, "precision": "bf16"}),
    "MoE EP2": (2, "moe", {"expert": 2}, {"moe_aux_loss_coeff": 0.01}),
}


def train(folder, checkpoint, root, records, settings, memory_check: bool, address_space: int | None = None):
    """Runs on every rank: two steps. ``address_space``: bytes that the memory check may add to this process's.

    Returns what the memory check said, losses and norms, weights and Adam's state after the steps, random numbers drawn
    after them, and whether the memory check left a gradient.
    """
    from megavlm import platform
    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.training.memory_check import check_memory, longest_row
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    settings = Settings(**settings)
    groups = platform.init(settings.parallel)
    vlm = VLM(Shapes.from_hf(folder), settings, groups).train()
    load_weights(checkpoint, vlm)
    make_longest = partial(longest_row, Renderer(folder, settings.data, settings.pad_multiple))
    rows = packed_rows(folder, root, records, settings, ROWS) if groups.is_leader else []
    each = len(ROWS) // groups.dp_size
    mine = rows[groups.dp_rank * each : (groups.dp_rank + 1) * each]
    feed = Feed(vlm, iter(mine * 2) if groups.is_leader else None)
    optimizers = Optimizers(vlm, settings.train)
    step = Step(vlm, optimizers, feed, each, CrossEntropy(["data"], settings.train.logprob_chunk_tokens))
    said, left = None, False
    if memory_check:
        before = resource.getrlimit(resource.RLIMIT_AS)
        if address_space is not None:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + address_space, before[1]))
        try:
            said = check_memory([step], make_longest if groups.is_leader else None, settings)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
        buffers = [
            b for ddps in optimizers.ddp.values() for ddp in ddps for b in (*ddp.buffers, *ddp.expert_parallel_buffers)
        ]
        modules = (vlm.vision, vlm.projector, *vlm.language)
        frozen = [p for m in modules for p in m.parameters() if not p.requires_grad]
        left = any(buffer.grad_data.any().item() for buffer in buffers) or any(p.grad is not None for p in frozen)
        assert bool(frozen) == bool(settings.model.freeze)
    results = [step() for _ in range(2)]
    chunks = [vlm.vision, vlm.projector, *vlm.language]
    weights = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    inner = [part.optimizer for part in optimizers.optimizer.chained_optimizers]
    moments = [torch.as_tensor(v) for o in inner for state in o.state.values() for v in state.values()]
    draws = (random.random(), np.random.rand(), torch.rand(1).item())
    return said, [(r.loss, r.lr, r.norms, r.counts) for r in results], weights + moments, draws, left


def settings_for(folder, kind, parallel, **train_settings):
    settings = settings_of(folder, parallel, moe=kind == "moe", **train_settings)
    settings["data"]["max_pixels"] = 32 * 32 * 64
    return settings


@pytest.mark.parametrize(
    "layout",
    mostly_slow(LAYOUTS, {"TP2", "PP2 × VPP2", "PP2, a part is unfrozen later", "MoE EP2"}.__contains__),
)
def test_the_numbers_are_the_same_with_and_without(layout, toys, request):
    size, kind, parallel, train_settings = LAYOUTS[layout]
    world, folder = request.getfixturevalue(f"world{size}"), toys.folder(kind)
    arguments = folder, toys.checkpoint(kind), toys.root, toys.records
    arguments = *arguments, settings_for(folder, kind, parallel, **train_settings)
    without, said_by = world.run(train, *arguments, False), []
    for (said, *numbers, left), (_, *expected, _) in zip(world.run(train, *arguments, True), without, strict=True):
        assert numbers[0] == expected[0]
        assert all(torch.equal(x, y) for x, y in zip(numbers[1], expected[1], strict=True))
        assert numbers[2] == expected[2]
        assert not left
        said_by.append(said)
    # 64 + 2, 64 + 2, 64 + 2 and 56 + 2 tokens: three pictures of the largest size and one in the room that is left
    rows = 4 // (size // (parallel.get("tensor", 1) * parallel.get("pipeline", 1)))  # all of a rank's: one window
    assert said_by[0].startswith(f"memory check: {rows} × 256 tokens, 248 of them visual")


def draw_inside():
    from megavlm import platform
    from megavlm.config.settings import ParallelSettings
    from megavlm.training.memory_check import _same_random_numbers

    platform.init(ParallelSettings())
    draw = lambda: (random.random(), np.random.rand(), torch.rand(1).item())
    drawn = []
    with _same_random_numbers():
        drawn.append(draw())
    return [*drawn, draw()]


def test_random_numbers_drawn_in_it_come_again(world1):
    ((inside, after),) = world1.run(draw_inside)
    assert inside == after


def test_a_row_too_large_names_the_settings_that_help(toys, world1):
    folder = toys.folder("dense")
    settings = settings_for(folder, "dense", {}, optimizer="adam", logprob_chunk_tokens=128, vision={"recompute": True})
    settings["data"]["seq_length"] = 8192  # one sample: on a CPU its attention alone takes gigabytes
    arguments = folder, toys.checkpoint("dense"), toys.root, toys.records, settings
    with pytest.raises(RankError) as caught:
        world1.run(train, *arguments, True, 2**30)
    error = caught.value.exceptions[0]
    assert type(error).__name__ == "UserError"
    assert "data.seq_length = 8192" in error.message
    assert "rank 0 on " in error.message
    assert "ran out of memory after a peak of" in error.message
    assert "vision.recompute" not in error.remedy  # set already
    names = ["train.recompute=full", "parallel.tensor", "data.seq_length", "train.logprob_chunk_tokens"]
    places = [error.remedy.find(name) for name in names]
    assert places == sorted(places)
    assert places[0] > 0
    assert "train.memory_check=false" in error.remedy
