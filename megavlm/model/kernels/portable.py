"""Kernels in plain PyTorch: for CPUs, for GPUs without Transformer Engine, and as the reference for its tests."""

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.model.kernels.attention import PackedAttention


class RMSNorm(torch.nn.RMSNorm):
    """A root-mean-square norm that works with sequence parallelism, where Megatron refuses torch's own norm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        _mark(self.weight, config.sequence_parallel)


class LayerNorm(torch.nn.LayerNorm):
    """A layer norm that works with sequence parallelism, where Megatron refuses torch's own norm."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        _mark(self.weight, config.sequence_parallel)
        _mark(self.bias, config.sequence_parallel)


def _mark(parameter: torch.nn.Parameter, sequence_parallel: bool) -> None:
    """Tells Megatron's finalize_model_grads whether to sum the parameter's gradient over the tensor ranks."""
    parameter.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]  # torch does not declare it


class PortableKernels(LocalSpecProvider):
    """Megatron's local linear layers and sequential experts, with the norms above and attention for packed rows."""

    name = "portable"
    grouped_experts = fused_gradients = False

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return RMSNorm if rms_norm else LayerNorm

    def core_attention(self) -> type:
        return PackedAttention
