"""The order in which a search plans layouts: what it leaves out is never the fastest."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megavlm.plan.gpus import gpu_of
from megavlm.search.candidate import Candidate
from megavlm.search.layouts import layouts, with_changes
from megavlm.search.order import halves, is_cut, key_of, least_seconds, rounds, smaller
from megavlm.search.search import search
from megavlm.search.work import savings

GIB = 2**30
KEPT = {"none": 16.0, "core_attn": 12.0, "full": 1.0}  # of a layer, by what is computed again


def layout(**parallel) -> dict:
    sizes = {"tensor": 1, "pipeline": 1, "context": 1, "expert": 1, "expert_tensor": 1} | parallel
    return {f"parallel.{name}": size for name, size in sizes.items()}


def test_a_layout_follows_those_that_tell_of_it() -> None:
    wide = layout(context=4, expert=8)
    assert smaller(wide) == [key_of(layout(context=size, expert=8)) for size in (1, 2)]
    assert halves(wide) == [key_of(layout(context=4, expert=size)) for size in (4, 2)]
    assert halves(layout(expert=2)) == [key_of(layout())]
    layouts_of_all = [layout(context=c, expert=e) for c in (4, 1, 2) for e in (8, 2, 1, 4)]
    seen: set[tuple] = set()
    for turn in rounds(layouts_of_all):
        for one in turn:
            assert {*smaller(one), *halves(one)} <= seen, one
        seen |= {key_of(one) for one in turn}


def test_experts_are_cut_only_where_whole_ones_do_not_divide() -> None:
    cut = layout(tensor=4, expert=8, expert_tensor=4)
    assert is_cut(cut, {key_of(layout(tensor=4, expert=32))})
    assert not is_cut(cut, {key_of(layout(tensor=4, expert=16))})
    assert not is_cut(layout(tensor=4, expert=8), {key_of(layout(tensor=4, expert=8))})


def test_the_least_seconds_of_a_layout() -> None:
    planned = Candidate({}, seconds=10.0, parts={"bubble": 2.0, "forward": 1.0, "backward": 3.0, "optimizer": 4.0})
    assert least_seconds(planned) == pytest.approx(10.0 - 1.0 - 2.0 * (1 - 3 / 4))  # nothing is computed again
    assert least_seconds(planned, 2) == pytest.approx(10.0 - 1.0 - 2.0 + 2.0 * 3 / 4 / 2)  # and half of the bubble
    assert least_seconds(planned, 2, decoder=False) == pytest.approx(9.0)
    with_tower = replace(planned, parts={**planned.parts, "tower": 1.0})
    assert least_seconds(with_tower, decoder=False, tower=True) == pytest.approx(9.5)
    assert least_seconds(Candidate({}, ruled_out="4 layers do not divide into 3 stages")) == math.inf


def test_savings_begin_with_what_saves_most(recipe) -> None:
    own, _ = recipe("8b")  # the tower is frozen
    assert [form["train.recompute"] for form in savings(own)] == ["full", "none"]
    settings = with_changes(own, {"model.kernels": "portable"})
    assert savings(settings) == [
        {"train.recompute": recompute, "vision.recompute": False} for recompute in ("full", ["core_attn"], "none")
    ]
    pretraining = with_changes(settings, {"model.freeze": []})
    assert savings(pretraining)[:3] == [
        {"train.recompute": "full", "vision.recompute": True},
        {"train.recompute": "full", "vision.recompute": False},
        {"train.recompute": ["core_attn"], "vision.recompute": True},
    ]
    own = savings(with_changes(settings, {"train.recompute": ["mlp"]}))
    assert [form["train.recompute"] for form in own] == ["full", ["mlp"], ["core_attn"], "none"]


def made_up_plan(own, gpu, world: int, scale: float) -> SimpleNamespace:
    """A plan by formulas that have the properties on which a search relies. ``scale``: activations of a layer, GiB."""
    parallel, rows = own.parallel, own.rows_per_step(world // math.prod((*sizes(own.parallel),)))
    again = own.train.recompute if isinstance(own.train.recompute, str) else own.train.recompute[0]
    passes = {"none": 3.0, "core_attn": 3.2, "full": 4.0}[again]
    work = 1 + 0.05 * (parallel.tensor - 1) + 0.04 * (parallel.context - 1) + 0.01 * parallel.expert
    work += 3.0 * (parallel.expert_tensor - 1)
    forward = work / passes if again == "none" else work / 3
    backward = forward * (passes - 1)
    bubble = (forward + backward) * (parallel.pipeline - 1) / rows / (parallel.virtual_pipeline or 1)
    update = 0.5 / parallel.expert  # with what is sent above, it is best in the middle
    weights = 200 / (parallel.pipeline * max(parallel.expert * parallel.expert_tensor, parallel.tensor))
    deep = lambda chunks: 1 + (1 - 1 / parallel.pipeline) * (0.3 if (chunks or 1) > 1 else 0)
    divided = 1 / (parallel.tensor * parallel.context)
    capacity = 80 * GIB
    held = round(weights * GIB)
    kept = {form: scale * size * divided * GIB for form, size in KEPT.items()}
    spare = round(capacity - held - deep(parallel.virtual_pipeline) * kept[again])
    needs = {
        (form, own.vision.recompute, chunks): round(1.01 * (held + deep(chunks) * size))
        for form, size in kept.items()
        for chunks in (1, 2, 4)
    }
    parts = {"forward": forward, "backward": backward, "bubble": bubble, "optimizer": update}
    return SimpleNamespace(
        world_size=world,
        time=SimpleNamespace(seconds=sum(parts.values()), parts=parts),
        tokens=1000,
        model_flops={"language": 1.0},
        gpu=gpu,
        capacity=capacity,
        spare=spare,
        stages=[SimpleNamespace(total=capacity - spare, static=SimpleNamespace(total=held))],
        fits=spare >= 0.05 * capacity,
        needs=needs if again == "full" and parallel.virtual_pipeline is None else {},
    )


def sizes(parallel) -> tuple[int, int, int]:
    return parallel.tensor, parallel.pipeline, parallel.context


@pytest.mark.parametrize("scale", [0.5, 12.0])
def test_what_is_found_is_the_fastest_of_all(recipe, scale) -> None:
    settings, shapes = recipe("30b-a3b")
    gpu, world = gpu_of("h100"), 64

    def plan_of(own, *, exact: bool, gpus: int | None = None) -> SimpleNamespace:
        return made_up_plan(own, gpu, gpus or world, scale)

    valid = [changes for changes, why in layouts(settings, shapes, world, gpu) if why is None]
    every = [plan_of(with_changes(settings, one | form), exact=True) for one in valid for form in savings(settings)]
    fastest = min(plan.time.seconds for plan in every if plan.fits)
    found = search(settings, shapes, world, gpu, plan_of)
    assert found[0].ruled_out is None
    assert found[0].seconds == pytest.approx(fastest, rel=1e-9)
    names = [name for name in valid[0] if name.startswith("parallel.")]
    known = [(tuple(one.changes[name] for name in names), one.ruled_out) for one in found]
    assert len(known) == len(dict(known)) == len(list(layouts(settings, shapes, world, gpu)))  # each layout once
