"""Inputs of recomputed layers in page-locked memory: the same bits, less memory, no wait, copies beside kernels."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megavlm.platform.host_states import HostStates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LAYERS, TOKENS, HIDDEN = 12, 16384, 2048  # 64 MiB an input


def steps(on_host: bool, count: int = 3) -> tuple[list[torch.Tensor], int]:
    """Gradients after some steps of two rows, the first of which ends while the second is between its passes.

    And the most memory of a step. All but the first step, which makes the host memory, run without a wait.
    """
    torch.manual_seed(0)
    layers = [torch.nn.Linear(HIDDEN, HIDDEN, device="cuda", dtype=torch.bfloat16) for _ in range(LAYERS)]
    norm = torch.nn.LayerNorm(HIDDEN, device="cuda", dtype=torch.bfloat16)
    states = HostStates()

    def loss(row):
        for layer in layers:
            row = checkpoint(lambda x, layer=layer: layer(x).tanh() + x, row, use_reentrant=True)
        return norm(row).square().mean()

    def forward(row):
        if not on_host:
            return loss(row)
        with states.of(row.shape, LAYERS):
            return loss(row)

    rows = [torch.randn(TOKENS, 1, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2)]
    for number in range(count):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            first, second = forward(rows[0]), forward(rows[1])
            first.backward()
            second.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    weights = [weight for layer in layers for weight in layer.parameters()]
    return [tensor.grad for tensor in (*weights, *rows)], torch.cuda.max_memory_allocated()


def test_the_same_bits_in_less_memory():
    kept, most = steps(on_host=False)
    offloaded, less = steps(on_host=True)
    assert all(torch.equal(one, other) for one, other in zip(kept, offloaded, strict=True))
    one = TOKENS * HIDDEN * 2
    assert most - less > (2 * LAYERS - 8) * one  # of each row, at most three or four are there


def test_copies_run_beside_the_computing():
    """On a stream of their own, between the layers' kernels: some of both at the same time."""
    from torch.profiler import ProfilerActivity, profile

    steps(on_host=True, count=1)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        steps(on_host=True, count=2)
    events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    copies = [event for event in events if "Memcpy DtoH" in event.name or "Memcpy HtoD" in event.name]
    kernels = [event for event in events if "Mem" not in event.name]
    assert len(copies) >= 2 * 2 * (2 * LAYERS - 2)
    beside = sum(
        any(k.time_range.start < c.time_range.end and c.time_range.start < k.time_range.end for k in kernels)
        for c in copies
    )
    assert beside > len(copies) / 2
