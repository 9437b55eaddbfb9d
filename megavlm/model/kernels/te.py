"""Transformer Engine's kernels, which need a GPU. They compute the same as the portable kernels."""

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.model.kernels.attention import cached_attention, scale_of, segment_attention
from megavlm.model.packed import PackedRow


class NoFusedAttention(torch.nn.Module):
    """In place of TE's attention that keeps the products of all queries and keys, which it would take in silence."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise UserError(
            "Transformer Engine finds no fused attention for this GPU, precision and model",
            "set NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 to see why; or set model.kernels to portable",
        )


class PackedTEAttention(TEDotProductAttention):
    """Fused attention within the segments of a row: [T, 1, heads, head_dim] -> [T, 1, hidden].

    It is TE's, or torch's if results are to repeat and the row is not cut: on H100, TE admits cuDNN's backward pass
    that does so for short rows only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unfused_attention = NoFusedAttention()

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
        if row.cache is not None:  # with one token per sequence a fused kernel is not faster
            return cached_attention(row, self.layer_number, query, key, value, scale_of(self.config))
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.config.deterministic_mode and self.config.context_parallel_size == 1:
            scale, causal = scale_of(self.config), "causal" in self.attn_mask_type  # a string in TE
            out = segment_attention(query, key, value, row, causal=causal, scale=scale)
        else:
            out = super().forward(
                query, key, value, attention_mask, attn_mask_type=attn_mask_type, packed_seq_params=row.as_thd()
            )
        return out.reshape(out.shape[0], 1, -1)


class TransformerEngineKernels(TESpecProvider):
    """Megatron's TE layers, with attention for packed rows."""

    name = "te"
    grouped_experts = fused_gradients = True

    def core_attention(self) -> type:
        return PackedTEAttention


class ApartTEKernels(TransformerEngineKernels):
    """The same with norms as separate modules, because an adapter needs the input of the linear layer."""

    def fuse_layernorm_and_linear(self) -> bool:
        return False


class LocalLinearTEKernels(ApartTEKernels):
    """TE's attention and norms with Megatron's own linear layers and sequential experts, whose weights may be 4-bit."""

    grouped_experts = fused_gradients = False  # Megatron's own linear layers would need apex for it

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any:
        return LocalSpecProvider().grouped_mlp_modules(moe_use_grouped_gemm)


def start_userbuffers(tokens: int, hidden: int, tensor: int, *, fp8: bool) -> None:
    """Allocates the buffers with which tensor ranks send pieces of products (``train.overlap.tensor``).

    Args:
        tokens: number of tokens of a row in a group of tensor ranks.
        hidden: the decoder's hidden size.
        tensor: number of tensor ranks.
        fp8: whether products are in FP8.
    """
    from transformer_engine.pytorch import initialize_ub
    from transformer_engine.pytorch.module.base import UserBufferQuantizationMode

    modes = [UserBufferQuantizationMode.FP8 if fp8 else UserBufferQuantizationMode.NONE]
    initialize_ub([tokens, hidden], tensor, quantization_modes=modes, dtype=torch.bfloat16, bootstrap_backend="nccl")
