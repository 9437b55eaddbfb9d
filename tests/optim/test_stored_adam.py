"""StoredAdam against torch's AdamW, whose bits it must have, and with moments in bfloat16 against them by hand."""

import pytest
import torch

from megavlm.optim import stored_adam
from megavlm.optim.stored_adam import MASTER, StoredAdam, readable
from megavlm.platform.host_memory import HostMemory

SIZES = (5, 300, 64, 17)
RATES = {"betas": (0.9, 0.95), "eps": 1e-8}


def weights_of(dtype):
    torch.manual_seed(3)
    return [torch.randn(size).to(dtype) for size in SIZES]


def groups_of(weights):
    """Two groups, with rates of their own."""
    return [{"params": weights[:2], "lr": 0.03}, {"params": weights[2:], "lr": 0.01, "weight_decay": 0.3}]


def gradients():
    return [torch.randn(size) for size in SIZES]


def made(weights, **how):
    own = {"on_host": True, "moments": torch.float32, **how}
    adam = StoredAdam(groups_of(weights), lr=0.1, weight_decay=0.1, **RATES, **own)
    adam.fill()
    return adam


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("at_a_time", [7, 320, 2**25])
@pytest.mark.parametrize("on_host", [False, True])
def test_it_is_torchs_adamw(dtype, at_a_time, on_host, monkeypatch):
    """However many weights, or parts of them, are updated together. A weight without a gradient stays as it is."""
    monkeypatch.setattr(stored_adam, "AT_A_TIME", at_a_time)
    weights = weights_of(dtype)
    copies = [weight.float().clone() for weight in weights]
    adam, plain = (
        made(weights, on_host=on_host),
        torch.optim.AdamW(groups_of(copies), lr=0.1, weight_decay=0.1, **RATES),
    )
    for _ in range(4):
        for number, (weight, copy, gradient) in enumerate(zip(weights, copies, gradients(), strict=True)):
            weight.decoupled_grad = copy.grad = None if number == 3 else gradient
        adam.step()
        plain.step()
    assert adam.steps == 4
    for weight, copy in zip(weights, copies, strict=True):
        assert torch.equal(readable(adam.state[weight][MASTER]), copy)
        assert torch.equal(weight, copy.to(dtype))
        for name, moment in plain.state[copy].items():
            if name != "step":
                assert torch.equal(readable(adam.state[weight][name]), moment)


def test_moments_are_rounded_after_each_update():
    weights = weights_of(torch.bfloat16)
    adam, copies = made(weights, moments=torch.bfloat16), [weight.float() for weight in weights]
    mean, square = ([torch.zeros(size) for size in SIZES] for _ in range(2))
    for step in range(1, 5):
        for number, (weight, gradient) in enumerate(zip(weights, gradients(), strict=True)):
            weight.decoupled_grad = gradient
            lr, decay = (0.03, 0.1) if number < 2 else (0.01, 0.3)
            mean[number] = 0.9 * mean[number] + 0.1 * gradient
            square[number] = 0.95 * square[number] + 0.05 * gradient**2
            change = mean[number] / (1 - 0.9**step) / ((square[number] / (1 - 0.95**step)).sqrt() + 1e-8)
            copies[number] = (1 - lr * decay) * copies[number] - lr * change
            mean[number], square[number] = mean[number].bfloat16().float(), square[number].bfloat16().float()
        adam.step()
    for weight, copy, *moments in zip(weights, copies, mean, square, strict=True):
        # A number between two bfloat16 may be rounded to the other one, which is 1/128 of it away.
        torch.testing.assert_close(readable(adam.state[weight][MASTER]), copy, rtol=1e-3, atol=1e-4)
        for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            assert adam.state[weight][name].dtype == torch.bfloat16
            torch.testing.assert_close(readable(adam.state[weight][name]), moment, rtol=1 / 128, atol=1e-6)


@pytest.mark.parametrize(("beta2", "share", "shrink"), [(0.98, 0.79, True), (0.99, 0.60, True), (0.99, 0.65, False)])
def test_how_far_squares_must_fall_for_their_mean_to_shrink_in_bfloat16(beta2, share, shrink):
    """Of every bfloat16 between 1 and 2, one update with squared gradients of this share of the mean."""
    means = 1 + torch.arange(128) / 128
    weight = torch.zeros(128, dtype=torch.bfloat16)
    rates = {"lr": 0.0, "betas": (0.9, beta2), "eps": 1e-8, "weight_decay": 0.0}
    adam = StoredAdam([weight], **rates, on_host=False, moments=torch.bfloat16)
    adam.fill()
    adam.state[weight]["exp_avg_sq"].copy_(means)
    weight.decoupled_grad = (share * means).sqrt()
    adam.step()
    assert bool((readable(adam.state[weight]["exp_avg_sq"]) < means).all()) == shrink


@pytest.mark.parametrize(("beta2", "shrinks"), [(0.98, True), (0.999, False)])
def test_a_large_beta2_would_never_forget_in_bfloat16(beta2, shrinks):
    """Why train.adam_beta2 has a limit there: after one large gradient, all others are a tenth of it."""
    weight = torch.zeros(1, dtype=torch.bfloat16)
    adam = StoredAdam(
        [weight], lr=0.0, betas=(0.9, beta2), eps=1e-8, weight_decay=0.0, on_host=False, moments=torch.bfloat16
    )
    largest = None
    for step in range(400):
        weight.decoupled_grad = torch.full((1,), 1.0 if step < 20 else 0.1)
        adam.step()
        square = readable(adam.state[weight]["exp_avg_sq"]).item()
        largest = max(square, largest or 0.0)
    assert (square < largest / 2) == shrinks
    assert shrinks or square == largest


def test_state_in_one_block_is_apart(monkeypatch):
    """As on a GPU, where all state is in one block of page-locked memory."""
    weights, copies = weights_of(torch.bfloat16), weights_of(torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(stored_adam, "on_gpu", lambda: True)
        adam = made(weights)
    plain = made(copies)
    tensors = [*adam.held()]
    assert len(tensors) == 12
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert len({tensor.untyped_storage().data_ptr() for tensor in plain.held()}) == 12
    for _ in range(3):
        for weight, copy, gradient in zip(weights, copies, gradients(), strict=True):
            weight.decoupled_grad = copy.decoupled_grad = gradient
        adam.step()
        plain.step()
    for weight, copy in zip(weights, copies, strict=True):
        assert torch.equal(weight, copy)
        assert all(torch.equal(adam.state[weight][name], plain.state[copy][name]) for name in plain.state[copy])


def test_pieces_of_a_block_are_aligned():
    memory = HostMemory([20, 14, 12])
    taken = [
        memory.take(numel, dtype) for numel, dtype in ((5, torch.float32), (7, torch.bfloat16), (3, torch.float32))
    ]
    assert [piece.data_ptr() - taken[0].data_ptr() for piece in taken] == [0, 64, 128]
    assert [piece.numel() for piece in taken] == [5, 7, 3]
    assert taken[0].untyped_storage().nbytes() == 192


def test_a_rounded_state_is_saved_in_float32():
    weight = torch.randn(5).bfloat16()
    weight.decoupled_grad = torch.randn(5)
    adam = StoredAdam([weight], lr=0.1, weight_decay=0.1, **RATES, on_host=False, moments=torch.bfloat16)
    adam.step()
    state = adam.state[weight]
    assert readable(state[MASTER]) is state[MASTER]
    assert torch.equal(readable(state["exp_avg"]), state["exp_avg"].float())
