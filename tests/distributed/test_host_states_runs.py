"""train.offload_activations in steps of training: numbers, copies and host memory in layouts, and with FP8."""

import pytest
import torch
from late_copies import LateStream
from parity import mostly_slow
from test_checkpoint import DP2, EP2, ONE, TP2_PP2, VPP2, Layout, adam, run
from test_checkpoint import toys as saved_toys  # noqa: F401
from test_te_runs import toy_and_settings

ROWS = 2  # of a step
LAYOUTS = {
    "one process": ONE,
    "DP2": DP2,
    "TP2 × PP2": TP2_PP2,
    "PP2 × VPP2": VPP2,
    "CP2": Layout(2, "dense", {"context": 2}),
    "MoE EP2": EP2,
}
QUICK = {"TP2 × PP2", "PP2 × VPP2", "CP2", "MoE EP2"}


def run_late(*args, **kwargs):
    """Runs on a rank: ``run``, with copies that are made when they are waited for.

    Returns also the number of copies and the sizes of all pieces of host memory.
    """
    from megavlm.platform import host_states

    states, init = [], host_states.HostStates.__init__

    def noted(self):
        init(self, LateStream())
        states.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_states.HostStates, "__init__", noted)
        found = run(*args, **kwargs)
    (one,) = states
    return *found, (one._stream.copies, [len(room) for _, room in one._free])


def same(one, other):
    """Whether all ranks have the same metrics and weights."""
    return all(
        before[0] == after[0] and all(torch.equal(x, y) for x, y in zip(before[1], after[1], strict=True))
        for before, after in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", mostly_slow(LAYOUTS, QUICK.__contains__))
def test_inputs_on_the_host_change_no_bit(name, saved_toys, tmp_path, request):  # noqa: F811
    """And a plan counts the host memory that a run takes."""
    from megavlm.plan.stage_memory import ChunkMemory, StageMemory
    from megavlm.plan.step_memory import Peak

    layout, steps = LAYOUTS[name], 2
    world, toy = request.getfixturevalue(f"world{layout.world}"), saved_toys[layout.kind]
    train = {"recompute": "full", "precision": "bf16" if name == "MoE EP2" else "fp32"}
    plain, offloaded = (adam(toy, layout, **train, offload_activations=on) for on in (False, True))
    expected = world.run(run, *toy, plain, tmp_path, steps=steps)
    found = world.run(run_late, *toy, offloaded, tmp_path, steps=steps)
    assert same(expected, found)
    stages, rows = layout.parallel.get("pipeline", 1), ROWS // layout.dp_size
    nothing = Peak("", {})
    chunks = layout.parallel.get("virtual_pipeline", 1)
    for rank, (*_, (copies, sizes)) in enumerate(found):
        stage = rank // (layout.world // stages)
        # The first input stays if another stage has sent it.
        layers = [4 // stages // chunks - (stage > 0 or number > 0) for number in range(chunks)]
        # The last layer's input is still there if no other row has come between.
        assert rows * steps * (2 * sum(layers) - chunks) <= copies <= rows * steps * 2 * sum(layers)
        (size,) = set(sizes) or {0}
        each = [ChunkMemory(nothing, {}, nothing, {}, on_host=count * size) for count in layers]
        assert sum(sizes) == StageMemory(nothing, {}, each, nothing).on_host(stage, stages, rows)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
def test_with_transformer_engine(precision, toys, te_world, tmp_path):
    """With experts on two tensor ranks."""
    train = {"recompute": "full", "precision": precision}
    toy, plain = toy_and_settings(toys, Layout(2, "moe", {"tensor": 2}), **train)
    _, offloaded = toy_and_settings(toys, Layout(2, "moe", {"tensor": 2}), **train, offload_activations=True)
    world = te_world(2)
    found = world.run(run_late, *toy, offloaded, tmp_path, steps=2)
    assert same(world.run(run, *toy, plain, tmp_path, steps=2), found)
    assert found[0][-1][0] > 0
