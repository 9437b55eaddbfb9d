"""The thread of a pool of worker processes: what is submitted to it, what it has finished, and its end."""

import contextlib
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from multiprocessing.connection import wait
from typing import Self

from megavlm.rewards.worker_process import WorkerProcess


class PoolThread[Submitted, Finished](ABC):
    """A base class of pools. The thread starts the workers, which end with it, and listens to them.

    Args:
        name: what the pool has, for messages.
    """

    def __init__(self, name: str):
        self._name = name
        self._submitted: queue.SimpleQueue[Submitted] = queue.SimpleQueue()
        self._finished: queue.SimpleQueue[Finished | None] = queue.SimpleQueue()  # None: the thread has ended
        self._error: BaseException | None = None
        self._is_closed = False
        self._wake, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @abstractmethod
    def _round(self) -> None:
        """Starts missing workers, gives them work, and listens until something happens. In the thread."""

    @abstractmethod
    def _running(self) -> Iterable[WorkerProcess]:
        """The workers that run. In the thread."""

    def close(self) -> None:
        """Ends the workers; what is not finished is dropped. A second call does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._wake_up()
            self._thread.join()
            os.close(self._wake)
            os.close(self._waker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _submit(self, item: Submitted) -> None:
        if self._is_closed:
            raise self._closed()
        self._submitted.put(item)
        self._wake_up()

    def _next(self, timeout: float | None) -> Finished:
        """What was finished next; None waits for it, and otherwise queue.Empty is raised after ``timeout`` seconds.

        Raises what has ended the thread.
        """
        found = self._finished.get(block=timeout != 0.0, timeout=timeout)
        if found is None:
            self._finished.put(None)  # the next call is to end, too
            assert self._error is not None
            raise self._error
        return found

    def _heard_from(self, workers: Iterable[WorkerProcess], timeout: float | None) -> tuple[set, list[Submitted]]:
        """Waits until something is submitted, a worker says something or ends, or ``timeout`` seconds. In the thread.

        Returns:
            The connections and pidfds of workers that are ready, and what was submitted.
        """
        handles = [handle for worker in workers for handle in (worker.connection, worker.pidfd)]
        ready = set(wait([self._wake, *handles], timeout))
        items: list[Submitted] = []
        if self._wake in ready:
            os.read(self._wake, 4096)
            with contextlib.suppress(queue.Empty):
                while True:
                    items.append(self._submitted.get_nowait())
        return ready, items

    def _closed(self) -> RuntimeError:
        return RuntimeError(f"the {self._name} have been closed")

    def _wake_up(self) -> None:
        with contextlib.suppress(BlockingIOError):  # the pipe is full, so the thread wakes up in any case
            os.write(self._waker, b".")

    def _run(self) -> None:
        """The thread."""
        try:
            while not self._is_closed:
                self._round()
            raise self._closed()
        except BaseException as error:
            self._error = error
            self._finished.put(None)
        finally:
            for worker in self._running():
                worker.kill()
