"""Attention within the segments of a packed row, in plain PyTorch."""

import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.model.kernels.context import context_attention
from megavlm.model.packed import PackedRow
from megavlm.platform import attention_blocks
from megavlm.platform.batch_invariant import attend_one, is_batch_invariant


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, *, causal: bool, scale: float
) -> Tensor:
    """Attention in which tokens attend only to tokens of their own segment.

    Args:
        query: [T, heads, head_dim].
        key, value: [T, kv_heads, head_dim].
        row: the segments.
        causal: whether tokens attend only to earlier tokens and to themselves.
        scale: factor on the products of queries and keys.

    Returns:
        [T, heads, head_dim].
    """
    if is_batch_invariant() and causal:
        return _one_by_one(query, key, value, row, scale)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return attention_blocks.packed(
            query, key, value, row.cu_seqlens_q, row.max_seqlen_q, causal=causal, scale=scale
        )
    out = []
    for start, length, count in row.runs:
        # [count * length, heads, dim] -> [count, heads, length, dim], without copies
        q, k, v = (
            x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2) for x in (query, key, value)
        )
        o = attention_blocks.attention(q, k, v, causal=causal, scale=scale)
        out.append(o.transpose(1, 2).flatten(0, 1))
    return torch.cat(out) if len(out) != 1 else out[0]


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scale: float) -> Tensor:
    """Causal attention in calls of the shape that sampling makes for each new token."""
    out, start = [query[:0]], 0
    for length in row.lengths:
        for end in range(start + 1, start + length + 1):
            out.append(attend_one(query[end - 1], key[start:end], value[start:end], scale)[None])
        start += length
    return torch.cat(out)


def scale_of(config: TransformerConfig) -> float:
    """The factor on the products of queries and keys."""
    return config.softmax_scale or 1.0 / math.sqrt(config.kv_channels)


def cached_attention(
    row: PackedRow, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    """Attention while generating, with the row's key/value cache: [T, 1, heads, head_dim] -> [T, 1, hidden]."""
    assert row.cache is not None
    query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
    out = row.cache.attend(layer_number, query, key, value, row, scale)
    return out.reshape(out.shape[0], 1, -1)


class PackedAttention(MegatronModule):
    """Megatron's ``core_attention`` for packed rows: [T, 1, heads, head_dim] -> [T, 1, hidden]."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attention_type == "self"
        assert not config.attention_dropout
        assert pg_collection is not None
        self.layer_number = layer_number
        self.causal = attn_mask_type == AttnMaskType.padding_causal  # there is no padding within segments
        self.scale = scale_of(config)
        self.context_group = pg_collection.cp
        assert self.causal or self.context_group.size() == 1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        row = packed_seq_params
        assert row is not None
        if row.cache is not None:
            return cached_attention(row, self.layer_number, query, key, value, self.scale)
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.context_group.size() > 1:
            out = context_attention(query, key, value, row, self.context_group, self.scale)
        else:
            out = segment_attention(query, key, value, row, causal=self.causal, scale=self.scale)
        return out.reshape(out.shape[0], 1, -1)
