"""Processes that make rows: they end with the trainer, not with a signal that all processes of a job receive.

If a sample kills such a process, it is named and passed over, and the processes are started again where they were.
"""

import gc
import logging
import multiprocessing
import os
import signal
import threading
from abc import abstractmethod
from collections.abc import Generator, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megavlm.base.errors import RunFailure, UserError
from megavlm.base.processes import end_with_parent
from megavlm.workers.fatal_samples import FROM_OUTSIDE, FatalSamples, death_of
from megavlm.workers.shared_memory import sent, too_little

_PATIENCE = 2.0  # seconds to wait for the end of a process that should end or has probably died
_MOST_DEATHS = 3  # consecutive deaths of workers, without a row in between, that a run survives
_log = logging.getLogger(__name__)


class WorkerRows[T](IterableDataset[T | UserError]):
    """Rows, or other data classes, that worker processes make. Iterate over them with ``rows_from_workers``.

    Attributes:
        fatal: the samples that are passed over, and the notes of what each worker reads.
    """

    fatal: FatalSamples

    @abstractmethod
    def rows_of(self, process: int) -> Iterator[T]:
        """The rows of worker process number `process` of this rank (0 if there are no workers).

        They begin after those that have been ``taken``.
        """

    @abstractmethod
    def taken(self, row: T) -> None:
        """The trainer has taken this row; called there, so that workers that start later continue after it."""

    def __iter__(self) -> Iterator[T | UserError]:
        """Yields rows. If no further row can be made, the last item is the error that says why."""
        info = get_worker_info()
        if info is not None:
            self.fatal.notes.use(info.id)
        yield from sent(self.rows_of(info.id if info is not None else 0))


def rows_from_workers[T](rows: WorkerRows[T], num_workers: int, *, ahead: int | None = None) -> Generator[T]:
    """Yields the rows of ``num_workers`` forked processes (0: of this process). Close it to end the processes.

    If a process dies, all are started again and continue after the rows that have been taken. The sample that the dead
    one was reading is passed over; the other rows are the same as without the death.

    Args:
        rows: makes the rows.
        num_workers: number of processes.
        ahead: number of rows that a worker makes in advance; None: torch's default.

    Raises:
        UserError: no further row can be made.
        RunFailure: processes died several times without a row in between, or there is too little shared memory.
    """
    deaths = 0
    while True:
        workers = _Workers[T](_loader(rows, num_workers, ahead=ahead))
        died = None
        try:
            for item in workers:
                if isinstance(item, UserError):
                    raise item
                deaths = 0
                rows.taken(item)
                yield item
        except _WorkerDied as death:
            died = death.process, death.status
        finally:
            workers.close(at_once=died is not None)
        if died is None:
            return
        gc.collect()  # torch's loader and its iterator reference each other; freeing them releases their queues
        deaths = _explain(rows.fatal, *died, deaths)


def _explain(fatal: FatalSamples, process: int, status: int, deaths: int) -> int:
    """Says why a worker died and what is done about it. Raises RunFailure if it is not to be started again.

    Args:
        fatal: the list of samples.
        process: process id of the worker.
        status: exit status of the worker.
        deaths: number of deaths in a row before this one.

    Returns:
        That number with this death, unless a sample has died a second time in order to be certain.
    """
    death = death_of(status)
    if -status == signal.SIGBUS:  # a page was written for which there is no shared memory any more
        raise too_little(f"a worker {death}")
    blamed = fatal.blame(process, status)
    again = f"; remove its lines from {fatal.path} to have it read again" if fatal.path else ""
    is_second = blamed is not None and blamed[1] and -status in FROM_OUTSIDE
    if not is_second and deaths == _MOST_DEATHS:
        last = f"while reading {blamed[0]}" if blamed else "while it read no sample"
        kept = f". {fatal.path} lists the samples that are passed over" if fatal.path else ""
        raise RunFailure(
            f"a data worker died: it {death} {last}. It is the {deaths + 1}th in a row without a row of data in between"
            f"{kept}",
            "the kernel kills processes when the machine runs out of memory: lower data.workers or "
            "data.packing_buffer. The same command continues the run",
        )
    if blamed is None:
        _log.warning("a data worker %s while it read no sample; the data workers are started again", death)
    else:
        sample, is_passed_over = blamed
        what = f"is passed over from now on{again}" if is_passed_over else "is passed over if this happens again"
        _log.warning("%s: the data worker %s while reading it; the sample %s", sample, death, what)
    return deaths + (not is_second)


class _WorkerDied(Exception):
    def __init__(self, process: int, status: int):
        super().__init__(process, status)
        self.process, self.status = process, status


class _Workers[T]:
    """The items of a loader. A dead process is noticed only while an item is awaited, as _WorkerDied.

    torch would raise a RuntimeError at any moment, in the middle of a training step, from its handler of SIGCHLD.
    """

    def __init__(self, loader: DataLoader[T | UserError]):
        self._loader, self._awaited = loader, False
        self._processes: list[BaseProcess] = []
        self._handles = loader.num_workers > 0 and threading.current_thread() is threading.main_thread()
        self._previous = signal.getsignal(signal.SIGCHLD)

    def __iter__(self) -> Iterator[T | UserError]:
        try:
            items = self._start()
            while True:
                self._awaited = True
                self._check()
                item = next(items, None)
                self._awaited = False
                if item is None:
                    return
                yield item
        except (RuntimeError, OSError, EOFError):
            # torch noticed the death first, or the connection to the dead process broke while a row was received
            self._await_death()
            self._check()
            raise
        finally:
            self._awaited = False

    def _start(self) -> Iterator[T | UserError]:
        before = set(multiprocessing.active_children())
        try:
            return iter(self._loader)
        finally:
            self._processes = [child for child in multiprocessing.active_children() if child not in before]
            if self._handles:
                signal.signal(signal.SIGCHLD, self._on_end_of_child)  # in place of torch's

    def _on_end_of_child(self, number: int, frame: FrameType | None) -> None:
        if self._awaited:
            self._check()

    def _await_death(self) -> None:
        """Waits, if a process is dying, until it has an exit status; the kernel closes its files before that."""
        dying = wait([process.sentinel for process in self._processes], _PATIENCE if self._processes else 0)
        for process in self._processes:
            if process.sentinel in dying:
                process.join()

    def _check(self) -> None:
        for process in self._processes:
            if process.exitcode and process.pid is not None:
                raise _WorkerDied(process.pid, process.exitcode)

    def close(self, *, at_once: bool) -> None:
        """Restores the handler of SIGCHLD; with ``at_once``, also ends the processes, without waiting for their rows.

        Otherwise, torch ends them when its iterator is freed.
        """
        self._awaited = False
        if self._handles:
            signal.signal(signal.SIGCHLD, self._previous or signal.SIG_DFL)
        if at_once:
            for process in self._processes:
                process.terminate()
            for process in self._processes:
                process.join(_PATIENCE)
                if process.is_alive():
                    process.kill()


def _loader(rows: WorkerRows, num_workers: int, *, ahead: int | None) -> DataLoader:
    return DataLoader(
        rows,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=ahead if num_workers else None,
        worker_init_fn=_start_worker,
        # Other ways of starting a process import torch and transformers again, which takes a worker many seconds.
        multiprocessing_context="fork" if num_workers else None,
        # Not the global generator: only ranks that load data draw here, and they draw once more after a resume,
        # so the random numbers of dropout would differ between ranks.
        generator=torch.Generator(),
    )


def _start_worker(worker: int) -> None:
    """Set up a new worker process.

    When a job is stopped, all its processes receive a signal. The worker ignores it, because the trainer still needs
    rows until its step is done. A worker ends only if the trainer itself sends the signal, or dies.
    """
    end_with_parent()
    gc.freeze()  # this process must not collect objects inherited from the trainer, such as tensors on the GPU
    for stop in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
