"""Attention over context-parallel ranks equals attention over the whole row, forward and backward."""

import pytest
import torch


def attend(lengths, dtype):
    """Runs on every rank; returns the largest differences of output and gradients from the whole row's on one rank."""
    import torch.distributed as dist

    from megavlm.layout.row_cut import RowCut
    from megavlm.model.kernels.attention import segment_attention
    from megavlm.model.kernels.context import context_attention
    from megavlm.model.packed import PackedRow

    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    total = sum(lengths)
    whole = [torch.randn(total, heads, 16) * 2 for heads in (6, 2, 2, 6)]
    cut = RowCut.of(lengths, size)
    mine = torch.from_numpy(cut.order[rank])
    parts = [x[mine].to(dtype).requires_grad_() for x in whole[:3]]
    row = PackedRow.of(lengths, torch.device("cpu"), cut)
    out = context_attention(*parts, row, dist.group.WORLD, 0.3)
    out.backward(whole[3][mine].to(dtype))

    inputs = [x.to(dtype).float().requires_grad_() for x in whole[:3]]
    expected = segment_attention(*inputs, PackedRow.of(lengths, torch.device("cpu")), causal=True, scale=0.3)
    expected.backward(whole[3].to(dtype).float())
    pairs = [(out, expected)] + [(part.grad, x.grad) for part, x in zip(parts, inputs, strict=True)]
    return [((a.float() - b[mine]).abs().max() / b.abs().max()).item() for a, b in pairs]


@pytest.mark.parametrize("lengths", [[64], [32, 32, 32, 16, 128], [8, 0, 8, 240]], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_equals_attention_on_one_rank(lengths, dtype, bound, world2, world4):
    """Of the largest value; the bounds are sums of hundreds of terms rounded to 2^-24, and values rounded to 2^-8."""
    for world in (world2, world4):
        for differences in world.run(attend, lengths, dtype):
            assert max(differences) < bound
