"""One rank of a world that does not exist: a process group without other ranks, and tensors without memory."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeWork

from megavlm.platform import cpu
from megavlm.platform.device import set_absent
from megavlm.platform.groups import shutdown


@contextmanager
def absent_world(rank: int, world_size: int) -> Iterator[None]:
    """This process is a rank of a world of any size, for as long as the block lasts; ``init`` goes on from there.

    Collectives are torch's backend "fake", which returns at once and moves nothing. ``device()`` is the meta device:
    tensors have shapes and types and no numbers. What a module makes without naming a device is there, too.

    The CPU's adaptations of Megatron stay in the process afterwards, also on a machine with a GPU: for a process that
    does nothing else there.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    _add_missing_kernels()

    assert not dist.is_initialized(), "this process has a world already"
    set_absent(True)
    cpu.install()
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        yield
    finally:
        shutdown()
        if dist.is_initialized():
            dist.destroy_process_group()
        set_absent(False)


@functools.cache
def _add_missing_kernels() -> torch.library.Library:
    """torch has all collectives on the meta device but the two by which Megatron's DDP reduces gradients."""
    library = torch.library.Library("c10d", "IMPL")  # its kernels go when it does: the cache keeps it
    for name in ("reduce_scatter_tensor_coalesced_", "allreduce_coalesced_"):
        library.impl(name, lambda *args: FakeWork().boxed(), "Meta")
    return library
