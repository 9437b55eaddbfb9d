"""The two sets of kernels behind ``model.kernels``: Transformer Engine's, and plain PyTorch's (``portable``)."""

import importlib.util

from megavlm.base.errors import UserError
from megavlm.platform import on_gpu


def transformer_engine_found() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def resolve(kernels: str) -> str:
    """``auto`` becomes ``te`` on a GPU with Transformer Engine installed, else ``portable``.

    Raises:
        UserError: ``te`` was asked for where it cannot run.
    """
    can_te = on_gpu() and transformer_engine_found()
    if kernels == "auto":
        return "te" if can_te else "portable"
    if kernels == "te" and not can_te:
        why = "transformer_engine is not installed" if on_gpu() else "there is no GPU"
        raise UserError(f"model.kernels=te, but {why}; use model.kernels=portable, or auto, which takes what is there")
    return kernels


def provider(kernels: str, adapter):
    """Megatron ``BackendSpecProvider`` for a resolved name, ``te`` or ``portable``, and the adapter section."""
    if kernels == "te":
        from megavlm.model.kernels import te

        if adapter.quantize:
            return te.LocalLinearTEKernels()
        return te.ApartTEKernels() if adapter.type else te.TransformerEngineKernels()
    from megavlm.model.kernels.portable import PortableKernels

    return PortableKernels()
