"""The device of this process, its memory and its random numbers."""

import os
import random
import resource
import time

import numpy as np
import torch

_absent = False  # see ``megavlm.platform.absent``


def set_absent(absent: bool) -> None:
    """Whether this process stands for a rank of a world that does not exist."""
    global _absent
    _absent = absent


def on_gpu() -> bool:
    """True on CUDA + NCCL; ``MEGAVLM_PLATFORM=cpu`` forces the CPU platform on a machine with a GPU."""
    return not _absent and os.environ.get("MEGAVLM_PLATFORM", "") != "cpu" and torch.cuda.is_available()


def device() -> torch.device:
    """The device every tensor of the model lives on."""
    if _absent:
        return torch.device("meta")
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu() else torch.device("cpu")


def backend() -> str:
    """Name of the torch.distributed backend for tensors on ``device()``."""
    return "nccl" if on_gpu() else host_backend()


def host_backend() -> str:
    """Name of the torch.distributed backend for tensors in host memory."""
    return "fake" if _absent else "gloo"


def host_buffer(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised matrix in host memory; with a GPU page-locked, so that copies to it run beside its work."""
    return torch.empty(rows, width, dtype=dtype, pin_memory=on_gpu())


def to_device(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    """A host tensor on ``where``, without waiting for it: by way of page-locked memory where that is a GPU."""
    if where.type != "cuda":
        return tensor.to(where)
    return tensor.pin_memory().to(where, non_blocking=True)


def device_name() -> str | None:
    """The GPU's name as its driver gives it; None on a CPU."""
    return torch.cuda.get_device_name() if on_gpu() else None


def synchronize() -> None:
    """Waits for the device; nothing to wait for on a CPU."""
    if on_gpu():
        torch.cuda.synchronize()


def memory_gib() -> float:
    """Peak memory of this process in GiB: allocated by torch on a GPU, resident on a CPU."""
    if on_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def reset_memory() -> None:
    """``memory_gib`` counts from here on. (On a CPU it cannot: the kernel keeps one peak per process.)"""
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()


def mark() -> "torch.cuda.Event | float":
    """A point in the device's work, set without waiting for it: on a CPU, which works at once, the time in seconds."""
    if not on_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: "torch.cuda.Event | float", end: "torch.cuda.Event | float") -> float:
    """Seconds from one ``mark`` to another. The device must have passed both."""
    return start.elapsed_time(end) / 1000 if on_gpu() else end - start


def seed_everything(seed: int) -> None:
    """Seeds Python, numpy, torch and Megatron's tracker; tensor ranks and pipeline stages draw differently."""
    from megatron.core import parallel_state, tensor_parallel

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()  # as far apart as Megatron's own offsets
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
