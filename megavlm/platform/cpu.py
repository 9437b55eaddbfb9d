"""Lets Megatron-core, unmodified, run on CPU + gloo.

Megatron names "cuda" where it means "the device". Each adaptation below stands beside the Megatron call that needs it.
All of them are installed once, by ``install()``, on a machine without a GPU, and never on one with, unless the process
is a rank of a world that does not exist (``megavlm.platform.absent``): its tensors are on the meta device.
"""

import contextlib
import logging
import warnings

import torch
import torch.distributed
from torch.overrides import TorchFunctionMode

from megavlm.platform.device import device


def _is_cuda(value: object) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


class _CudaMeansCpu(TorchFunctionMode):
    """Answers every request for a CUDA tensor with one on ``device()``.

    - ``torch.empty(…, device="cuda")``: optimizer flags, schedules' token count, gradient norm, MoE dispatcher
    - ``tensor.to("cuda")``, ``tensor.cuda()``: ``tensor_parallel.data``, optimizer state reloading
    - ``param.type()``: DistributedOptimizer and Float16Optimizer compare it with ``"torch.cuda.FloatTensor"``
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            if args[0].device.type == "meta":
                return name.replace("torch.meta.", "torch.cuda.", 1)
            return name.replace("torch.", "torch.cuda.", 1) if args[0].device.type == "cpu" else name
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": device()}
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], device(), *args[2:])
        return func(*args, **kwargs)


class _Stream:
    """No-op stand-in for a CUDA stream or event (DDP's communication stream, the MoE dispatcher's copy stream)."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def _nothing(self, *args, **kwargs):
        return None

    wait_stream = wait_event = record = wait = synchronize = _nothing

    def record_event(self, event=None):
        return event or _Stream()

    def query(self):
        return True


def _cpu_rng_state(device=None):
    return torch.get_rng_state()


def _set_cpu_rng_state(state, device=None):
    torch.set_rng_state(state)


def _all_to_all_with_lists(all_to_all_single):
    """``_AllToAll`` of the MoE dispatcher may hand split sizes over as tensors; gloo takes lists."""

    def all_to_all(output, input, output_split_sizes=None, input_split_sizes=None, group=None, async_op=False):
        as_list = lambda sizes: sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
        return all_to_all_single(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), group=group, async_op=async_op
        )

    return all_to_all


_mode: _CudaMeansCpu | None = None


def install() -> None:
    """Installs the adaptations in this process; a second call does nothing."""
    global _mode
    if _mode is not None:
        return
    from megatron.core.tensor_parallel import random as megatron_random

    table = [
        # (object, attribute, replacement)                          needed by
        (torch.cuda, "current_device", device),  # every `device=torch.cuda.current_device()` in Megatron
        (torch.cuda, "synchronize", lambda device=None: None),  # p2p_communication, dist_checkpointing writers
        (torch.cuda, "empty_cache", lambda: None),  # optimizer offloading helpers
        (torch.cuda, "set_device", lambda device: None),  # asynchronous checkpoint worker
        (torch.cuda, "Stream", _Stream),  # MoEAlltoAllTokenDispatcher
        (torch.cuda, "Event", _Stream),  # the same
        (torch.cuda, "stream", lambda stream: contextlib.nullcontext()),  # param_and_grad_buffer
        (torch.cuda, "current_stream", lambda device=None: _Stream()),  # param_and_grad_buffer
        (torch.cuda, "get_rng_state", _cpu_rng_state),  # CudaRNGStatesTracker.add
        (torch.cuda, "set_rng_state", _set_cpu_rng_state),  # RNG restore from a checkpoint
        (torch.cuda, "manual_seed", torch.manual_seed),  # model_parallel_cuda_manual_seed
        (megatron_random, "_get_cuda_rng_state", lambda *a, **k: torch.get_rng_state()),  # CudaRNGStatesTracker.fork
        (megatron_random, "_set_cuda_rng_state", lambda state, *a, **k: torch.set_rng_state(state)),  # the same
        (torch.distributed, "all_to_all_single", _all_to_all_with_lists(torch.distributed.all_to_all_single)),
        (torch.Tensor, "record_stream", lambda self, stream: None),  # moe_utils
    ]
    for owner, name, replacement in table:
        setattr(owner, name, replacement)
    # CudaRNGStatesTracker.fork warns when the CPU generator moves inside it; here that is the generator it forks
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    # DistributedOptimizer clears `.grad` of views; torch warns at the caller, which here is the mode above
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    torch.compiler.set_stance("force_eager")  # `jit_fuser` of the fusions is torch.compile: a C++ build per worker
    _mode = _CudaMeansCpu()
    _mode.__enter__()  # for the life of the process
