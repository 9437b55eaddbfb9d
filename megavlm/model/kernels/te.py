"""Transformer Engine's kernels. Needs a GPU; the portable set says what each must compute."""

from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from megavlm.model.kernels.attention import cached_attention


class PackedTEAttention(TEDotProductAttention):
    """TE's fused attention over the segments of a row. Query, key, value: [T, 1, heads, head_dim] -> [T, 1, hidden]."""

    def forward(
        self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        row = packed_seq_params
        if row.cache is not None:  # one token per sequence: too small for the fused kernel to matter
            return cached_attention(row, self.layer_number, query, key, value)
        out = super().forward(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            attention_mask,
            attn_mask_type=attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=row.as_thd(),
        )
        return out.reshape(out.shape[0], 1, -1)


class TransformerEngineKernels(TESpecProvider):
    """Megatron's TE set, with attention that knows our rows."""

    name = "te"
    grouped_experts = True

    def core_attention(self) -> type:
        return PackedTEAttention


class ApartTEKernels(TransformerEngineKernels):
    """The same with norms that are modules of their own: an adapter needs what goes into the linear."""

    def fuse_layernorm_and_linear(self) -> bool:
        return False


class LocalLinearTEKernels(ApartTEKernels):
    """Megatron's own linears and sequential experts beside TE's attention and norms: their weights can be in 4 bits."""

    grouped_experts = False

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool):
        return LocalSpecProvider().grouped_mlp_modules(moe_use_grouped_gemm)
