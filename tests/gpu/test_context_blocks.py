"""The CUDA kernels behind context parallelism give what the CPU's give."""

import pytest
import torch

from megavlm.platform import attention_blocks as blocks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
# of the largest value: sums of a hundred terms in float32 (TF32 off), and values rounded to 2^-8
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"])
def test_forward_and_backward(dtype, bound, causal):
    torch.manual_seed(0)
    keys = 96 if causal else 160
    query, grad = torch.randn(2, 4, 96, 64), torch.randn(2, 4, 96, 64)
    key, value = torch.randn(2, 2, keys, 64), torch.randn(2, 2, keys, 64)
    found = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        q, k, v, g = (x.to(dtype).to(device, kind) for x in (query, key, value, grad))
        out, log_sum = blocks.forward(q, k, v, causal=causal, scale=0.2)
        grads = blocks.backward(g, q, k, v, out, log_sum, causal=causal, scale=0.2)
        found.append([x.float().cpu() for x in (out, log_sum, *grads)])
    for expected, got in zip(*found, strict=True):
        assert (got - expected).abs().max() < bound * expected.abs().max()
