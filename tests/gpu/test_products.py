"""Products of bf16 matrices that CUDA sums and returns in float32."""

import pytest
import torch

from megavlm.platform.products import add_product, product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def matrices(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    n, k, m = shape
    return tuple(torch.randn(a, b, generator=generator).bfloat16() for a, b in ((n, k), (k, m)))


def test_a_product_is_not_rounded():
    left, right = matrices(300, 512, 700)
    exact = left.double() @ right.double()
    found = product(left.cuda(), right.cuda())
    assert found.dtype == torch.float32
    assert (found.cpu() - exact).abs().max() < 1e-4  # 512 terms around 1, summed in float32; bf16 would be off by 0.3


def test_a_product_is_added():
    left, right = matrices(300, 512, 700)
    total = torch.randn(300, 700, generator=torch.Generator().manual_seed(1))
    exact = total.double() + left.double() @ right.double()
    found = total.cuda()
    where = found.data_ptr()
    add_product(found, left.cuda().t().contiguous().t(), right.cuda())  # transposed, as the head's gradient is
    assert found.data_ptr() == where
    assert (found.cpu() - exact).abs().max() < 1e-4
