"""Much page-locked memory of the host, without what torch would waste of it."""

import torch
from torch import Tensor

from megavlm.platform.device import host_buffer

SLAB = 2**30
"""Bytes that are asked for at a time. torch rounds each request for page-locked memory up to a power of two."""
_ALIGNED = 64  # bytes


class HostMemory:
    """Gives out pieces of slabs. A slab is free when nobody holds a piece of it any more."""

    def __init__(self) -> None:
        self._slab, self._used = torch.empty(0, dtype=torch.uint8, device="cpu"), 0

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised vector [numel], page-locked on a GPU. A vector longer than a slab has one of its own."""
        size, begin = numel * dtype.itemsize, -(-self._used // _ALIGNED) * _ALIGNED
        if size > SLAB:
            return host_buffer(1, numel, dtype)[0]
        if begin + size > self._slab.numel():
            self._slab, begin = host_buffer(1, SLAB, torch.uint8)[0], 0
        self._used = begin + size
        return self._slab[begin : begin + size].view(dtype)
