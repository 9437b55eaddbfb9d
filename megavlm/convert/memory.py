"""A setting of the C library's allocator that suits programs which handle one large tensor after another."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # M_… of glibc's malloc.h
_BYTES = 2**31 - 2**20


def keep_freed_memory() -> None:
    """Let the next tensor have the memory of the last one.

    glibc returns a large block to the kernel as soon as it is freed, and the kernel zeroes each page of the next one
    again: a quarter of the CPU time of mcore2hf on one thread. To be called before there are threads. No effect
    with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_ARENA_MAX, 1)  # the others, one per thread, take no large block
    mallopt(_TRIM_THRESHOLD, _BYTES)
    mallopt(_MMAP_THRESHOLD, _BYTES)
