"""The passes over logits: what CUDA compiles beside what is computed in place on a CPU."""

import pytest
import torch

from megavlm.platform import softmax


@pytest.mark.parametrize("options", [{}, {"products": True}, {"plain": True}, {"products": True, "plain": True}])
def test_sums(options):
    torch.manual_seed(0)
    logits = 5 * torch.randn(7, 300, dtype=torch.float64)
    top = logits.max(-1).values
    found = softmax.exponential_sums(logits.clone(), top, **options)
    compiled = softmax._sums(logits, top, options.get("products", False), options.get("plain", False))
    exp = (logits - top[:, None]).exp()
    exact = [exp.sum(-1), *([(logits * exp).sum(-1)] if "products" in options else [])]
    exact += [logits.sum(-1)] if "plain" in options else []
    assert len(found) == len(compiled) == len(exact)
    for one, other, expected in zip(found, compiled, exact, strict=True):
        assert torch.allclose(one, expected, rtol=1e-12)
        assert torch.allclose(other, expected, rtol=1e-12)


@pytest.mark.parametrize("uniform", [False, True])
def test_gradients(uniform):
    """Against autograd: of log p(target), and with ``uniform`` of the mean of the logits as well."""
    torch.manual_seed(0)
    logits = (5 * torch.randn(7, 300, dtype=torch.float64)).requires_grad_()
    index, grad = torch.randint(300, (7,)), torch.randn(7, 1, dtype=torch.float64)
    log_z = logits.logsumexp(-1, keepdim=True)
    total = ((logits.gather(1, index[:, None]) - log_z) * grad).sum()
    mean = torch.randn(7, 1, dtype=torch.float64) if uniform else None
    if mean is not None:
        total = total + (logits.mean(-1, keepdim=True) * mean).sum()
    total.backward()
    share = None if mean is None else mean / 300
    arguments = log_z.detach(), -grad, index, grad, share, torch.float64
    for function in (softmax.logit_gradients, softmax._gradients):
        assert torch.allclose(function(logits.detach().clone(), *arguments), logits.grad, rtol=1e-9, atol=1e-12)
