"""Much page-locked memory of the host, of exactly the size that is asked for."""

import mmap
import socket
import weakref

import torch
from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.platform.device import on_gpu

_ALIGNED = 64  # bytes


class HostMemory:
    """One block of memory, page-locked on a GPU, that is given out in pieces. Keep it as long as the pieces are used.

    torch's own page-locked tensors would take up to twice as much: it rounds each request up to a power of two. A
    forked process does not have the block: Linux may copy what is page-locked at each fork.

    Args:
        sizes: bytes of the pieces, in the order in which they are taken.

    Raises:
        UserError: the host does not have it, or this process may not lock so many pages.
    """

    def __init__(self, sizes: list[int]):
        size, self._used = sum(map(_aligned, sizes)), 0
        try:
            pages = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_DONTFORK)
            self._block = torch.frombuffer(pages, dtype=torch.uint8)
            if on_gpu() and size:
                runtime, place = torch.cuda.cudart(), self._block.data_ptr()
                torch.cuda.check_error(runtime.cudaHostRegister(place, size, 0))
                weakref.finalize(self, runtime.cudaHostUnregister, place).atexit = False
        except (OSError, RuntimeError) as error:
            what = f"{size / 2**30:.3g} GiB of page-locked host memory"
            raise UserError(
                f"{what} could not be had on {socket.gethostname()}: {error}",
                "`megavlm plan` tells how much of a host's memory a run needs. Try a larger limit (ulimit -l), fewer "
                "GPUs on a host, or train.offload_activations=false and train.offload_optimizer=false",
            ) from error

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """The next piece, an uninitialised vector [numel]."""
        begin, size = self._used, numel * dtype.itemsize
        self._used += _aligned(size)
        return self._block[begin : begin + size].view(dtype)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
