"""The peak of a step, put together from one micro-batch and few layers, against the same step with all of them."""

from dataclasses import replace

import pytest
import torch
from parity import mostly_slow, settings_of
from test_dry_run import alone

LAYERS, TOWER_LAYERS = 28, 10
# name: (processes, toy, parallel settings, options of settings_of, section adapter, rows of a window)
CASES = {
    "one process": (1, "dense", {}, {}, {}, 3),
    "text is long": (1, "dense-untied", {}, {"seq_length": 512}, {}, 1),
    "recomputed layers": (1, "dense", {}, {"recompute": "full"}, {}, 2),
    "inputs of layers on the host": (1, "dense", {}, {"recompute": "full", "offload_activations": True}, {}, 2),
    "recomputed MLPs and tower": (1, "dense", {}, {"recompute": ["mlp"], "vision": {"recompute": True}}, {}, 2),
    "small chunks": (1, "dense", {}, {"recompute": "full", "vision": {"chunk_patches": 144}}, {}, 1),
    "frozen tower": (1, "dense", {}, {"freeze": ("vision",)}, {}, 2),
    "LoRA": (1, "dense", {}, {"freeze": ("vision", "projector")}, {"type": "lora", "rank": 4}, 2),
    "experts": (1, "moe", {}, {}, {}, 2),
    "recomputed layers with experts, EP2": (2, "moe", {"expert": 2}, {"recompute": "full"}, {}, 2),
    "TP2": (2, "dense", {"tensor": 2}, {}, {}, 2),
    "CP2": (2, "dense", {"context": 2}, {"recompute": "full"}, {}, 2),
    "PP2": (2, "dense", {"pipeline": 2}, {}, {}, 6),
    "PP3, uneven": (3, "dense", {"pipeline": 3, "first_stage_layers": 7, "last_stage_layers": 8}, {}, {}, 6),
    "PP3, features on two stages": (3, "dense", {"pipeline": 3, "first_stage_layers": 2}, {}, {}, 6),
    "PP3, few layers at both ends": (
        3, "dense", {"pipeline": 3, "first_stage_layers": 4, "last_stage_layers": 5}, {}, {}, 6,
    ),
    "as TE keeps it": (1, "dense", {}, {"precision": "bf16"}, {}, 2),
    "as TE keeps it, PP2, recomputed MLPs": (
        2, "dense", {"pipeline": 2}, {"precision": "bf16", "recompute": ["mlp"]}, {}, 6,
    ),
    "as TE keeps it, experts": (1, "moe", {}, {"precision": "bf16"}, {}, 2),
    "PP2 × VPP2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}, {}, {}, 8),
    "PP2, inputs of layers on the host": (
        2, "dense", {"pipeline": 2}, {"recompute": "full", "offload_activations": True}, {}, 4,
    ),
    "PP2 × VPP2, inputs of layers on the host": (
        2, "dense", {"pipeline": 2, "virtual_pipeline": 2}, {"recompute": "full", "offload_activations": True}, {}, 8,
    ),
    "PP2 × VPP2, recomputed layers": (
        2, "moe", {"pipeline": 2, "virtual_pipeline": 2}, {"recompute": "full", "vision": {"recompute": True}}, {}, 4,
    ),
}  # fmt: skip
QUICK = {"as TE keeps it", "PP2, inputs of layers on the host", "PP2 × VPP2", "experts"}


def both(cases: dict) -> dict:
    """For each case, for each stage: the peak told by few layers, that of the whole step, and inputs on the host."""
    from megavlm.align.registry import make_method
    from megavlm.config.settings import Settings
    from megavlm.convert.hf_shapes import model_shapes
    from megavlm.plan.mix import Mix
    from megavlm.plan.step_memory import peak_of
    from megavlm.plan.trace import trace_stage
    from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent
    from megavlm.tracing.stand_in import fewer_layers, layers_of

    found = {}
    with alone():
        for name, (sections, world, window) in cases.items():
            settings = Settings(**sections)
            fused = settings if settings.model.kernels == "te" else None
            settings = that_can_be_absent(settings)
            method, parallel, shapes = make_method("sft", settings), settings.parallel, model_shapes(settings.model)
            vision = replace(shapes.vision, layers=TOWER_LAYERS, deepstack_layers=(2, 4, 7))
            shapes = replace(shapes, vision=vision, text=replace(shapes.text, layers=LAYERS))
            row = Mix.of(settings, shapes, samples=2).row(settings, shapes)
            for stage in range(parallel.pipeline):
                rank = world // parallel.pipeline * stage
                few, fewer = fewer_layers(settings, shapes, stage)
                with absent_rank(few, method, rank, world, shapes=fewer) as (_, (one,)):
                    plain = 3 + settings.train.offload_activations
                    assert len(one.vlm.vision.layers) == 3 + plain
                    all_layers, enough = layers_of(parallel, LAYERS, stage), plain + 3 if stage == 0 else plain
                    expected = all_layers if "two stages" in name else min(all_layers, enough)
                    assert {len(chunk.decoder.layers) for chunk in one.vlm.language} == {expected}
                    memory, _ = trace_stage(one, row, row, window, shapes, parallel, stage, fused=fused)
                    told = memory.peak(stage, parallel.pipeline, window)
                with absent_rank(settings, method, rank, world, shapes=shapes) as (_, (one,)):
                    rows, where = [row] * window, torch.device("meta")
                    whole = peak_of(one.vlm, one.optimizers, one.objective, rows, window, where, fused=fused)
                inputs = memory.on_host(stage, parallel.pipeline, window) / (len(row.input_ids) * shapes.text.hidden)
                found[name, stage] = told, whole, inputs
    return found


@pytest.mark.parametrize("case", mostly_slow(CASES, QUICK.__contains__))
def test_few_layers_tell_the_peak_of_many(case, toys, world1):
    world, kind, parallel, options, adapter, window = CASES[case]
    settings = settings_of(toys.folder(kind), parallel, **options, moe=kind == "moe")
    settings["model"]["load"], settings["data"]["max_pixels"], settings["adapter"] = "none", 96 * 96, adapter
    settings["train"]["global_batch_size"] = window * world
    settings["model"]["kernels"] = "te" if "TE" in case else "portable"
    (found,) = world1.run(both, {case: (settings, world, window)})
    for told, whole, _ in found.values():
        # Messages between stages are received ahead of their use in a pipeline: up to 0.3 % of these small rows.
        assert told.total == pytest.approx(whole.total, rel=0.005), (told, whole)
    # Of a stage with 14 of the layers; two rows are between their passes on the first of two stages. In float32.
    if case == "PP2, inputs of layers on the host":
        assert [inputs for *_, inputs in found.values()] == [4 * 2 * 14, 4 * 13]  # the second one receives its first
    elif "host" not in case:
        assert not any(inputs for *_, inputs in found.values())
