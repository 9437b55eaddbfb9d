"""A setting of the C library's allocator for programs that handle one large tensor after another."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # M_… of glibc's malloc.h
_BYTES = 2**31 - 2**20


def keep_freed_memory() -> None:
    """Lets the next tensor reuse the memory of the last one.

    glibc returns a large block to the kernel as soon as it is freed, and the kernel zeroes each page of the next block.
    That takes a quarter of the CPU time of mcore2hf.py on one thread. Call this before starting threads. It has no
    effect with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_ARENA_MAX, 1)  # the other arenas, one per thread, cannot hold large blocks
    mallopt(_TRIM_THRESHOLD, _BYTES)
    mallopt(_MMAP_THRESHOLD, _BYTES)
