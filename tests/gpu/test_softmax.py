"""The head's passes over logits, which CUDA makes one kernel of, beside the ones in place on a CPU."""

import pytest
import torch

from megavlm.platform.softmax import exponential_sums, logit_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("rows", [5, 64, 300])
def test_sums(rows):
    logits = 5 * torch.randn(rows, 4000, generator=torch.Generator().manual_seed(rows))
    top = logits.max(-1).values
    for options in ({}, {"products": True}, {"products": True, "plain": True}):
        expected = exponential_sums(logits.clone().double(), top.double(), **options)
        for one, exact in zip(exponential_sums(logits.cuda(), top.cuda(), **options), expected, strict=True):
            assert torch.allclose(one.cpu().double(), exact, rtol=1e-5, atol=1e-3)  # 4,000 terms in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [5, 300])
def test_gradients(rows, dtype):
    generator = torch.Generator().manual_seed(rows)
    logits = 5 * torch.randn(rows, 4000, generator=generator)
    share, grad = torch.randn(2, rows, 1, generator=generator)
    log_z, index = logits.logsumexp(-1, keepdim=True), torch.randint(4000, (rows,), generator=generator)
    for uniform in (None, torch.randn(rows, 1, generator=generator)):
        arguments = logits.clone(), log_z, share, index, grad, uniform
        on_gpu = [None if x is None else x.cuda() for x in arguments]
        expected = logit_gradients(*arguments, torch.float32)
        found = logit_gradients(*on_gpu, dtype)
        assert found.dtype == dtype
        assert torch.allclose(found.cpu().float(), expected, rtol=1e-4 if dtype == torch.float32 else 2**-8, atol=1e-6)
