"""A few threads for work that is mostly copying and waiting for the disk."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

THREADS = 4
"""Enough for one to wait for the disk and one to hold the interpreter's lock while others copy; each costs memory."""


def in_threads[Item, Result](function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``[function(item) for item in items]``, several at a time, begun in this order.

    Torch's own threads are off meanwhile: they would only wait for the same cores, spinning.

    Raises:
        The first exception, in the order of ``items``; those not begun by then are left out.
    """
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # new threads take this over
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="convert")
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)
