"""Settings for speed on Transformer Engine's own Python: gradients added in the products, recomputed modules, GELU."""

import pytest
import te_cpu
from parity import train_layout
from test_layouts import check, compare, row_of_table
from test_memory_check import settings_for, train
from test_reduction import Counting
from test_te_layouts import te_settings

SPEED = {
    "windows of 1": (1, "dense-untied", {}, {"vision": {"window": 1}}),
    "DP2, [mlp], windows of 1": (2, "dense", {}, {"recompute": ["mlp"], "vision": {"window": 1}}),
    "MoE EP2, [layernorm, moe_act]": (2, "moe", {"expert": 2}, {"recompute": ["layernorm", "moe_act"]}),
}


@pytest.mark.parametrize("name", SPEED)
def test_te_speed(name, toys, te_world):
    size, kind, parallel, others = SPEED[name]
    settings = te_settings(toys.folder(kind), parallel, **others)
    differences = compare(toys, Counting(te_world(size)), kind, settings, toys.reference(kind))
    print(row_of_table(name, differences))
    check(differences)


def announced(*arguments):
    """Runs on every rank: ``train_layout`` in which Megatron announces first micro-batches, as it does with FP8.

    TE then writes the weights' gradients over the buffer. Nothing is in FP8: the contexts that would begin it are left
    out, and ``fp8`` stands in the decoder's configuration from its end on.
    """
    from contextlib import nullcontext

    from megatron.core.transformer import transformer_block

    from megavlm.model.vlm import VLM

    context, train = transformer_block.get_fp8_context, VLM.train

    def with_fp8(vlm, mode=True):
        vlm.decoder_config.fp8 = "hybrid"
        return train(vlm, mode)

    transformer_block.get_fp8_context, VLM.train = lambda *args, **options: nullcontext(), with_fp8
    try:
        return *train_layout(*arguments), te_cpu.called["generic_gemm"]
    finally:
        transformer_block.get_fp8_context, VLM.train = context, train


class Announced(Counting):
    def run(self, function, *arguments):
        assert function is train_layout
        ranks = self.world.run(announced, *arguments)
        assert all(products for *_, products in ranks)
        return [(steps, pieces) for steps, pieces, _ in ranks]


@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2}], ids=["one process", "PP2"])
def test_the_buffer_is_written_over_once_a_step(parallel, toys, te_world):
    """Not once a window, which would lose the gradients of earlier ones without a word."""
    settings = te_settings(toys.folder("dense"), parallel, vision={"window": 1})
    world = Announced(te_world(2 if parallel else 1))
    check(compare(toys, world, "dense", settings, toys.reference("dense")))


def test_the_memory_check_of_a_part_that_is_unfrozen_later(toys, te_world):
    """It has no gradient buffer yet, into which TE's layers would add."""
    folder, freeze = toys.folder("dense"), ("language",)
    settings = settings_for(folder, "dense", {}, optimizer="adam", freeze=freeze, unfreeze_after={"language": 1})
    settings["model"]["kernels"] = "te"
    arguments = folder, toys.checkpoint("dense"), toys.root, toys.records, settings
    ((said, *_, left),) = te_world(1).run(train, *arguments, True)
    assert said.startswith("memory check: 4 × 256 tokens")
    assert not left
