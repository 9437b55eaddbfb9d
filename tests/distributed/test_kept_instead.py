"""What a layout would need with less computed again or interleaved, told by one plan, beside plans of these forms."""

from dataclasses import replace

import pytest
from parity import settings_of
from test_dry_run import alone

CASES = {
    "PP2": (2, "dense-untied", {"pipeline": 2}, "portable"),
    "experts, EP2 × PP2": (4, "moe", {"expert": 2, "pipeline": 2}, "portable"),
    "PP2, te": (2, "dense-untied", {"pipeline": 2}, "te"),
    "experts, EP2 × PP2, te": (4, "moe", {"expert": 2, "pipeline": 2}, "te"),
}
ATTENTION = ("core_attn", True, 1)  # which Transformer Engine does not compute again
FORMS = [("none", True, 1), ("none", False, 1), ("full", True, 2), ("none", False, 2)]

RECOMPUTE = {"core_attn": ["core_attn"]}


def planned(sections: dict, world: int) -> tuple[dict, dict]:
    """The memory that is told of each form, and that of its own plan."""
    from megavlm.config.settings import Settings
    from megavlm.convert.hf_shapes import model_shapes
    from megavlm.plan.gpus import gpu_of
    from megavlm.plan.mix import Mix
    from megavlm.plan.plan import make_plan

    settings = Settings(**sections)
    shapes = model_shapes(settings.model)
    shapes = replace(shapes, text=replace(shapes.text, layers=28), vision=replace(shapes.vision, layers=32))
    mix = Mix.of(settings, shapes, pictures=16)
    forms = FORMS if settings.model.kernels == "te" else [ATTENTION, *FORMS]

    def plan(decoder: str, tower: bool, chunks: int):
        own = settings.model_copy(
            update={
                "train": settings.train.model_copy(update={"recompute": RECOMPUTE.get(decoder, decoder)}),
                "vision": settings.vision.model_copy(update={"recompute": tower}),
                "parallel": settings.parallel.model_copy(update={"virtual_pipeline": chunks if chunks > 1 else None}),
            }
        )
        return make_plan(own, shapes, "sft", world, gpu_of("h100"), mix=mix, exact=False)

    with alone():
        return plan("full", True, 1).needs, {form: max(s.total for s in plan(*form).stages) for form in forms}


@pytest.mark.parametrize("case", CASES)
def test_one_plan_tells_what_its_other_forms_would_need(case, toys, world1) -> None:
    world, kind, parallel, kernels = CASES[case]
    settings = settings_of(toys.folder(kind), parallel, moe=kind == "moe", precision="bf16", optimizer="adam")
    settings["model"] |= {"load": "none", "kernels": kernels}
    settings["data"] |= {"max_pixels": 96 * 96, "seq_length": 1024}
    settings["train"]["global_batch_size"] = 8
    ((told, own),) = world1.run(planned, settings, world)
    for form, memory in own.items():
        # A search leaves a form out that is told to need 3 % more than there is.
        assert told[form] == pytest.approx(memory, rel=0.03), form
    assert (ATTENTION in told) == (kernels == "portable")
    attention, tower = [("none", True, 1), ATTENTION], [("none", False, 1), ("none", True, 1)]
    for more, less in (attention, tower) if kernels == "portable" else (tower,):
        assert told[more] - told[less] == pytest.approx(own[more] - own[less], rel=0.1), (more, less)
