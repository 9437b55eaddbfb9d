"""Lets Megatron-core run unmodified on CPU + gloo.

Megatron writes "cuda" where it means "the device". Each adaptation below names the Megatron call that needs it.
``install()`` installs all of them once. It is called on a machine without a GPU. On a machine with a GPU it is called
only if the process pretends to be a rank of a larger world (``megavlm.platform.absent``), with tensors on the meta
device.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed
from torch.overrides import TorchFunctionMode

from megavlm.platform.device import device


def _is_cuda(value: object) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


_TOLD_A_DEVICE = {torch.Tensor.cuda, torch.Tensor.type, torch.Tensor.to}  # or telling one, without a name for it


class _CudaMeansCpu(TorchFunctionMode):
    """Answers every request for a CUDA tensor with a tensor on ``device()``.

    - ``torch.empty(…, device="cuda")``: optimizer flags, schedules' token count, gradient norm, MoE dispatcher
    - ``tensor.to("cuda")``, ``tensor.cuda()``: ``tensor_parallel.data``, optimizer state reloading
    - ``param.type()``: DistributedOptimizer and Float16Optimizer compare it with ``"torch.cuda.FloatTensor"``
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not kwargs and func not in _TOLD_A_DEVICE:
            return func(*args)
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
    """A CUDA stream or event that does nothing, for DDP's communication stream and the MoE dispatcher's copy stream."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def _nothing(self, *args: object, **kwargs: object) -> None:
        return None

    wait_stream = wait_event = record = wait = synchronize = _nothing

    def record_event(self, event: "_Stream | None" = None) -> "_Stream":
        return event or _Stream()

    def query(self) -> bool:
        return True


def _cpu_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_cpu_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state)


_Splits = list[int] | torch.Tensor | None


def _all_to_all_with_lists(all_to_all_single: Callable[..., Any]) -> Callable[..., Any]:
    """The MoE dispatcher's ``_AllToAll`` may pass split sizes as tensors, but gloo accepts only lists."""

    def all_to_all(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: _Splits = None,
        input_split_sizes: _Splits = None,
        group: torch.distributed.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> Any:
        as_list = lambda sizes: sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes
        return all_to_all_single(
            output, input, as_list(output_split_sizes), as_list(input_split_sizes), group=group, async_op=async_op
        )

    return all_to_all


def without_transformer_engine() -> list[tuple[Any, str, Any]]:
    """What Megatron would have chosen at its import without Transformer Engine, whose kernels need a GPU."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as megatron_optimizer
    from megatron.core.transformer.moe import moe_utils

    return [
        (optimizer, "Adam", torch.optim.AdamW),
        (optimizer, "SGD", torch.optim.SGD),
        (optimizer, "USING_PYTORCH_OPTIMIZER", True),
        (distrib_optimizer, "Adam", torch.optim.Adam),
        (distrib_optimizer, "HAVE_APEX_OR_TE", False),  # where the state of an optimizer has its step count
        (distrib_optimizer, "USING_TE_OPTIMIZER", False),
        (megatron_optimizer, "multi_tensor_applier", utils.local_multi_tensor_applier),
        (megatron_optimizer, "multi_tensor_scale_impl", utils.local_multi_tensor_scale),
        (clip_grads, "multi_tensor_applier", utils.local_multi_tensor_applier),
        (clip_grads, "multi_tensor_scale_impl", utils.local_multi_tensor_scale),
        (clip_grads, "multi_tensor_scale_tensor_impl", None),
        (clip_grads, "l2_norm_impl", utils.local_multi_tensor_l2_norm),
        (moe_utils, "te_general_gemm", None),  # the router's product
    ]


_mode: _CudaMeansCpu | None = None


def install() -> None:
    """Installs the adaptations in this process. A second call does nothing."""
    global _mode
    if _mode is not None:
        return
    from megatron.core.tensor_parallel import random as megatron_random

    table: list[tuple[Any, str, Any]] = [
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
    if "transformer_engine" in sys.modules:  # as in the container, whose command also runs on login nodes
        table += without_transformer_engine()
    for owner, name, replacement in table:
        setattr(owner, name, replacement)
    # CudaRNGStatesTracker.fork warns if the CPU generator advances inside it; here that is the generator it forks
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    # DistributedOptimizer clears `.grad` of views; torch attributes its warning to the caller, here the mode above
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    torch.compiler.set_stance("force_eager")  # `jit_fuser` is torch.compile, which would run a C++ build per process
    _mode = _CudaMeansCpu()
    _mode.__enter__()  # stays active until the process ends
