"""Work spread over forked processes."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.processes import end_with_parent

_work: Callable[[int], Any] | None = None


def in_processes[T](work: Callable[[int], T], count: int, workers: int, what: str) -> Iterator[T]:
    """``work(0)`` to ``work(count - 1)`` in this order, computed by forked processes; with one worker, by this one.

    The processes inherit `work` with all that it refers to; only its results are sent.

    Args:
        work: the work; what it raises is raised here.
        count: the number of calls.
        workers: the number of processes.
        what: what is done, for the message of the UserError that is raised if a process dies.
    """
    global _work
    if min(workers, count) <= 1:
        yield from map(work, range(count))
        return
    _work = work
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(min(workers, count), context, initializer=end_with_parent, initargs=(os.getpid(),))
    try:
        yield from pool.map(_call, range(count))
    except BrokenProcessPool:
        raise UserError(
            f"a process died while {what}: perhaps the memory was full, or a decoder crashed",
            "run the same command again with fewer --workers; what was finished is kept",
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        _work = None


def _call(number: int) -> Any:
    assert _work is not None, "it is set before the process is forked"
    return _work(number)


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def part_of(text: str) -> tuple[int, int]:
    """The part that "3/8" means: (2, 8); parts count from 1. Raises UserError."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= 10**6):
        raise UserError(f"--part is {text[:40]!r}", "write the part and the number of parts, from 1/8 to 8/8")
    return int(number) - 1, int(count)
