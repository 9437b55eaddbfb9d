"""Runs a command on several ranks, in processes that may be killed at any moment.

    commands = Commands()
    outcome = commands.run(["sft", "config.yaml"], 2, log, Kill(rank=1, step=3))

One process, forked off the server of forkserver.py, has imported what the command needs, and forks the ranks: real
processes, each the head of a session with its data workers and writers, in the environment that torchrun would give
them. When one rank is killed the others are ended as torchrun and srun do: by SIGTERM, then by SIGKILL.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forkserver import ENVIRONMENT, forkserver

from megavlm.monitor.metrics import read_metrics

GRACE_SECONDS = 0.5  # between SIGTERM and SIGKILL; torchrun gives 30 and srun two
TIMEOUT_SECONDS = 900.0  # only ends what hangs; a busy machine is slow


@dataclass(frozen=True)
class Kill:
    """When to kill ``rank``: ``delay`` seconds after it has come to ``step`` (0: after its start).

    ``locked``: from then on, as soon as the run holds the lock of its folder, long before its first step. ``writing``:
    from then on, as soon as a checkpoint is being written. ``number``: the signal; all ranks receive one that they can
    handle, as from a terminal or from torchrun.
    """

    rank: int
    step: int = 0
    delay: float = 0.0
    locked: bool = False
    writing: bool = False
    number: int = signal.SIGKILL


@dataclass(frozen=True)
class Outcome:
    """Exit status of each rank (minus the signal that ended it), and what was left running half a second later."""

    statuses: list[int]
    survivors: list[str]


class Commands:
    """Runs ``megavlm`` commands, one at a time; without their reports at the end, if these are not wanted."""

    def __init__(self, *, reports: bool = True):
        context = forkserver()
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, dict(os.environ), sys.path, reports))
        self._process.start()
        theirs.close()

    def run(self, arguments: list[str], size: int, output: Path, kill: Kill | None = None) -> Outcome:
        """``megavlm ARGUMENTS`` on ``size`` ranks. What they print goes to ``output``'s name with ".log"."""
        self._connection.send((arguments, size, output, kill))
        result = self._connection.recv()
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()


def _serve(connection, environment: dict[str, str], path: list[str], reports: bool) -> None:
    os.environ |= environment | ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "lo"}
    sys.path[:] = path
    import torch

    import megavlm.cli.main
    import megavlm.commands.train  # so that no rank has to

    torch.set_num_threads(1)
    if not reports:
        megavlm.commands.train._Reports.at_end = lambda self, run, step, say: None
    while True:
        try:
            arguments, size, output, kill = connection.recv()
        except EOFError:
            return
        try:
            connection.send(_run(megavlm.cli.main.main, arguments, size, output, kill))
        except Exception as error:
            connection.send(error)


def _run(main: Callable, arguments: list[str], size: int, output: Path, kill: Kill | None) -> Outcome:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.time()
    ranks = [_fork(main, arguments, rank, size, port, output.with_suffix(".log")) for rank in range(size)]
    statuses: dict[int, int] = {}
    try:
        if kill is not None:
            _wait_for(kill, output, began, ranks, statuses)
            for rank in [kill.rank] if kill.number == signal.SIGKILL else range(size):
                os.kill(ranks[rank], kill.number)
        while len(statuses) < size and time.time() < began + TIMEOUT_SECONDS and not any(statuses.values()):
            _reap(ranks, statuses)
            time.sleep(0.002)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            _signal(ranks, statuses, number)
            deadline = time.time() + GRACE_SECONDS
            while len(statuses) < size and time.time() < deadline:
                _reap(ranks, statuses)
                time.sleep(0.002)
    time.sleep(0.5)
    survivors = _processes_of(ranks)
    return Outcome([statuses.get(rank, 999) for rank in range(size)], survivors)


def _fork(main: Callable, arguments: list[str], rank: int, size: int, port: int, log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        status = main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _wait_for(kill: Kill, output: Path, began: float, ranks: list[int], statuses: dict[int, int]) -> None:
    """Until the moment of ``kill``, or the end of a rank."""
    grown = lambda: _last_step(output, began) >= kill.step
    writing = lambda: not kill.writing or any((output / "checkpoints").glob("*.partial/*.distcp"))
    locked = lambda: not kill.locked or (output / "run.lock").exists()
    for reached in (grown, locked, writing):
        while not reached() and time.time() < began + TIMEOUT_SECONDS:
            _reap(ranks, statuses)
            if statuses:
                raise RuntimeError(
                    f"a rank ended before its kill ({statuses}):\n{output.with_suffix('.log').read_text()}"
                )
            time.sleep(0.002)
    time.sleep(kill.delay)


def _last_step(output: Path, began: float) -> int:
    """The step of the last line of metrics.jsonl; 0 if this start has not touched it."""
    metrics = output / "metrics.jsonl"
    if not metrics.is_file() or metrics.stat().st_mtime < began:
        return 0
    lines = read_metrics(metrics)
    return lines[-1]["step"] if lines else 0


def _reap(ranks: list[int], statuses: dict[int, int]) -> None:
    for rank, pid in enumerate(ranks):
        if rank not in statuses:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                statuses[rank] = os.waitstatus_to_exitcode(status)


def _signal(ranks: list[int], statuses: dict[int, int], number: int) -> None:
    for rank, pid in enumerate(ranks):
        if rank not in statuses:
            os.kill(pid, number)


def _processes_of(sessions: list[int]) -> list[str]:
    """Command lines of the processes in these sessions."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            command = (stat.parent / "cmdline").read_text().replace("\0", " ")
            if int(session) in sessions and state != "Z" and command:  # a process that is ending has none any more
                found.append(command)
        except OSError:
            continue
    return found
