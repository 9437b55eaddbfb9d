"""Much page-locked memory of the host, of exactly the size that is asked for."""

import weakref

import torch
from torch import Tensor

from megavlm.platform.device import on_gpu

_ALIGNED = 64  # bytes


class HostMemory:
    """One block of memory, page-locked on a GPU, that is given out in pieces. Keep it as long as the pieces are used.

    torch's own page-locked tensors would take up to twice as much: it rounds each request up to a power of two.

    Args:
        sizes: bytes of the pieces, in the order in which they are taken.
    """

    def __init__(self, sizes: list[int]):
        self._block = torch.empty(sum(map(_aligned, sizes)), dtype=torch.uint8, device="cpu")
        self._used = 0
        if on_gpu() and len(self._block):
            runtime, place = torch.cuda.cudart(), self._block.data_ptr()
            torch.cuda.check_error(runtime.cudaHostRegister(place, len(self._block), 0))
            weakref.finalize(self, runtime.cudaHostUnregister, place).atexit = False

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """The next piece, an uninitialised vector [numel]."""
        begin, size = self._used, numel * dtype.itemsize
        self._used += _aligned(size)
        return self._block[begin : begin + size].view(dtype)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
