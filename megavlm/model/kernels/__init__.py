"""The two sets of kernels of ``model.kernels``: Transformer Engine (``te``) and plain PyTorch (``portable``)."""

import importlib.util
from typing import Any, Protocol

from megavlm.base.errors import UserError
from megavlm.config.settings import AdapterSettings
from megavlm.platform import on_gpu


class Kernels(Protocol):
    """Megatron's BackendSpecProvider, which names the module for each layer, with attributes of our own.

    Attributes:
        name: ``te`` or ``portable``.
        grouped_experts: whether the experts of a rank are multiplied together.
        fused_gradients: whether linear layers add to the gradient buffer in the product itself.
    """

    name: str
    grouped_experts: bool
    fused_gradients: bool

    def column_parallel_linear(self) -> type: ...
    def row_parallel_linear(self) -> type: ...
    def fuse_layernorm_and_linear(self) -> bool: ...
    def column_parallel_layer_norm_linear(self) -> type | None: ...
    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type: ...
    def core_attention(self) -> type: ...
    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Any: ...
    def activation_func(self) -> Any: ...


def transformer_engine_found() -> bool:
    """Whether Transformer Engine is installed."""
    return importlib.util.find_spec("transformer_engine") is not None


def resolve(kernels: str, precision: str) -> str:
    """Resolves ``auto`` to ``te`` on a GPU if Transformer Engine is installed, otherwise to ``portable``.

    Also for float32, for which Transformer Engine has no fused attention: it would hold all products of queries and
    keys in memory, and it refuses context parallelism.

    Raises:
        UserError: ``te`` was chosen but cannot run.
    """
    can_te = on_gpu() and transformer_engine_found()
    if kernels == "auto":
        return "te" if can_te and precision != "fp32" else "portable"
    if kernels == "te" and not can_te:
        why = "transformer_engine is not installed" if on_gpu() else "there is no GPU"
        raise UserError(f"model.kernels is te, but {why}", "set model.kernels to portable, or to auto")
    return kernels


def provider(kernels: str, adapter: AdapterSettings) -> Kernels:
    """The provider for a resolved name, ``te`` or ``portable``, and the adapter section of the settings."""
    if kernels == "te":
        from megavlm.model.kernels import te

        if adapter.quantize:
            return te.LocalLinearTEKernels()
        return te.ApartTEKernels() if adapter.type else te.TransformerEngineKernels()
    from megavlm.model.kernels.portable import PortableKernels

    return PortableKernels()
