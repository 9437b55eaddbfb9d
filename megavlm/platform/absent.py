"""Pretends to be one rank of a larger world: process groups whose other ranks do not exist, tensors without memory."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork

from megavlm.platform import cpu
from megavlm.platform.device import set_absent
from megavlm.platform.groups import shutdown


@contextmanager
def absent_world(rank: int, world_size: int) -> Iterator[None]:
    """Within the block this process acts as rank ``rank`` of a world of any size; call ``init`` inside it.

    Collectives use torch's backend "fake", which returns at once and moves no data. ``device()`` is the meta device:
    tensors have a shape and a dtype but no values. Modules that do not name a device are created there, too.

    The CPU adaptations of Megatron stay installed in the process afterwards, even on a machine with a GPU, so the
    process should do nothing else that needs Megatron.
    """
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    _add_missing_kernels()

    assert not dist.is_initialized(), "this process already belongs to a process group"
    set_absent(True)
    cpu.install()
    gather = dist.all_gather_object
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    destroy_moe_metrics_tracker()  # it has a place for each layer of the model that was there before
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        dist.all_gather_object = _from_itself
        yield
    finally:
        dist.all_gather_object = gather
        shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()
        MoEAuxLossAutoScaler.main_loss_backward_scale = None  # it is the last step's, on the device of that step
        destroy_moe_metrics_tracker()
        set_absent(False)


def _from_itself(object_list: Any, obj: Any, group: Any = None) -> None:
    """All ranks hand over what this one does. Megatron gathers the keys of its parameter groups so."""
    object_list[:] = [obj] * len(object_list)


@functools.cache
def _add_missing_kernels() -> torch.library.Library:
    """Adds the collectives that torch lacks on the meta device; Megatron reduces gradients and gathers weights so."""
    library = torch.library.Library("c10d", "IMPL")  # kernels vanish with their library, so the cache keeps it alive
    for name in ("reduce_scatter_tensor_coalesced_", "allreduce_coalesced_", "allgather_into_tensor_coalesced_"):
        library.impl(name, lambda *args: FakeWork().boxed(), "Meta")
    return library
