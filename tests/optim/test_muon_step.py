"""Muon in one process, beside torch.optim.Muon and torch.optim.AdamW."""

import pytest
import torch

from megavlm.optim.muon import Muon, orthogonal


class One:
    """A parameter that is one whole matrix."""

    def whole(self, piece):
        return [piece]

    def piece(self, whole):
        return whole[0]


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_as_torchs(shape):
    """Three steps in bfloat16, as torch's: its 8 bits, in another order, leave 2.4 % of an update."""
    draw = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=draw)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    optimizer = Muon([ours], matrices={ours: One()}, **settings)
    reference = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        ours.grad = torch.randn(shape, generator=draw)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    assert (ours - theirs).norm() < 0.04 * (theirs - start).norm()


def test_other_weights_as_adamw():
    """One rounding apart."""
    start = torch.randn(30, generator=torch.Generator().manual_seed(2))
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    settings = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.9)}
    optimizer, reference = Muon([ours], matrices={}, **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(3):
        ours.grad = torch.sin(start * (step + 1))
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_singular_values_are_nearly_one():
    matrix = torch.randn(20, 50, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(orthogonal(matrix))
    assert 0.6 < values.min() <= values.max() < 1.3
    assert not orthogonal(torch.zeros(3, 4)).any()
