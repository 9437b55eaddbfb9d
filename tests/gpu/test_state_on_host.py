"""Adam's state in page-locked memory: the numbers of torch's AdamW, no wait for the device, and a fork that sees it."""

import os

import pytest
import torch

from megavlm.optim.stored_adam import MASTER, MOMENTS, StoredAdam, readable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
RATES = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_updates_are_those_of_adamw(moments):
    torch.manual_seed(0)
    weights = [torch.randn(size, device="cuda").bfloat16() for size in (3, 1 << 20, 4097)]
    copies = [weight.float() for weight in weights]
    adam = StoredAdam(weights, **RATES, on_host=True, moments=moments)
    plain = torch.optim.AdamW(copies, **RATES, fused=True)
    adam.fill()
    assert all(tensor.is_pinned() for tensor in adam.held())
    for _ in range(3):
        for weight, copy in zip(weights, copies, strict=True):
            weight.decoupled_grad = copy.grad = torch.randn(weight.numel(), device="cuda")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            adam.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        plain.step()
    for weight, copy in zip(weights, copies, strict=True):
        # moments that are rounded to 2^-8 change an update, which is about 0.01, by some of that
        torch.testing.assert_close(weight, copy.bfloat16(), rtol=2**-7, atol=1e-6 if moments == torch.float32 else 1e-3)
        if moments == torch.float32:
            adam.arrive()
            for name in MOMENTS:
                torch.testing.assert_close(readable(adam.state[weight][name]), plain.state[copy][name].cpu())


def test_a_forked_process_reads_what_is_saved():
    """A checkpoint is written by one, which does not see page-locked memory."""
    weight = torch.randn(1 << 16, device="cuda").bfloat16()
    adam = StoredAdam([weight], **RATES, on_host=True, moments=torch.float32)
    weight.decoupled_grad = torch.ones(1 << 16, device="cuda")
    adam.step()
    adam.arrive()
    saved = readable(adam.state[weight][MASTER])
    assert not saved.is_pinned()
    expected = saved.sum().item()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if abs(saved.sum().item() - expected) < 1e-3 * abs(expected) + 1e-3 else 1)
    assert os.waitpid(child, 0)[1] == 0
