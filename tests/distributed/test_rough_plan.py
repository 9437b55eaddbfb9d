"""What a search tells of a layout by few layers and few experts, beside what all of them tell."""

from dataclasses import replace

import pytest
from parity import settings_of
from test_dry_run import alone

BF16 = {"precision": "bf16", "optimizer": "adam"}
# name: (processes, toy, parallel settings, options of settings_of)
CASES = {
    "PP2, uneven": (2, "dense-untied", {"pipeline": 2, "last_stage_layers": 13}, {}),
    "inputs on the host, PP2": (2, "dense-untied", {"pipeline": 2}, {"recompute": "full", "offload_activations": True}),
    "experts, state on the host": (4, "moe", {}, {"offload_optimizer": True, "adam_moments": "bf16"}),
    "experts, EP2 × PP2, recomputed": (4, "moe", {"expert": 2, "pipeline": 2}, {"recompute": "full"}),
}


def both(cases: dict) -> dict:
    """For each case, of a rough and of an exact plan: seconds without the update, bytes, and work in the decoder."""
    from megavlm.config.settings import Settings
    from megavlm.convert.hf_shapes import model_shapes
    from megavlm.optim import stored_adam
    from megavlm.plan import all_layers, stage
    from megavlm.plan.gpus import gpu_of
    from megavlm.plan.mix import Mix
    from megavlm.plan.plan import make_plan
    from megavlm.plan.stage import Layout

    found = {}
    with alone(), pytest.MonkeyPatch.context() as patch:
        for module in (stored_adam, all_layers):  # else a toy's whole state is on the device at once
            patch.setattr(module, "AT_A_TIME", 2**16)
        for name, (sections, world) in cases.items():
            settings = Settings(**sections)
            shapes = model_shapes(settings.model)
            text = shapes.text
            if text.moe is not None:
                text = replace(text, moe=replace(text.moe, num_experts=32))
            shapes, mix = replace(shapes, text=replace(text, layers=28)), Mix.of(settings, shapes, pictures=1)
            plans, parts, few = [], [], stage.fewer_experts
            for exact in (False, True):
                stage.fewer_experts = (lambda shapes, parallel: shapes) if exact else few  # all experts are run
                plan = make_plan(settings, shapes, "sft", world, gpu_of("h100"), mix=mix, imbalance=1.0, exact=exact)
                layout = Layout(settings, shapes, "sft", world, mix, plan.rows, 1.0)
                first = stage.stage_of(layout, 0) if exact else stage.rough_stages_of(layout, 2**60)[0]
                plans.append(plan)
                parts.append(first.operators.parts)
            stage.fewer_experts = few
            work = [
                {
                    (part, kind): (
                        sum(n * call.flops for call, n in counts[part].items() if call.kind == kind),
                        sum(n * call.moved for call, n in counts[part].items() if call.kind == kind),
                    )
                    for part in ("forward", "backward")
                    for kind in ("product", "attention", "elementwise", "collective")
                }
                for counts in parts
            ]
            updates = [
                {
                    (part, kind): sum(n * call.moved for call, n in counts[part].items() if call.kind == kind)
                    for part in ("reduction", "overlapped", "optimizer")
                    for kind in ("elementwise", "collective", "host")
                }
                for counts in parts
            ]
            update = [plan.time.parts["reduction"] + plan.time.parts["optimizer"] for plan in plans]
            found[name] = (
                [
                    (plan.time.seconds - seconds, max(s.total for s in plan.stages))
                    for plan, seconds in zip(plans, update, strict=True)
                ],
                work,
                updates,
            )
    return found


@pytest.mark.parametrize("name", CASES)
def test_few_layers_and_experts_tell_of_all(name, toys, world1) -> None:
    world, kind, parallel, options = CASES[name]
    settings = settings_of(toys.folder(kind), parallel, **BF16, **options, moe=kind == "moe")
    settings["model"]["load"], settings["data"]["max_pixels"] = "none", 96 * 96
    settings["train"]["global_batch_size"] = 8
    (found,) = world1.run(both, {name: (settings, world)})
    (rough, exact), (few, whole), (some, every) = found[name]
    # Padding of Megatron's buffers, and the last stage's place in uneven ones, are told by few layers.
    assert rough[1] == pytest.approx(exact[1], rel=0.03)
    # Reduction and update are left out: in a toy, calls take longer than work there, and few weights have few calls.
    assert rough[0] == pytest.approx(exact[0], rel=0.05)
    # The router has a column for each expert, which in a toy of 32 experts is 3 % of the products.
    for (part, kind), (flops, moved) in whole.items():
        assert few[part, kind][0] == pytest.approx(flops, rel=0.04), (part, kind)
        assert few[part, kind][1] == pytest.approx(moved, rel=0.1 if kind == "elementwise" else 0.02), (part, kind)
    # Other ranks share gradients of experts than of the rest. Few layers do not tell how Megatron pads its buffers.
    assert (every["optimizer", "host"] > 0) == ("state" in name)
    for key, moved in every.items():
        assert some[key] == pytest.approx(moved, rel=0.07), key
