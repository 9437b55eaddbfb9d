"""A run that is continued with another learning rate learns with it, whatever its optimizer keeps in a checkpoint."""

import pytest
import torch
from test_checkpoint import ONE, adam, run, toys  # noqa: F401 (a fixture)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_after_the_change_has_the_new_learning_rate(optimizer, toys, tmp_path, world1):  # noqa: F811
    """An update is the learning rate times something that the rate does not change, without decay and clipping."""
    toy, rate = toys["dense"], 0.01
    train = {"optimizer": optimizer, "precision": "fp32", "warmup_steps": 0, "clip_grad": 0.0, "weight_decay": 0.0}
    settings = {factor: adam(toy, ONE, workers=1, lr=factor * rate, **train) for factor in (1, 2)}
    before = world1.run(run, *toy, settings[1], tmp_path, steps=2, save_at=[2])[0][1]
    after = {
        factor: world1.run(run, *toy, settings[factor], tmp_path, steps=3, restore=tmp_path / "step_00000002")[0][1]
        for factor in (1, 2)
    }
    for start, once, twice in zip(before, after[1], after[2], strict=True):
        update = once.double() - start.double()
        rounding = 2 * torch.finfo(torch.float32).eps * start.double().norm()
        assert ((twice.double() - start.double()) - 2 * update).norm() <= 1e-4 * update.norm() + rounding
    assert any((once - start).norm() > 1e-3 * start.norm() for start, once in zip(before, after[1], strict=True))
