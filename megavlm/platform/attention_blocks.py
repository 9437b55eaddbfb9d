"""Attention within packed rows on CUDA; one block of blockwise attention, differentiable, and with its log-sum-exp.

``forward`` and ``backward`` are the kernels of ``scaled_dot_product_attention``, called directly because that function
does not return the log-sum-exp. Query [B, heads, n, dim], key and value [B, kv_heads, m, dim], log-sum-exp float32
[B, heads, n].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.attention.varlen  # defines the operators of ``_Packed``
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


def packed(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, causal: bool, scale: float
) -> Tensor:
    """Attention within the segments of a row in 16 bits on CUDA, by torch's FlashAttention.

    Args:
        query: [T, heads, head_dim].
        key, value: [T, kv_heads, head_dim].
        cu_seqlens: int32 [segments + 1].
        max_seqlen: length of the longest segment.
        causal: whether tokens attend only to earlier tokens and to themselves.
        scale: factor on the products of queries and keys.
    """
    return _Packed.apply(query, key, value, cu_seqlens, max_seqlen, causal, scale)


class _Packed(torch.autograd.Function):
    """torch's ``varlen_attn``, whose backward pass repeats its results if all kernels have been asked to."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, cu: Tensor, longest: int, *how: Any) -> Tensor:
        causal, scale = how
        ctx.how = longest, longest, causal
        ctx.rest = dict(scale=scale, window_size=[-1, 0] if causal else [-1, -1])
        out, log_sum, state = torch.ops.torch_attn._varlen_attn(query, key, value, cu, cu, *ctx.how, **ctx.rest)
        ctx.save_for_backward(query, key, value, out, log_sum, cu, state)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, cu, state = ctx.saved_tensors
        with _repeating():
            grads = torch.ops.torch_attn._varlen_attn_backward(grad, *tensors, cu, cu, *ctx.how, state, **ctx.rest)
        return *grads, None, None, None, None


@contextmanager
def _repeating() -> Iterator[None]:
    """Has FlashAttention repeat its sums, if deterministic kernels were asked for.

    It does so only where torch raises an error for kernels that cannot, and megavlm has it warn.
    """
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def attention(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Tensor:
    """The output [B, heads, n, dim], which autograd knows."""
    if query.is_meta:  # there torch would choose a kernel that keeps the products of all queries and keys
        return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)[0]
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)


def forward(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The output [B, heads, n, dim] and the log-sum-exp. ``causal`` needs n = m."""
    if not query.is_cuda:
        return _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    key, value = _one_per_head(key, query), _one_per_head(value, query)
    if query.dtype == torch.float32:
        out, log_sum, *_ = _aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=scale
        )
        return out, log_sum[..., : query.shape[2]]  # the kernel pads it
    return _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)[:2]


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, log_sum: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value. ``out`` and ``log_sum`` may be from attention over several blocks."""
    log_sum = log_sum.contiguous()
    if not query.is_cuda:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, out, log_sum, 0.0, causal, scale=scale
        )
    heads = key.shape[1]
    key, value = _one_per_head(key, query), _one_per_head(value, query)
    unused = torch.zeros((), dtype=torch.int64, device=query.device)  # random state for dropout, which is off
    if query.dtype == torch.float32:
        grads = _aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, None, out, _padded(log_sum), unused, unused, 0.0,
            (True, True, True, False), causal, scale=scale,
        )[:3]  # fmt: skip
    else:
        with _repeating():
            grads = _aten._scaled_dot_product_flash_attention_backward(
                grad, query, key, value, out, log_sum, None, None, query.shape[2], key.shape[2],
                0.0, causal, unused, unused, scale=scale,
            )  # fmt: skip
    grad_query, *rest = grads
    grad_key, grad_value = (x.unflatten(1, (heads, -1)).sum(2) for x in rest)
    return grad_query, grad_key, grad_value


def _one_per_head(x: Tensor, query: Tensor) -> Tensor:
    """Repeats grouped keys or values, so that there is one for each query head."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)


def _padded(log_sum: Tensor) -> Tensor:
    """Pads n to a multiple of 32, as the memory-efficient kernel does."""
    return torch.nn.functional.pad(log_sum, (0, -log_sum.shape[-1] % 32), value=float("inf"))
