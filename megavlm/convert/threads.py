"""A few threads for work that consists mostly of copying and of waiting for the disk."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

THREADS = 4
"""Enough that others copy while one waits for the disk and one holds the interpreter's lock. Each costs memory."""


def in_threads[Item, Result](function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """``[function(item) for item in items]``, with several calls at a time, which start in this order.

    Torch's own threads are off meanwhile, because they would only spin while they wait for the same cores.

    Raises:
        The first exception, in the order of ``items``. Calls that have not started by then are cancelled.
    """
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # new threads inherit this
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="convert")
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(torch_threads)
