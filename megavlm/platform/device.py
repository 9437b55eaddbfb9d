"""The device of this process, its memory and its random numbers."""

import os
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_absent = False  # see ``megavlm.platform.absent``


def set_absent(absent: bool) -> None:
    """Sets whether this process pretends to be a rank of a larger world."""
    global _absent
    _absent = absent


def on_gpu() -> bool:
    """True on CUDA + NCCL; ``MEGAVLM_PLATFORM=cpu`` forces the CPU platform on a machine with a GPU."""
    return not _absent and os.environ.get("MEGAVLM_PLATFORM", "") != "cpu" and torch.cuda.is_available()


def device() -> torch.device:
    """The device of all tensors of the model."""
    if _absent:
        return torch.device("meta")
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def backend() -> str:
    """The name of the torch.distributed backend for tensors on ``device()``."""
    return "nccl" if on_gpu() else host_backend()


def host_backend() -> str:
    """The name of the torch.distributed backend for tensors in host memory."""
    return "fake" if _absent else "gloo"


def host_buffer(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised matrix in host memory. It is page-locked on a GPU, so that copies overlap the GPU's work."""
    return torch.empty(rows, width, dtype=dtype, pin_memory=on_gpu())


def to_device(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    """Copies a tensor to ``where``. From the host to a GPU, through page-locked memory and without waiting."""
    if where.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(where)
    return tensor.pin_memory().to(where, non_blocking=True)


def device_name() -> str | None:
    """The GPU's name as its driver reports it; None on a CPU."""
    return torch.cuda.get_device_name() if on_gpu() else None


def synchronize() -> None:
    """Waits until the device has finished its work. On a CPU it returns at once."""
    if on_gpu():
        torch.cuda.synchronize()


def memory_gib() -> float:
    """Peak memory of this process in GiB: on a GPU what torch allocated, on a CPU the resident memory."""
    if on_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def allocated() -> tuple[int, int] | tuple[None, None]:
    """Peak bytes on this GPU: those of tensors, and those that torch's allocator holds for them; None on a CPU."""
    if not on_gpu():
        return None, None
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def reset_memory() -> None:
    """Restarts the peaks of ``memory_gib`` and ``allocated``.

    On a CPU this has no effect: the kernel keeps one peak per process.
    """
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()


def mark() -> "torch.cuda.Event | float":
    """Marks a point in the device's work without waiting for it: a CUDA event, or on a CPU the time in seconds."""
    if not on_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: "torch.cuda.Event | float", end: "torch.cuda.Event | float") -> float:
    """Seconds between two ``mark``s. The device must already have reached both."""
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(end, torch.cuda.Event)
    return start.elapsed_time(end) / 1000


def repeat_results() -> None:
    """Makes kernels and collectives of this process repeat their results. Call it before the first of them.

    An operation of torch for which there is no such kernel warns with its name. What is set already in the environment
    stays: Transformer Engine and NCCL read these variables, and Megatron's ``deterministic_mode`` checks the first.
    """
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "^NVLS")  # sums in the switch come in any order
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # costs time, repeats no sum


def reached(point: "torch.cuda.Event | float") -> bool:
    """Whether the device has already reached a ``mark``. It never waits."""
    return True if isinstance(point, float) else point.query()


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """Names what happens within the block for torch's profiler, and on a GPU as an NVTX range for Nsight Systems."""
    with torch.profiler.record_function(name):
        if not on_gpu():
            yield
            return
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy, torch and Megatron's tracker. Tensor ranks and pipeline stages get different numbers."""
    from megatron.core import parallel_state, tensor_parallel

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()  # the spacing that Megatron's own offsets have
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
