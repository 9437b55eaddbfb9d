"""Work spread over forked processes."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

from megavlm.base.errors import UserError
from megavlm.base.processes import end_with_parent

FEWER_WORKERS = "run the same command again with fewer --workers; what was finished is kept"
_work: Callable[[Any], Any] | None = None  # of a forked process


class Forked[A, T]:
    """Processes that work until the block ends; what one of them has learnt in a call, it still knows in the next.

    They inherit ``work`` with all that it refers to when they are forked, in the first call; only arguments and results
    are sent.

    Args:
        work: the work; what it raises is raised here.
        workers: the number of processes; with one, this one works.
        what: what is done, for the message of the UserError that is raised if a process dies.
        remedy: what to do then.
    """

    def __init__(self, work: Callable[[A], T], workers: int, what: str, remedy: str = FEWER_WORKERS):
        self._work, self._what, self._remedy = work, what, remedy
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(os.getpid(), work))

    def map(self, arguments: Iterable[A]) -> Iterator[T]:
        """The results for these arguments, in their order."""
        if self._pool is None:
            yield from map(self._work, arguments)
            return
        try:
            yield from self._pool.map(_call, arguments)
        except BrokenProcessPool:
            raise UserError(
                f"a process died while {self._what}: perhaps the memory was full, or a decoder crashed",
                self._remedy,
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def in_processes[T](
    work: Callable[[int], T], count: int, workers: int, what: str, remedy: str = FEWER_WORKERS
) -> Iterator[T]:
    """``work(0)`` to ``work(count - 1)`` in this order, computed by forked processes; see ``Forked``.

    Args:
        work, workers, what, remedy: see ``Forked``.
        count: the number of calls.
    """
    with Forked(work, min(workers, count), what, remedy) as processes:
        yield from processes.map(range(count))


def _begin(parent: int, work: Callable[[Any], Any]) -> None:
    global _work
    end_with_parent(parent)
    _work = work


def _call(argument: Any) -> Any:
    assert _work is not None, "a process begins with it"
    return _work(argument)


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def part_of(text: str) -> tuple[int, int]:
    """The part that "3/8" means: (2, 8); parts count from 1. Raises UserError."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count) <= 10**6):
        raise UserError(f"--part is {text[:40]!r}", "write the part and the number of parts, from 1/8 to 8/8")
    return int(number) - 1, int(count)
