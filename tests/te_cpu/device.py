"""TE is told that the tensors of a CPU are those of an H100. Only TE is: all others who ask hear the truth."""

import sys
from types import SimpleNamespace

import torch

CAPABILITY = (9, 0)


def pretend() -> None:
    """Answers what TE asks torch. ``megavlm.platform.cpu`` answers requests for tensors on "cuda" with those of a CPU.

    torch is asked for a device's properties by TE alone, since ``megavlm.platform`` knows that there is no GPU.
    """
    is_cuda, is_available = torch.Tensor.is_cuda, torch.cuda.is_available
    # attributes, not a torch function mode: that is off in backward passes and in TE's custom operators
    torch.Tensor.is_cuda = property(lambda self: _te_asks() or is_cuda.__get__(self))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.cuda.is_available = lambda: _te_asks() or is_available()
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(
        major=CAPABILITY[0], minor=CAPABILITY[1], multi_processor_count=132, total_memory=80 * 2**30, name="H100"
    )
    torch.cuda.is_current_stream_capturing = lambda: False


def _te_asks() -> bool:
    """Whether the caller of our caller is a function of TE."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith("transformer_engine")


def get_cublasLt_version() -> int:
    return 130100


def get_num_cublas_streams() -> int:
    return 4


ANSWERS = [get_cublasLt_version, get_num_cublas_streams]


def as_torch(dtype) -> torch.dtype:
    """torch's name of one of TE's dtypes."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    return dtype if isinstance(dtype, torch.dtype) else TE_DType_To_Torch[int(dtype)]
