"""`--nproc N`: starts N worker processes on this machine, with the variables of the process group in their environment.

torchrun cannot be used for this because it changes the behaviour of the command line in three ways: it replaces each
exit status by 1 and prints a banner, it ends workers 30 seconds after SIGTERM even while they write a checkpoint, and
it does not forward SIGUSR1.

Rank 0 prints to the terminal. The output of each other rank goes to a log, whose end is shown if that rank fails.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from megavlm.base import stop_signals
from megavlm.cli import failures

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)  # other signals are passed on to the workers as SIGTERM
_LOG_LINES = 40


def run(arguments: Sequence[str], nproc: int, *, reads_terminal: bool = False, trains: bool = False) -> int:
    """Runs `megavlm ARGUMENTS` in `nproc` processes and waits for them.

    The first of SIGTERM, SIGUSR1, SIGHUP and Ctrl-C is forwarded to the workers as a request to stop; a second Ctrl-C
    or SIGTERM ends them. With ``reads_terminal``, rank 0 has the standard input of this process. ``trains`` says that
    the workers may have a step to finish before they stop.

    Returns:
        0 if all workers succeed; 2 if settings or data are invalid (one message is printed); 128 and the number of the
        signal if one ended the workers; otherwise 1.
    """
    with tempfile.TemporaryDirectory(prefix="megavlm-") as name, _stop_signals(trains) as stop:
        folder = Path(name)
        port = _free_port()
        stdin = [None if reads_terminal else subprocess.DEVNULL, *[subprocess.DEVNULL] * (nproc - 1)]
        workers = [_start(arguments, rank, nproc, port, folder, stdin[rank]) for rank in range(nproc)]
        try:
            return _wait(workers, folder, stop)
        finally:
            _end(workers)


def is_worker() -> bool:
    """Whether this process was started by `run`."""
    return failures.FOLDER_VARIABLE in os.environ


class _Stop:
    """The signals received: the one to forward, and whether to end at once."""

    def __init__(self, trains: bool) -> None:
        self.trains = trains
        self.requests = stop_signals.Requests(echo_seconds=0.1)
        self.pending: list[int] = []
        self.now: int | None = None

    def __call__(self, number: int, frame: object) -> None:
        meaning = self.requests.add(number)
        if meaning == "at once":
            self.now = number
        elif meaning == "first":
            if number == signal.SIGINT and self.trains:
                # on a line of its own, because rank 0 may have a progress bar there; rank 0 says how it stops
                begin = "\n" if sys.stderr.isatty() else ""
                print(f"{begin}stopping (press Ctrl-C again to stop at once)", file=sys.stderr)
            self.pending.append(number if number in FORWARDED else signal.SIGTERM)


@contextmanager
def _stop_signals(trains: bool) -> Iterator[_Stop]:
    stop = _Stop(trains)
    before = {number: signal.signal(number, stop) for number in stop_signals.handled()}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(
    arguments: Sequence[str], rank: int, nproc: int, port: int, folder: Path, stdin: int | None
) -> subprocess.Popen:
    cores = len(os.sched_getaffinity(0))
    environment = {
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        failures.FOLDER_VARIABLE: str(folder),
    }
    command = [sys.executable, "-m", "megavlm", *arguments]
    # In a new session, Ctrl-C reaches only the parent, and _end can also end the data workers.
    start = partial(subprocess.Popen, command, env=environment, stdin=stdin, start_new_session=True)
    if rank == 0:
        return start()
    with _log(folder, rank).open("wb") as log:
        return start(stdout=log, stderr=subprocess.STDOUT)


def _wait(workers: list[subprocess.Popen], folder: Path, stop: _Stop) -> int:
    while True:
        while stop.pending:
            number = stop.pending.pop(0)
            for worker in workers:
                worker.send_signal(number)  # does nothing if the worker has ended
        if stop.now is not None:
            words = stop_signals.AT_ONCE if stop.trains else "ended by {}"
            failures.show(words.format(stop_signals.name_of(stop.now)))
            return stop_signals.status_of(stop.now)
        failure = failures.first(folder)
        codes = [worker.poll() for worker in workers]
        broken = next(((rank, code) for rank, code in enumerate(codes) if code), None)
        # A worker that ended without a report comes first, because failures of the others are only consequences.
        if broken is not None and not (failure and failure.rank == broken[0]):
            return _vanished(*broken, folder, stop)
        if failure:
            title = "" if failure.status == failures.USER_ERROR else f"rank {failure.rank} failed:\n"
            failures.show(title + failure.message, failure.remedy)
            return failure.status
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.05)


def _vanished(rank: int, code: int, folder: Path, stop: _Stop) -> int:
    """Reports a worker that ended without a report of its own, for example because the kernel killed it."""
    if code == failures.USER_ERROR:
        return code
    asked = stop.requests.first
    if asked is not None and (-code in FORWARDED or code - stop_signals.status_of(0) in FORWARDED):
        words = stop_signals.BEFORE_THE_FIRST_STEP if stop.trains else "ended by {}"
        failures.show(words.format(stop_signals.name_of(asked)))
        return stop_signals.status_of(asked)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    hint = "the kernel kills processes when the machine runs out of memory" if code == -signal.SIGKILL else None
    tail = "\n".join(_log(folder, rank).read_text(errors="replace").splitlines()[-_LOG_LINES:]) if rank else ""
    failures.show(f"rank {rank} {how}" + (f"; the end of its output:\n{tail}" if tail else ""), hint)
    return failures.OTHER_ERROR


def _end(workers: list[subprocess.Popen]) -> None:
    """Ends all processes that are still running; after a success there are none."""
    if all(worker.poll() == 0 for worker in workers):
        return
    for worker in workers:
        with suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
    for worker in workers:
        worker.wait()
    if sys.stderr.isatty():
        print("\x1b[?25h", end="", file=sys.stderr)  # a killed progress bar leaves the cursor hidden


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.log"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
