"""train.offload_optimizer and train.adam_moments in steps of training: numbers, checkpoints, layouts, kernels."""

import pytest
import torch
from parity import mostly_slow
from test_checkpoint import DP2, EP2, EP2_TP2, ONE, TP2, TP2_PP2, VPP2, adam, run
from test_checkpoint import toys as saved_toys  # noqa: F401
from test_te_runs import toy_and_settings

LAYOUTS = {
    "one process": ONE,
    "DP2": DP2,
    "TP2 × PP2": TP2_PP2,
    "PP2 × VPP2": VPP2,
    "MoE EP2": EP2,
    "MoE EP2 × TP2": EP2_TP2,
}
QUICK = {"DP2", "MoE EP2", "TP2 × PP2"}
BF16 = {"adam_moments": "bf16"}


def same(one, other, steps=0):
    """Whether all ranks have the same metrics, from a step on, and the same weights."""
    return all(
        before[0][steps:] == after[0] and all(torch.equal(x, y) for x, y in zip(before[1], after[1], strict=True))
        for before, after in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", mostly_slow(LAYOUTS, QUICK.__contains__))
def test_state_on_the_host_changes_no_bit(name, saved_toys, tmp_path, request):  # noqa: F811
    """Nor does a checkpoint between: a run continues with or without it, whichever it had. Gradients are clipped."""
    layout = LAYOUTS[name]
    world, toy = request.getfixturevalue(f"world{layout.world}"), saved_toys[layout.kind]
    precision = "bf16" if name in QUICK else "fp32"
    plain, offloaded = (
        adam(toy, layout, precision=precision, clip_grad=0.5, offload_optimizer=on) for on in (False, True)
    )
    straight = world.run(run, *toy, plain, tmp_path / "plain", steps=3, save_at=[2])
    assert same(straight, world.run(run, *toy, offloaded, tmp_path / "off", steps=3, save_at=[0, 2]))
    assert straight[0][0][0]["grad_norm"] > 0.5
    resumed = world.run(run, *toy, plain, tmp_path / "c", steps=3, restore=tmp_path / "off/step_00000002")
    assert same(straight, resumed, 2)
    resumed = world.run(run, *toy, offloaded, tmp_path / "d", steps=3, restore=tmp_path / "plain/step_00000002")
    assert same(straight, resumed, 2)


@pytest.mark.parametrize("name", mostly_slow(LAYOUTS, {"DP2"}.__contains__))
def test_moments_in_bf16_continue_on_the_same_bits(name, saved_toys, tmp_path, request):  # noqa: F811
    """Checkpoints have them in float32, exactly, so that a run with float32 moments can continue from them."""
    from megavlm.convert.mcore_checkpoint import McoreCheckpoint

    layout = LAYOUTS[name]
    world, toy = request.getfixturevalue(f"world{layout.world}"), saved_toys[layout.kind]
    exact, settings = adam(toy, layout, clip_grad=0.5), adam(toy, layout, clip_grad=0.5, offload_optimizer=True, **BF16)
    straight = world.run(run, *toy, settings, tmp_path, steps=3, save_at=[2])
    resumed = world.run(run, *toy, settings, tmp_path, steps=3, restore=tmp_path / "step_00000002")
    assert same(straight, resumed, 2)
    expected = world.run(run, *toy, exact, tmp_path, steps=3)
    assert not same(straight, expected), "the moments are not rounded"
    for line, other in zip(straight[0][0], expected[0][0], strict=True):
        assert line == pytest.approx(other, rel=1e-2)  # moments are rounded by up to 1/256
    stored = McoreCheckpoint(tmp_path / "step_00000002").tensors
    moments = {key: dtype for key, (_, dtype) in stored.items() if ".exp_avg" in key}
    assert len(moments) > 60
    assert set(moments.values()) == {torch.float32}


def test_a_part_that_is_unfrozen_later(saved_toys, tmp_path, world2):  # noqa: F811
    toy, train = saved_toys["dense"], {"freeze": ("language",), "unfreeze_after": {"language": 1}, "precision": "bf16"}
    straight = world2.run(run, *toy, adam(toy, TP2, **train), tmp_path / "a", steps=3)
    offloaded = adam(toy, TP2, **train, offload_optimizer=True)
    assert same(straight, world2.run(run, *toy, offloaded, tmp_path / "b", steps=3, save_at=[2]))
    resumed = world2.run(run, *toy, offloaded, tmp_path / "c", steps=3, restore=tmp_path / "b/step_00000002")
    assert same(straight, resumed, 2)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_beside_transformer_engine(precision, toys, te_world, tmp_path):
    """FusedAdam computes the same to rounding. With experts, whose weights TE numbers."""
    world = te_world(2)
    toy, settings = toy_and_settings(toys, EP2, precision=precision)
    expected = world.run(run, *toy, settings, tmp_path / "a", steps=3)
    toy, settings = toy_and_settings(toys, EP2, precision=precision, offload_optimizer=True)
    straight = world.run(run, *toy, settings, tmp_path / "b", steps=3, save_at=[2])
    for line, other in zip(straight[0][0], expected[0][0], strict=True):
        assert line == pytest.approx(other, rel=1e-5 if precision == "fp32" else 1e-2)
    resumed = world.run(run, *toy, settings, tmp_path / "c", steps=3, restore=tmp_path / "b/step_00000002")
    assert same(straight, resumed, 2)
