"""Attention within packed rows, and of sampled tokens to stored ones: CUDA's fused kernels beside the plain ones."""

import importlib.util

import numpy as np
import pytest
import torch

from megavlm.model.kernels.attention import segment_attention
from megavlm.model.packed import PackedRow
from megavlm.rollout.attention import Spans

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
BOUND = 3e-2  # of the largest value: bf16 keeps 8 bits of queries, keys, values and of the result


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.float().cpu() - expected).abs().max() < BOUND * expected.abs().max())


@pytest.mark.parametrize("dim", [32, 72, 128])  # 72: the towers of 8B and larger models
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_segments(causal, dim):
    torch.manual_seed(0)
    lengths = [17, 64, 64, 1, 110]
    heads = (4, 2, 2) if causal else (4, 4, 4)
    tensors = [torch.randn(sum(lengths), count, dim).bfloat16().float() for count in heads]
    grad, found = torch.randn_like(tensors[0]), []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        inputs = [x.detach().to(device, dtype, copy=True).requires_grad_() for x in tensors]
        out = segment_attention(*inputs, PackedRow.of(lengths, torch.device(device)), causal=causal, scale=0.2)
        out.backward(grad.to(device, dtype))
        found.append([out.detach(), *(x.grad for x in inputs)])
    assert all(close(got, expected) for expected, got in zip(*found, strict=True))


def test_sampled_tokens():
    """Several queries for each sequence of stored keys, as the answers to one prompt have."""
    torch.manual_seed(0)
    lengths, queries, found = [50, 7, 130], [3, 1, 4], []
    where = np.split(np.random.default_rng(0).permutation(400)[: sum(lengths)], np.cumsum(lengths)[:-1])
    query = torch.randn(sum(queries), 4, 64).bfloat16().float()
    keys, values = (torch.randn(2, 400, 64).bfloat16().float() for _ in range(2))
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        spans = Spans(where, queries)
        found.append(spans.attend(*(x.to(device, dtype) for x in (query, keys, values)), 0.2))
    assert all(close(got, expected) for expected, got in zip(*found, strict=True))


def test_results_repeat_if_asked():
    """The gradients of queries are sums of many blocks, which FlashAttention adds in any order unless it is asked."""
    torch.manual_seed(0)
    row = PackedRow.of([8192], torch.device("cuda"))
    inputs = [torch.randn(8192, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2)]
    found = []
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for _ in range(4):
            leaves = [x.clone().requires_grad_() for x in inputs]
            segment_attention(*leaves, row, causal=True, scale=0.1).sum().backward()
            found.append([x.grad for x in leaves])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, again) for other in found[1:] for first, again in zip(found[0], other, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is missing")
def test_transformer_engine_has_a_fused_kernel():
    """Rows as ``PackedRow.as_thd`` pads them. Its attention without a kernel would keep all products."""
    import transformer_engine.pytorch as te

    torch.manual_seed(0)
    lengths, scale = [700, 1, 300], 128**-0.5
    row = PackedRow.of(lengths, torch.device("cuda"))
    inputs = [torch.randn(sum(lengths), n, 128, device="cuda", dtype=torch.bfloat16) for n in (4, 2, 2)]
    attention = te.DotProductAttention(4, 128, num_gqa_groups=2, qkv_format="thd", attn_mask_type="padding_causal")
    attention.unfused_attention = None
    thd = row.as_thd()
    out = attention(
        *inputs, cu_seqlens_q=thd.cu_seqlens_q, cu_seqlens_kv=thd.cu_seqlens_kv,
        max_seqlen_q=thd.max_seqlen_q, max_seqlen_kv=thd.max_seqlen_kv,
    )  # fmt: skip
    assert close(out.view(-1, 4, 128), segment_attention(*inputs, row, causal=True, scale=scale).float().cpu())
