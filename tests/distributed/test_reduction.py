"""Gradients reduced during the backward pass, steps of several windows, and modules that are recomputed."""

import pytest
import torch
from parity import settings_of, train_layout
from test_checkpoint import DP2, adam, run
from test_layouts import check, compare, row_of_table

REDUCED = {
    "DP2, windows of 1": (2, "dense", {}, {"vision": {"window": 1}}),
    "PP2 × DP2, windows of 1": (4, "dense", {"pipeline": 2}, {"vision": {"window": 1}}),
    "PP2 × VPP2, windows of 2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}, {"vision": {"window": 2}}),
    "DP2, not overlapped": (2, "dense", {}, {"vision": {"window": 1}, "overlap": {"gradients": False}}),
}
RECOMPUTED = {
    "TP2, [core_attn, mlp]": ("dense", {"tensor": 2}, {"recompute": ["core_attn", "mlp"]}),
    "MoE EP2, [moe]": ("moe", {"expert": 2}, {"recompute": ["moe"]}),
}


def in_small_buckets(*arguments):
    """Runs on every rank: ``train_layout`` with gradients reduced some 50 at a time, and how often that happened."""
    from megatron.core.distributed import param_and_grad_buffer

    from megavlm.optim.optimizers import Optimizers

    group = param_and_grad_buffer._ParamAndGradBucketGroup
    start, register, starts, running = group.start_grad_sync, group.register_grad_ready, [], []

    def counted(self, **options):
        starts.append(bool(running))
        return start(self, **options)

    def ready(self, *arguments):
        running.append(1)
        register(self, *arguments)
        running.pop()

    Optimizers.bucket_size = 3000
    group.start_grad_sync, group.register_grad_ready = counted, ready
    try:
        return *train_layout(*arguments), starts
    finally:
        Optimizers.bucket_size = None
        group.start_grad_sync, group.register_grad_ready = start, register


class Counting:
    """A world whose ranks run ``in_small_buckets``; ``starts``: of each rank, whether backward started a reduction."""

    def __init__(self, world):
        self.world, self.starts = world, []

    def run(self, function, *arguments):
        assert function is train_layout
        ranks = self.world.run(in_small_buckets, *arguments)
        self.starts = [starts for *_, starts in ranks]
        return [(steps, pieces) for steps, pieces, _ in ranks]


@pytest.mark.parametrize("name", REDUCED)
def test_reduction_during_the_backward_pass(name, toys, request):
    """Once a step, after the last window; the first step is Megatron's to see which gradients there are."""
    size, kind, parallel, others = REDUCED[name]
    world = Counting(request.getfixturevalue(f"world{size}"))
    differences = compare(toys, world, kind, settings_of(toys.folder(kind), parallel, **others), toys.reference(kind))
    print(row_of_table(name, differences))
    check(differences)
    for starts in world.starts:
        assert any(starts) == (name != "DP2, not overlapped")


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_modules(name, toys, world2):
    kind, parallel, others = RECOMPUTED[name]
    settings = settings_of(toys.folder(kind), parallel, moe=kind == "moe", **others)
    differences = compare(toys, world2, kind, settings, toys.reference(kind))
    print(row_of_table(name, differences))
    check(differences)


class _Overwriting(torch.autograd.Function):
    """A linear layer that treats its gradient as Transformer Engine's do with ``fuse_wgrad_accumulation``."""

    @staticmethod
    def forward(ctx, x, weight, first):
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.first = weight, first
        return x @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        found = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        if ctx.first:
            ctx.weight.main_grad.copy_(found)
        else:
            ctx.weight.main_grad.add_(found)
        ctx.weight.grad_added_to_main_grad = True
        return grad @ weight, torch.empty_like(weight), None


def with_overwriting_layers(*arguments):
    """Runs on every rank: ``train_layout`` whose linear layers write over the buffer in their first micro-batch.

    ``fp8`` in the decoder's configuration lets Megatron announce it; plain layers do not read it.
    """
    from megatron.core.tensor_parallel import RowParallelLinear

    from megavlm.model.vlm import VLM

    forward, train = RowParallelLinear.forward, VLM.train

    def overwriting(self, x):
        if self.bias is not None:  # of the tower
            return forward(self, x)
        first, self.is_first_microbatch = getattr(self, "is_first_microbatch", True), False
        return (
            _Overwriting.apply(x, self.weight, first) if hasattr(self.weight, "main_grad") else x @ self.weight.t()
        ), None

    def trained(vlm, mode=True):
        vlm.decoder_config.fp8 = "hybrid"
        for module in (m for chunk in vlm.language for m in chunk.modules()):
            if isinstance(module, RowParallelLinear):
                module.is_first_microbatch = True
        return train(vlm, mode)

    RowParallelLinear.forward, VLM.train = overwriting, trained
    try:
        return train_layout(*arguments)
    finally:
        RowParallelLinear.forward, VLM.train = forward, train


def with_padded_frames(*arguments):
    """Runs on every rank: ``train_layout`` whose tower fills up its chunks as for FP8, in plain layers."""
    from megavlm.model.vlm import VLM

    train = VLM.train

    def trained(vlm, mode=True):
        vlm.vision.config.fp8 = "hybrid"
        return train(vlm, mode)

    VLM.train = trained
    try:
        return train_layout(*arguments)
    finally:
        VLM.train = train


class Padded(Counting):
    """A world whose ranks run ``with_padded_frames``."""

    def run(self, function, *arguments):
        return self.world.run(with_padded_frames, *arguments)


def test_frames_are_filled_up_for_fp8(toys, world1):
    settings = settings_of(toys.folder("dense"), {}, vision={"chunk_patches": 64})
    check(compare(toys, Padded(world1), "dense", settings, toys.reference("dense")))


class Overwriting(Counting):
    """A world whose ranks run ``with_overwriting_layers``."""

    def run(self, function, *arguments):
        return self.world.run(with_overwriting_layers, *arguments)


def test_a_layer_writes_over_the_buffer_once_a_step(toys, world1):
    """Not once a window, which would lose the gradients of earlier ones without a word."""
    settings = settings_of(toys.folder("dense-untied"), {}, vision={"window": 1})
    check(compare(toys, Overwriting(world1), "dense-untied", settings, toys.reference("dense-untied")))


def continued_in_small_buckets(*arguments, **options):
    """Runs on every rank: ``run`` of test_checkpoint with gradients reduced, and Adam's state divided, in pieces."""
    from megavlm.optim.optimizers import Optimizers

    Optimizers.bucket_size = 3000
    try:
        return run(*arguments, **options)
    finally:
        Optimizers.bucket_size = None


def test_adam_continues_on_the_same_bits(toys, tmp_path, world2):
    """Its state is divided among ranks piece by piece; a run with other pieces continues, too."""
    toy = toys.folder("dense"), toys.checkpoint("dense"), toys.root, toys.records
    settings = adam(toy, DP2)
    straight = world2.run(continued_in_small_buckets, *toy, settings, tmp_path, steps=3, save_at=[2])
    checkpoint = tmp_path / "step_00000002"
    resumed = world2.run(continued_in_small_buckets, *toy, settings, tmp_path, steps=3, restore=checkpoint)
    for (metrics, weights, *_), (late_metrics, late_weights, *_) in zip(straight, resumed, strict=True):
        assert late_metrics == metrics[2:]
        assert all(torch.equal(x, y) for x, y in zip(weights, late_weights, strict=True))
    others = world2.run(run, *toy, settings, tmp_path, steps=3, restore=checkpoint)
    assert others[0][0][0] == pytest.approx(straight[0][0][2], rel=1e-5)  # norms are summed in another order
