"""A step that is not finite anywhere is skipped everywhere, as if its rows had never been; its samples are named."""

import copy
import math
from pathlib import Path

import pytest
import torch
from parity import settings_of

# name: (processes, model, parallel settings, other settings, what is wrong)
CASES = {
    "a patch, one process": (1, "dense", {}, {"optimizer": "adam", "precision": "bf16"}, "patch"),
    "a patch, DP2": (2, "dense", {}, {"optimizer": "adam", "clip_grad": 1.0}, "patch"),
    "a patch, TP2": (2, "dense", {"tensor": 2}, {}, "patch"),
    "a patch, PP2 × VPP2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}, {"optimizer": "adam"}, "patch"),
    "a patch, MoE EP2": (2, "moe", {"expert": 2}, {"optimizer": "adam"}, "patch"),
    "a weight, DP2": (2, "dense", {}, {"optimizer": "adam"}, "weight"),
    "a patch, decoder frozen": (1, "dense", {}, {"freeze": ("language",)}, "patch"),
}
GOOD = ((0, 1, 2), (3, 5)), ((7,), (0, 5))  # two steps of two rows, as places in the toy records
BAD = ((3, 7), (4, 6))  # a step between them, whose last row gets the bad number


def train(folder: Path, checkpoint: Path, root: Path, records: list[dict], settings: dict, wrong: str | None):
    """Runs on every rank. Returns the steps' results, and weights, Adam's moments and steps of the schedule after them.

    ``wrong``: what the step in the middle has; None: there is none in the middle.
    """
    from megavlm import platform
    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.media.files import in_folder
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    settings = Settings(**settings)
    groups = platform.init(settings.parallel)
    vlm = VLM(Shapes.from_hf(folder), settings, groups).train()
    load_weights(checkpoint, vlm)
    if wrong == "weight":
        records = copy.deepcopy(records)
        records[4]["messages"][-1]["weight"] = 1e38  # a float32 each, but not their sum
    renderer = Renderer(folder, settings.data)
    samples = [renderer.encode(r, in_folder(root), f"record {i}", kind="tune", index=i) for i, r in enumerate(records)]
    steps = [GOOD[0], *([BAD] if wrong else []), GOOD[1]]
    each = 2 // groups.dp_size
    rows = [
        renderer.pack([samples[i] for i in row])
        for step in steps
        for row in step[groups.dp_rank * each : (groups.dp_rank + 1) * each]
    ]
    for row in rows:
        if wrong == "patch" and row.indices[0] == 4:  # the weight of the position of this sample's last patch
            row.pos_weight[int(samples[4].frame_grids.prod(dim=1).sum()) - 1, 0] = math.nan
    feed = Feed(vlm, iter(rows) if groups.is_leader else None)
    optimizers = Optimizers(vlm, settings.train)
    step = Step(vlm, optimizers, feed, each, CrossEntropy(["data"], settings.train.logprob_chunk_tokens))
    results = [step() for _ in steps]
    chunks = [vlm.vision, vlm.projector, *vlm.language]
    weights = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    inner = [part.optimizer for part in optimizers.optimizer.chained_optimizers]
    moments = [torch.as_tensor(v) for o in inner for state in o.state.values() for v in state.values()]
    return results, weights + moments, optimizers.scheduler.num_steps


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_leaves_no_trace(case, toys, request):
    size, kind, parallel, train_settings, wrong = CASES[case]
    world, train_settings = request.getfixturevalue(f"world{size}"), dict(train_settings)
    freeze = train_settings.pop("freeze", ())
    if train_settings.get("optimizer") == "adam":
        train_settings |= {"schedule": "cosine", "warmup_steps": 2, "lr": 1e-3}
    folder = toys.folder(kind)
    settings = settings_of(folder, parallel, freeze=freeze, moe=kind == "moe", **train_settings, global_batch_size=2)
    arguments = folder, toys.checkpoint(kind), toys.root, toys.records, settings
    without = world.run(train, *arguments, None)
    for (results, state, steps), (expected, expected_state, _) in zip(
        world.run(train, *arguments, wrong), without, strict=True
    ):
        assert [result.trouble is not None for result in results] == [False, True, False]
        assert not math.isfinite(results[1].loss)
        assert [(r.loss, r.lr, r.norms) for r in results[::2]] == [(r.loss, r.lr, r.norms) for r in expected]
        assert len(state) == len(expected_state)
        assert all(torch.equal(x, y) for x, y in zip(state, expected_state, strict=True))
        assert steps == 2
        trouble = results[1].trouble
        parts = "vision, projector" if freeze else "vision, projector, language"
        if wrong == "patch":
            assert f"the loss and the gradient of {parts} are NaN or infinite" in trouble
        suspects = "samples of rows whose own loss is NaN or infinite: record 4, record 6"
        assert f"{suspects}; other samples of the step: record 3, record 7" in trouble


def read_with_one_bad_rank(bad_rank: int, weight: float = 3.0):
    from megavlm.optim.grad_stats import read_grad_stats
    from megavlm.platform.cpu import install

    install()
    here = torch.distributed.get_rank() == bad_rank
    squares = torch.tensor([4.0, math.inf if here else 9.0, 0.0])
    return read_grad_stats(torch.tensor([6.0, 2.5]), weight, squares)


def test_one_rank_speaks_for_all(world2):
    for stats in world2.run(read_with_one_bad_rank, 1):
        assert stats.non_finite == ["projector"]
        assert stats.loss == 2.0
        assert stats.sums == [6.0, 2.5]
    for stats in world2.run(read_with_one_bad_rank, 5):
        assert stats.non_finite == []
        assert stats.norms["grad_norm"] == pytest.approx(13**0.5)
    for stats in world2.run(read_with_one_bad_rank, 5, weight=math.inf):  # it would make a loss and a gradient of 0
        assert stats.non_finite == ["loss"]
