"""Kernels in plain PyTorch: for CPUs, for GPUs without Transformer Engine, and as the oracle TE is checked against."""

import torch
from megatron.core.models.backends import LocalSpecProvider

from megavlm.model.kernels.attention import PackedAttention


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm whose weight takes part in sequence parallelism (Megatron refuses torch's own there)."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel


class LayerNorm(torch.nn.LayerNorm):
    """Layer norm, likewise."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-6):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias.sequence_parallel = config.sequence_parallel


class PortableKernels(LocalSpecProvider):
    """Megatron's local linears and sequential experts, with our norms and our packed attention."""

    name = "portable"
    grouped_experts = False

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return RMSNorm if rms_norm else LayerNorm

    def core_attention(self) -> type:
        return PackedAttention
