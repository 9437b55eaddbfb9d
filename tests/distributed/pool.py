"""Worlds of gloo processes that stay alive from test to test.

    def everyone_adds(value):                       # at the top level of a test module
        total = torch.tensor(float(value))
        torch.distributed.all_reduce(total)
        return total.item()

    def test_sum(world4):
        assert world4.run(everyone_adds, 2) == [8.0] * 4

Starting eight Python processes that import torch and Megatron costs minutes on two cores; a call here costs some
hundredths of a second. Processes are forked off one server process that has imported both (forkserver.py). Every call
gets a fresh world: its process groups, and Megatron's parallel state, are gone before the next one.

What a process prints appears as the test's own output. A call that raises, dies or hangs on some rank ends with
RankError, which has each rank's traceback or stack; the processes are then replaced.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forkserver import OtherServer, forkserver
from pool_worker import Failure, address, name_of, work

START_SECONDS = 600.0  # of all processes of a world, on a machine that is busy
GRACE_SECONDS = 3.0  # for the other ranks to report too once one has failed


class RankError(AssertionError):
    """A call failed on at least one rank.

    Attributes:
        exceptions: rank → the exception raised there, None for a rank that died or hung; the first to fail comes first.
    """

    def __init__(self, message: str, exceptions: dict[int, BaseException | None]):
        super().__init__(message)
        self.exceptions = exceptions


@dataclass
class _Worker:
    process: multiprocessing.Process
    connection: multiprocessing.connection.Connection
    log: Path  # its stdout and stderr


class Pool:
    """`world_size` processes, started at the first call.

    Args:
        world_size: ranks of the world.
        timeout: seconds that a call may take.
        after_each: function without arguments that every rank runs after a call, before its process groups are
            destroyed; importable by name.
        server: what the processes are forked off; None: the server that all tests share.
    """

    def __init__(
        self,
        world_size: int,
        timeout: float = 300.0,
        after_each: Callable[[], None] | None = None,
        server: OtherServer | None = None,
    ):
        self.world_size = world_size
        self.timeout = timeout
        self.after_each = after_each
        self.server = server
        self._workers: list[_Worker] = []
        self._store = None
        self._folder: tempfile.TemporaryDirectory | None = None
        self._calls = 0

    def run(self, function: Callable, *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """Calls `function(*args, **kwargs)` on every rank inside a world of its own.

        The function stands at the top level of a module (of a test, too); arguments and results are pickled, tensors
        by value. `torch.distributed` is initialised, Megatron's parallel state is not.

        Returns:
            The results, by rank.

        Raises:
            RankError: it raised, died or took longer than `timeout` on some rank.
        """
        if self._workers and not all(worker.process.is_alive() for worker in self._workers):
            warnings.warn(f"a process of world {self.world_size} died between calls:\n{self._output()}", stacklevel=2)
            self.close()
        if not self._workers:
            self._start()
        self._calls += 1
        path = [*sys.path, *(self.server.path if self.server else [])]
        message = pickle.dumps((self._calls, path, address(function), pickle.dumps((args, kwargs))))
        for worker in self._workers:
            worker.log.write_bytes(b"")
            worker.connection.send_bytes(message)
        results = self._collect(timeout or self.timeout, name_of(function))
        if output := self._output():
            print(output)
        for worker in self._workers:
            worker.connection.send_bytes(pickle.dumps(None))  # every rank has returned: now the groups can go
        return results

    def close(self) -> None:
        """Ends the processes; a later call starts new ones."""
        for worker in self._workers:
            worker.connection.close()  # an idle worker ends at the end of its input
        for worker in self._workers:
            worker.process.join(timeout=2)
            _kill(worker)
        self._workers = []
        self._store = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        atexit.unregister(self.close)

    def _start(self) -> None:
        import torch.distributed as dist

        context = forkserver()
        atexit.register(self.close)  # multiprocessing's own exit handler would wait for the workers
        self._folder = tempfile.TemporaryDirectory(prefix="megavlm-world-")
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        after_each = address(self.after_each) if self.after_each else None
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            log = Path(self._folder.name) / f"rank{rank}.log"
            process = context.Process(
                target=work,
                args=(rank, self.world_size, self._store.port, theirs, str(log), after_each),
                name=f"world{self.world_size}-rank{rank}",
            )
            start = self.server.start if self.server else multiprocessing.Process.start
            start(process)
            theirs.close()
            self._workers.append(_Worker(process, ours, log))
        self._collect(START_SECONDS, "starting")

    def _collect(self, seconds: float, name: str) -> list[Any]:
        """One report from each rank; RankError unless all are results."""
        results: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        deadline = time.monotonic() + seconds
        while len(results) + len(failures) < self.world_size:
            waiting = {
                worker.connection: rank
                for rank, worker in enumerate(self._workers)
                if rank not in results and rank not in failures
            }
            ready = multiprocessing.connection.wait(waiting, max(deadline - time.monotonic(), 0))
            for connection in ready:
                rank = waiting[connection]
                report = self._receive(rank)
                if isinstance(report, Failure):
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                    failures[rank] = report
                else:
                    results[rank] = report
            if not ready:
                break
        if len(results) == self.world_size:
            return [results[rank] for rank in range(self.world_size)]
        raise self._give_up(name, seconds, set(results), failures)

    def _receive(self, rank: int) -> Any:
        worker = self._workers[rank]
        try:
            report = worker.connection.recv_bytes()
        except (EOFError, OSError):
            worker.process.join(timeout=5)
            return Failure(f"the process died with exit code {worker.process.exitcode}")
        try:
            return pickle.loads(report)
        except Exception:
            return Failure(f"its result cannot be unpickled:\n{traceback.format_exc()}")

    def _give_up(self, name: str, seconds: float, done: set[int], failures: dict[int, Failure]) -> RankError:
        """The error for a failed call. The processes stay only where every rank raised: then none is left hanging."""
        hanging = [rank for rank in range(self.world_size) if rank not in done and rank not in failures]
        for rank in hanging:
            os.kill(self._workers[rank].process.pid, signal.SIGQUIT)  # dumps its stacks into its log
        if hanging:
            time.sleep(1.0)
        cause = "while another rank failed" if failures else f"for more than {seconds:g} s"
        failures |= {rank: Failure(f"no answer {cause}; its stack is in its output below") for rank in hanging}
        exceptions = {rank: failure.exception for rank, failure in failures.items()}
        texts = [f"rank {rank}: {failure.text.rstrip()}" for rank, failure in failures.items()]
        texts.append(self._output() or "(no output)")
        if all(exceptions.get(rank) is not None for rank in range(self.world_size)):
            for worker in self._workers:
                worker.connection.send_bytes(pickle.dumps(None))
        else:
            for worker in self._workers:
                _kill(worker)
            self.close()
        return RankError(f"{name} on {self.world_size} ranks\n" + "\n\n".join(texts), exceptions)

    def _output(self) -> str:
        """What the ranks have printed during the call, a line of heading before each."""
        texts = [(rank, worker.log.read_text(errors="replace")) for rank, worker in enumerate(self._workers)]
        return "\n".join(f"--- output of rank {rank}\n{text.rstrip()}" for rank, text in texts if text.strip())


def _kill(worker: _Worker) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.join()
