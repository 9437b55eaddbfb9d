"""train.ema: the average of the weights by hand, divided over ranks, resumed on the same bits, and exported."""

import pytest
import torch
from parity import mostly_slow, named_as_in_hf
from test_checkpoint import DP2, ONE, PP2, TP2, adam, run
from test_checkpoint import toys as saved_toys  # noqa: F401
from test_weight_groups import FIRST_STAGE

DECAY = 0.7
# Every layout that divides the weights in another way; in PP2 the first stage has nothing that is trained.
LAYOUTS = {"one process": (ONE, []), "DP2": (DP2, []), "TP2": (TP2, []), "PP2": (PP2, FIRST_STAGE)}


@pytest.mark.parametrize("name", mostly_slow(LAYOUTS, {"DP2", "PP2"}.__contains__))
def test_the_average_is_that_of_the_weights_after_each_step(name, saved_toys, tmp_path, request):  # noqa: F811
    """Three steps, after each of which the weights are read. Resumed after the second, the third has the same bits."""
    from megavlm.checkpoint.averages import AveragedCheckpoint
    from megavlm.convert.mcore_checkpoint import McoreCheckpoint

    layout, groups = LAYOUTS[name]
    world, toy = request.getfixturevalue(f"world{layout.world}"), saved_toys["dense"]
    settings = adam(toy, layout, keep=9, ema=DECAY, groups=groups, lr=0.01)
    plain = adam(toy, layout, groups=groups, lr=0.01)
    straight = world.run(run, *toy, settings, tmp_path / "a", steps=3, save_at=[0, 1, 2, 3])
    without = world.run(run, *toy, plain, tmp_path / "b", steps=3)
    assert [one[0] for one in straight] == [one[0] for one in without], "the average changes the training"
    expected: dict = {}
    for step in range(4):
        stored = McoreCheckpoint(tmp_path / f"a/step_{step:08d}")
        keys = [key for key in stored.tensors if f"optimizer.state.ema.{key}" in stored.tensors]
        assert len(keys) > 30
        for key in keys:
            weight = stored.read(key)
            expected[key] = weight if step == 0 else DECAY * expected[key] + (1 - DECAY) * weight
    averaged = AveragedCheckpoint(tmp_path / "a/step_00000003")
    for key, average in expected.items():  # two float32 roundings of each step
        torch.testing.assert_close(averaged.read(key), average, rtol=1e-6, atol=1e-7)
        assert not torch.equal(averaged.read(key), stored.read(key))
    world.run(run, *toy, settings, tmp_path / "c", steps=3, save_at=[3], restore=tmp_path / "a/step_00000002")
    resumed = AveragedCheckpoint(tmp_path / "c/step_00000003")
    assert all(torch.equal(resumed.read(key), averaged.read(key)) for key in expected)


def test_it_is_exported(saved_toys, tmp_path, world1):  # noqa: F811
    from safetensors.torch import load_file

    from megavlm.base.errors import UserError
    from megavlm.checkpoint.averages import AveragedCheckpoint
    from megavlm.convert import mcore_to_hf
    from megavlm.convert.mcore_checkpoint import McoreCheckpoint

    toy = saved_toys["dense"]
    world1.run(run, *toy, adam(toy, ONE, ema=DECAY, lr=0.01), tmp_path / "a", steps=2, save_at=[2])
    checkpoint = tmp_path / "a/step_00000002"  # the warm-up begins at 0, so the first step changes nothing
    stored = AveragedCheckpoint(checkpoint)
    mcore_to_hf(checkpoint, toy[0], tmp_path / "hf", source=stored, progress=False)
    raw = McoreCheckpoint(checkpoint)
    read = {key: raw.read(f"optimizer.state.ema.{key}") for key in raw.tensors if not key.startswith("optimizer")}
    expected, found = named_as_in_hf(read, toy[0]), load_file(tmp_path / "hf/model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    weights = named_as_in_hf({key: raw.read(key) for key in read}, toy[0])
    assert sum(not torch.equal(found[name], weights[name]) for name in expected) > 30
    with pytest.raises(UserError, match="has no moving average"):
        AveragedCheckpoint(toy[1])
