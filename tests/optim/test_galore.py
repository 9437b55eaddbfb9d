"""GaLore against AdamW where they must agree, and against its formula written out in float64."""

import pytest
import torch

from megavlm.optim.galore import GaLore, leading_vectors

HYPER = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gradients(shapes, steps, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, dtype=torch.float64, generator=draw) for shape in shapes] for _ in range(steps)]


def train(optimizer_of, shapes, steps):
    """Weights after the same gradients."""
    (start,) = gradients(shapes, 1, seed=1)
    weights = [torch.nn.Parameter(tensor.clone()) for tensor in start]
    optimizer = optimizer_of(weights)
    for step in gradients(shapes, steps):
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    return [weight.detach() for weight in weights], optimizer


def test_what_is_not_projected_is_adamw():
    """A side of at most the rank, no matrix, or named as whole; the scale is no matter for them."""
    shapes = [(8, 30), (30, 8), (16,), (2, 12, 12), (20, 30)]
    make = lambda w: GaLore(w, **HYPER, rank=8, update_every=2, scale=0.5, whole=[w[-1]])
    ours, optimizer = train(make, shapes, 5)
    theirs, _ = train(lambda w: torch.optim.AdamW(w, **HYPER), shapes, 5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)  # float64, other order of the same operations
    assert all("projector" not in state for state in optimizer.state.values())


@pytest.mark.parametrize("shape", [(10, 30), (30, 10), (12, 12)], ids=str)
def test_its_formula(shape):
    """Seven steps, the projector renewed before the 1st, 4th and 7th, moments kept; singular vectors by torch's svd."""
    rank, every, scale, wide = 4, 3, 0.25, shape[0] <= shape[1]
    (ours,), optimizer = train(lambda w: GaLore(w, **HYPER, rank=rank, update_every=every, scale=scale), [shape], 7)
    ((weight,),) = gradients([shape], 1, seed=1)
    (beta1, beta2), lr, decay = HYPER["betas"], HYPER["lr"], HYPER["weight_decay"]
    mean = square = 0.0
    for t, (gradient,) in enumerate(gradients([shape], 7), start=1):
        if (t - 1) % every == 0:
            u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
            p = u[:, :rank] if wide else vh[:rank].T
            p = p * torch.stack([column[column.abs().argmax()].sign() for column in p.T])
        low = p.T @ gradient if wide else gradient @ p
        mean = beta1 * mean + (1 - beta1) * low
        square = beta2 * square + (1 - beta2) * low**2
        step = (mean / (1 - beta1**t)) / ((square / (1 - beta2**t)).sqrt() + HYPER["eps"])
        back = p @ step if wide else step @ p.T
        weight = weight - lr * (scale * back + decay * weight)
    torch.testing.assert_close(ours, weight, rtol=1e-9, atol=1e-11)  # eigenvectors of G Gᵀ: σ² costs half the digits
    (state,) = optimizer.state.values()
    m, n = min(shape), max(shape)
    assert sum(tensor.numel() for tensor in state.values()) == (m + 2 * n) * rank


def test_leading_vectors_of_a_gradient_with_few_directions():
    """Singular values over five orders of magnitude, in float32: the subspace still is that of svd in float64."""
    draw = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64, generator=draw))
    v, _ = torch.linalg.qr(torch.randn(60, 40, dtype=torch.float64, generator=draw))
    matrix = ((u * torch.logspace(0, -5, 40, dtype=torch.float64)) @ v.T).float()
    ours = leading_vectors(matrix, 20).double()
    theirs = torch.linalg.svd(matrix.double(), full_matrices=False)[0][:, :20]
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=1e-6)  # float32 holds 7 digits of them
