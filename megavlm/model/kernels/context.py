"""Causal attention within the segments of a row that is cut over context-parallel ranks, in plain PyTorch.

Queries stay on their rank. The keys and values of the whole row are gathered, which is cheap with grouped heads, and
gathered again in the backward pass, so that they need not be kept. A rank's piece of a segment attends causally to
itself and fully to all earlier pieces. The two results are combined by their log-sum-exp. The backward pass of each
kernel gets the combined output and log-sum-exp, which makes its gradients exact (the blockwise form of FlashAttention,
arXiv:2205.14135, as in ring attention, arXiv:2310.01889).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megavlm.model.packed import PackedRow
from megavlm.platform import attention_blocks as blocks


def context_attention(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, group: dist.ProcessGroup, scale: float
) -> Tensor:
    """Attention of this rank's tokens to themselves and all earlier tokens of their segments, on all ranks.

    Args:
        query: [t, heads, head_dim], in the order of ``RowCut``.
        key, value: [t, kv_heads, head_dim].
        row: the segments.
        group: context-parallel ranks.
        scale: factor on the products of queries and keys.

    Returns:
        [t, heads, head_dim].
    """
    return _ContextAttention.apply(query, key, value, row, group, scale)


class _Context(torch.autograd.function.FunctionCtx):
    """What autograd passes from forward to backward, with the attributes that forward sets."""

    row: PackedRow
    group: dist.ProcessGroup
    scale: float
    saved_tensors: tuple[Tensor, ...]


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        row: PackedRow,
        group: dist.ProcessGroup,
        scale: float,
    ) -> Tensor:
        ctx.row, ctx.group, ctx.scale = row, group, scale
        keys, values = _gather(key, row, group), _gather(value, row, group)
        out = torch.empty_like(query)
        log_sums = query.new_empty(query.shape[:2], dtype=torch.float32)  # [t, heads]
        for here, past, causal in _blocks(row, group):
            part, log_sum = blocks.forward(here(query), past(keys), past(values), causal=causal, scale=scale)
            o, sums = here(out), here(log_sums)
            if causal:  # the causal block is the first of a piece
                o.copy_(part)
                sums.copy_(log_sum)
            else:
                joined = torch.logaddexp(sums, log_sum)
                o.mul_((sums - joined).exp_()[..., None]).add_(part * (log_sum - joined).exp_()[..., None])
                sums.copy_(joined)
        ctx.save_for_backward(query, key, value, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, log_sums = ctx.saved_tensors
        row, group, scale = ctx.row, ctx.group, ctx.scale
        keys, values = _gather(key, row, group), _gather(value, row, group)
        # sums of several blocks, so float32 whatever the dtype is
        grad_query = torch.zeros_like(query, dtype=torch.float32)
        grad_keys, grad_values = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
        for here, past, causal in _blocks(row, group):
            parts = blocks.backward(
                here(grad), here(query), past(keys), past(values), here(out), here(log_sums), causal=causal, scale=scale
            )
            for whole, part in zip((here(grad_query), past(grad_keys), past(grad_values)), parts, strict=True):
                whole.add_(part)
        return (
            grad_query.to(query.dtype),
            _scatter_sums(grad_keys, row, group).to(key.dtype),
            _scatter_sums(grad_values, row, group).to(value.dtype),
            None, None, None,
        )  # fmt: skip


@dataclass(frozen=True)
class _Span:
    """The same range of tokens in each of several adjacent segments of equal length.

    Attributes:
        start: first token of the first segment.
        count, length: number of segments, and number of tokens of each.
        first, last: the range within each segment.
    """

    start: int
    count: int
    length: int
    first: int
    last: int

    def __call__(self, x: Tensor) -> Tensor:
        """Selects the range: x [tokens, heads, …] -> a view [segments, heads, last - first, …]."""
        segments = x[self.start : self.start + self.count * self.length].unflatten(0, (self.count, self.length))
        return segments[:, self.first : self.last].transpose(1, 2)


def _blocks(row: PackedRow, group: dist.ProcessGroup) -> Iterator[tuple[_Span, _Span, bool]]:
    """The blocks of attention: (queries, in this rank's part of the row; keys, in the whole row; whether causal)."""
    context, rank = group.size(), group.rank()
    for start, length, count in row.runs:
        piece = length // (2 * context)
        for half, index in enumerate((rank, 2 * context - 1 - rank)):
            here = _Span(start // context, count, length // context, half * piece, (half + 1) * piece)
            yield here, _Span(start, count, length, index * piece, (index + 1) * piece), True
            if index:
                yield here, _Span(start, count, length, 0, index * piece), False


def _gather(part: Tensor, row: PackedRow, group: dist.ProcessGroup) -> Tensor:
    """[t, …] of every rank -> [T, …] in the order of the row."""
    assert row.from_parts is not None
    whole = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
    dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
    return whole.index_select(0, row.from_parts)


def _scatter_sums(whole: Tensor, row: PackedRow, group: dist.ProcessGroup) -> Tensor:
    """[T, …] in the order of the row -> this rank's [t, …] of the sum over all ranks."""
    assert row.to_parts is not None
    part = whole.new_empty(whole.shape[0] // group.size(), *whole.shape[1:])
    dist.reduce_scatter_tensor(part, whole.index_select(0, row.to_parts), group=group)
    return part
